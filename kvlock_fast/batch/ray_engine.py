"""A batch on a Ray cluster: one actor a GPU, or a number of cores each.

The driver has the ledger and writes the results, so nothing is committed twice; an actor only computes. An actor that
dies takes its passes back to the queue, and another one is asked for.
"""

import os
import platform
import socket
import time
from pathlib import Path
from typing import Any

from kvlock_fast.batch.editor import Editor
from kvlock_fast.batch.engine import Crashed
from kvlock_fast.batch.jobs import Pass
from kvlock_fast.batch.worker import Finished, Running, Worker
from kvlock_fast.errors import InputError, os_errors

LANES = 2
"""Passes in an actor at once: one computed, one read or written."""
SECONDS_PER_LOOK = 1.0
MOST_FAILED_STARTS = 3
"""Number of failed starts of each actor after which the batch is given up, while no other runs."""
STOP_SECONDS = 600
"""Longest time for an actor to end its running step."""


class RayWorker(Worker):
    """A worker in a process of its own, on whatever machine."""

    def where(self) -> tuple[str, int]:
        """Machine and process."""
        return platform.node(), os.getpid()


class RayEngine:
    """Actors as workers. An actor is ready when it runs, wherever the cluster found room for it."""

    lanes = LANES

    def __init__(
        self,
        editor: Editor,
        base: Path,
        reports: bool,
        command: str,
        *,
        address: str | None = None,
        workers: int | None = None,
        cpus: int | None = None,
    ):
        """Start the actors.

        Args:
            editor, base, reports, command: what each actor's `Worker` takes.
            address: of a cluster; None starts one here.
            workers: number of actors; None for one a GPU, or as many as fit the cores.
            cpus: cores of an actor, which then has no GPU.

        Raises InputError where there is no Ray, no such cluster, or nothing to run on.
        """
        self.ray = _connected(address)
        resources = self.ray.cluster_resources()
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        on_cores = cpus is not None or (address is None and gpus == 0)
        if not (on_cores or gpus or workers):
            self.ray.shutdown()
            raise InputError(
                f"the Ray cluster '{address}' has no GPU: give --cpus-per-worker to use cores, or --workers for as "
                "many GPUs as are still to come"
            )
        self.count = workers or (max(1, cores // (cpus or 1)) if on_cores else gpus)
        # Calls of `running` and `stop` come in between the passes.
        options = {"num_cpus": cpus or 1, "num_gpus": int(not on_cores), "max_concurrency": LANES + 2}
        self._class = self.ray.remote(**options, max_restarts=0)(RayWorker)
        self._arguments = (editor, base, reports, command)
        self._actors: dict[str, Any] = {}
        self._starting: dict[Any, tuple[str, Any]] = {}
        self._passes: dict[Any, tuple[str, Pass]] = {}
        self._looks: dict[Any, str] = {}
        self._seen: dict[str, list[Running]] = {}
        self._stop_at: float | None = None
        self._number, self._last_look, self._failed_starts = 0, 0.0, 0
        for _ in range(self.count):
            self._start()

    def ready(self) -> list[str]:
        return list(self._actors)

    def submit(self, worker: str, work: Pass) -> None:
        self._passes[self._actors[worker].run.remote(work)] = (worker, work)

    def wait(self, seconds: float) -> list[Finished | Crashed]:
        self._look()
        if self._stop_at is not None and time.monotonic() > self._stop_at:
            for name in list(self._actors):
                self.ray.kill(self._actors[name])
        refs = [*self._passes, *self._starting, *self._looks]
        if not refs:
            time.sleep(seconds)
            return []
        done, _ = self.ray.wait(refs, num_returns=len(refs), timeout=seconds, fetch_local=False)
        found = []
        for ref in done:
            if ref in self._starting:
                self._started(ref)
            elif ref in self._looks:
                self._looked(ref)
            else:
                found.append(self._ended(ref))
        return found

    def running(self) -> list[Running]:
        return [running for name in sorted(self._seen) for running in self._seen[name]]

    def stop(self) -> None:
        self._stop_at = time.monotonic() + STOP_SECONDS
        for actor in self._actors.values():
            actor.stop.remote()

    def close(self) -> None:
        for actor in [*self._actors.values(), *(actor for _, actor in self._starting.values())]:
            self.ray.kill(actor)
        self.ray.shutdown()

    def _start(self) -> None:
        self._number += 1
        actor = self._class.remote(*self._arguments)
        self._starting[actor.where.remote()] = (f"actor {self._number}", actor)

    def _started(self, ref: Any) -> None:
        name, actor = self._starting.pop(ref)
        try:
            self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            self._failed_starts += 1
            if not self._actors and self._failed_starts >= MOST_FAILED_STARTS * self.count:
                raise InputError(f"no worker can be started on the Ray cluster: {_first_line(error)}") from error
            self._start()
            return
        self._actors[name], self._failed_starts = actor, 0

    def _ended(self, ref: Any) -> Finished | Crashed:
        name, work = self._passes.pop(ref)
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:  # the device is lost, or the worker is: a new process
            self._replace(name)
            return Crashed(work, f"the worker failed ({_first_line(error.cause)})")
        except self.ray.exceptions.RayError as error:
            self._replace(name)
            return Crashed(work, f"the worker died ({type(error).__name__})")

    def _replace(self, name: str) -> None:
        """Another actor in the place of one that is gone; its other passes end with it."""
        actor = self._actors.pop(name, None)
        self._seen.pop(name, None)
        if actor is not None:
            self.ray.kill(actor)
            if self._stop_at is None:
                self._start()

    def _look(self) -> None:
        """Ask the actors what they do, now and then; nobody waits for the answer."""
        if time.monotonic() - self._last_look < SECONDS_PER_LOOK or self._looks:
            return
        self._last_look = time.monotonic()
        self._looks = {actor.running.remote(): name for name, actor in self._actors.items()}

    def _looked(self, ref: Any) -> None:
        name = self._looks.pop(ref)
        try:
            self._seen[name] = self.ray.get(ref)
        except self.ray.exceptions.RayError:
            self._seen.pop(name, None)


def _connected(address: str | None) -> Any:
    """Return the ray module, connected."""
    try:
        import ray  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise InputError("--engine ray needs the package ray: pip install 'kvlock-fast[ray]'") from error
    import logging

    if address not in (None, "auto"):
        _refuse_unreachable(address)
    more = {} if address is not None else {"include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **more)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise InputError(f"--address '{address or 'local'}' is no Ray cluster: {_first_line(error)}") from error
    return ray


def _refuse_unreachable(address: str) -> None:
    """Raise InputError unless something listens there: Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and host and port.isascii() and port.isdecimal() and int(port) < 65536):
        raise InputError(f"--address must be auto, HOST:PORT or ray://HOST:PORT, got '{address}'")
    with os_errors(f"--address '{address}' is no Ray cluster", InputError):
        socket.create_connection((host, int(port)), timeout=10).close()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
