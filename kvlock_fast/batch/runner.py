"""The batch itself: passes to workers, results to files, every change to the ledger."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from kvlock_fast.batch.engine import Crashed, Engine
from kvlock_fast.batch.jobs import Job, Pass, Waiting
from kvlock_fast.batch.ledger import Ledger
from kvlock_fast.batch.places import Results, report_name
from kvlock_fast.batch.worker import Finished, Outcome, Running
from kvlock_fast.errors import InputError, OutputError, OutputLost

TICK = 0.25
"""Seconds between two looks at what is running."""


@dataclass(frozen=True)
class State:
    """Progress of a batch.

    counts: jobs by state; finished: jobs done or failed since the program began `seconds` ago; made: those done.
    """

    counts: dict[str, int]
    running: Sequence[Running]
    finished: int
    made: int
    seconds: float
    latest: Sequence[Outcome] = ()
    ended: bool = False

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def seconds_left(self) -> float | None:
        """Estimate at the rate of finished edits, failures not counted; None before there is one."""
        left = self.counts["pending"] + self.counts["running"]
        return left * self.seconds / self.made if self.made else None


class Watcher(Protocol):
    """Receives the progress of a batch, several times a second."""

    def __call__(self, state: State) -> None: ...


@dataclass
class Runner:
    """Runs the passes of a ledger. jobs: those of the manifest; most: jobs in a new pass; watch: told what happens."""

    ledger: Ledger
    engine: Engine
    results: Results
    jobs: Sequence[Job]
    most: int
    watch: Watcher = lambda state: None
    stop: threading.Event = field(default_factory=threading.Event)
    fatal: str | None = None

    def run(self) -> dict[str, int]:
        """Run until nothing is left or `stop` is set; return how many jobs are in each state then.

        `fatal` says why it ended early: no worker was left, or no result can be written any more.
        """
        self._ids = [job.id for job in self.jobs]
        self._waiting = Waiting(self.ledger.passes(self._ids, self.most))
        self._given: dict[str, list[Pass]] = {}
        self._held: dict[str, str] = {}
        self._finished, self._made, self._begun, asked = 0, 0, time.monotonic(), False
        while self._in_flight or (len(self._waiting) and not (self.stop.is_set() or self.fatal)):
            if (self.stop.is_set() or self.fatal) and not asked:
                self.engine.stop()
                asked = True
            latest: list[Outcome] = []
            try:
                if not asked:
                    self._give()
                for event in self.engine.wait(TICK):
                    latest += self._take(event)
            except OutputLost as error:  # the ledger itself
                self.fatal = self.fatal or str(error)
            self.watch(self._state(latest))
        self.watch(replace(self._state([]), ended=True))
        return self.ledger.counts(self._ids)

    @property
    def _in_flight(self) -> int:
        return sum(map(len, self._given.values()))

    def _give(self) -> None:
        """Give passes to the workers that can take one, those with the fewest first."""
        ready = self.engine.ready()
        self._held = {worker: source for worker, source in self._held.items() if worker in ready}
        for _ in range(self.engine.lanes):
            for worker in sorted(ready, key=lambda name: len(self._given.get(name, ()))):
                at_work = self._given.setdefault(worker, [])
                if len(at_work) >= self.engine.lanes or any(work.crashes for work in at_work):
                    continue
                elsewhere = {source for name, source in self._held.items() if name != worker}
                work = self._waiting.take(self._held.get(worker), elsewhere, idle=not at_work)
                if work is not None:
                    self.ledger.begin(work)
                    at_work.append(work)
                    self._held[worker] = work.setup.source
                    self.engine.submit(worker, work)

    def _take(self, event: Finished | Crashed) -> list[Outcome]:
        """Enter what became of a pass; the outcomes of its jobs, as far as they are final."""
        for at_work in self._given.values():
            at_work[:] = [work for work in at_work if work.id != event.work.id]
        ending = bool(self.fatal) or self.stop.is_set()  # who is told to stop may be killed
        if isinstance(event, Crashed) and (event.fatal or ending):
            self.fatal = event.reason if event.fatal else self.fatal
            self.ledger.stopped(event.work)
        elif isinstance(event, Crashed):
            again = self.ledger.crashed(event.work, event.reason)
            self._waiting.add(again)
            left = {job.id for work in again for job in work.jobs}
            lost = [Outcome(job, f"set aside: {event.reason}") for job in event.work.jobs if job.id not in left]
            self._finished += len(lost)
            return lost
        elif event.stopped:
            self.ledger.stopped(event.work)
        elif event.halve:
            self._waiting.add(self.ledger.halved(event.work))
        else:
            return self._commit_all(event)
        return []

    def _commit_all(self, event: Finished) -> list[Outcome]:
        """Final outcomes. Where nothing can be written any more the batch ends, and the rest is pending."""
        final = []
        try:
            for outcome in event.outcomes:
                final.append(self._commit(event, outcome))
                self._finished += 1
            lost = event.lost
        except OutputLost as error:
            lost = str(error)
        if lost is not None:
            self.fatal = self.fatal or lost
            with suppress(OutputError):  # what it leaves running is pending at the next start
                self.ledger.stopped(event.work)
        return final

    def _commit(self, event: Finished, outcome: Outcome) -> Outcome:
        """Files first, then the ledger: what the ledger calls done is there, whole. Raises OutputLost."""
        job = outcome.job
        self.ledger.check_there()
        if outcome.error is not None:
            self.ledger.failed(job, outcome.error)
            return outcome
        assert event.decision is not None
        report = None
        try:
            if outcome.report is not None:
                report = report_name(job.id)
                self.results.write(report, outcome.report)
            self.results.write(job.output, outcome.video)
        except OutputLost:
            raise
        except InputError as error:
            self.results.check_takes_files()  # else it is not this job's fault
            self.ledger.failed(job, str(error))
            return Outcome(job, str(error))
        self.ledger.done(outcome, event.decision, report)
        self._made += 1
        return outcome

    def _state(self, latest: Sequence[Outcome]) -> State:
        counts, seconds = self.ledger.counts(self._ids), time.monotonic() - self._begun
        return State(counts, self.engine.running(), self._finished, self._made, seconds, latest)


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM sets `stop`, a second one interrupts at once; the signals that came."""
    came: list[int] = []

    def handle(number: int, _: Any) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt
        stop.set()
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"stopping after the running step; the same command goes on from here\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
