"""Engines, which run passes on workers: the interface, and the one that uses this process."""

import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from kvlock_fast.batch.jobs import Pass
from kvlock_fast.batch.worker import Finished, Running, Worker
from kvlock_fast.errors import one_line

LANES = 3
"""Passes in a worker at once: one is read, one computed, one written."""


@dataclass(frozen=True)
class Crashed:
    """The death of a worker with a pass. fatal: no other worker will come."""

    work: Pass
    reason: str
    fatal: bool = False


class Engine(Protocol):
    """Runs passes on workers, which may come and go. All calls are made from one thread."""

    @property
    def lanes(self) -> int:
        """Passes that a worker takes at once."""
        ...

    def ready(self) -> list[str]:
        """Name the workers that take passes now."""
        ...

    def submit(self, worker: str, work: Pass) -> None:
        """Start a pass on a worker; what becomes of it comes out of `wait`."""

    def wait(self, seconds: float) -> list[Finished | Crashed]:
        """Return the passes that ended, after at most so many seconds; there may be none."""
        ...

    def running(self) -> list[Running]:
        """Say where the passes are, as far as is known."""
        ...

    def stop(self) -> None:
        """Let every pass end after its running step; each still comes out of `wait`."""

    def close(self) -> None:
        """Let the workers go."""


class LocalEngine:
    """An engine with one worker, in this process."""

    lanes = LANES

    def __init__(self, worker: Worker):
        self.worker, self.running, self.stop = worker, worker.running, worker.stop
        self._threads = ThreadPoolExecutor(LANES, thread_name_prefix="pass")
        self._ended: queue.SimpleQueue[Finished | Crashed] = queue.SimpleQueue()

    def ready(self) -> list[str]:
        return ["local"]

    def submit(self, worker: str, work: Pass) -> None:
        self._threads.submit(self._run, work)

    def wait(self, seconds: float) -> list[Finished | Crashed]:
        try:
            found = [self._ended.get(timeout=seconds)]
        except queue.Empty:
            return []
        while not self._ended.empty():
            found.append(self._ended.get())
        return found

    def close(self) -> None:
        self.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.worker.close()

    def _run(self, work: Pass) -> None:
        try:
            self._ended.put(self.worker.run(work))
        except BaseException as error:
            self._ended.put(Crashed(work, one_line(error, 1000), fatal=True))
