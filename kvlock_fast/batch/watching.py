"""Progress of a batch while it runs: lines for people, a file for Prometheus."""

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from kvlock_fast.batch.runner import State, Watcher
from kvlock_fast.batch.worker import Running
from kvlock_fast.errors import OutputError, warn
from kvlock_fast.files import write_text
from kvlock_fast.progress import STAGES
from kvlock_fast.units import text_table

SECONDS_PER_LINE = 30
SECONDS_PER_FILE = 5
_STAGES = {"read": "reading", "wait": "waiting for the device"}


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def summary_line(state: State) -> str:
    """The whole batch in one line."""
    counts = state.counts
    parts = [f"{counts['done']} of {state.total} done"]
    parts += [f"{counts[name]} {name}" for name in ("failed", "running") if counts[name]]
    if state.made:
        parts.append(f"{3600 * state.made / max(state.seconds, 1e-9):.0f} an hour")
    if state.seconds_left:
        parts.append(f"{clock(state.seconds_left)} left")
    return ", ".join(parts)


def running_line(running: Running) -> str:
    """Describe a pass: its jobs, its stage, the time its denoising still takes."""
    more = len(running.jobs) - 1
    names = f"{running.jobs[0]}{f' and {more} more' if more else ''}"
    stage = STAGES.get(running.stage, _STAGES.get(running.stage, running.stage))
    steps = f" {running.done}/{running.total}" if running.total > 1 else ""
    left = ""
    if running.stage == "denoise" and 0 < running.done < running.total:
        left = f", {clock(running.seconds / running.done * (running.total - running.done))} left"
    return f"{names}: {stage}{steps}{left}"


@contextmanager
def shown(quiet: bool, stream: TextIO | None = None) -> Iterator[Watcher]:
    """A watcher that shows where the batch is: a display that renews itself on a terminal, lines elsewhere."""
    out: TextIO = stream or sys.stderr
    if quiet:
        yield lambda state: None
    elif out.isatty():
        with _display(out) as watch:
            yield watch
    else:
        yield Lines(out)


class Lines:
    """A line at least every tenth of the jobs and every half minute, and one for each failure."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.last, self.tenth = time.monotonic(), -1

    def __call__(self, state: State) -> None:
        for outcome in state.latest:
            if outcome.error is not None:
                print(f"failed: {outcome.job.id}: {outcome.error}", file=self.stream, flush=True)
        counts, now = state.counts, time.monotonic()
        tenth = 10 * (counts["done"] + counts["failed"]) // max(1, state.total)
        if tenth == self.tenth and now - self.last < SECONDS_PER_LINE:
            return
        self.last, self.tenth = now, tenth
        jobs = "; ".join(running_line(running) for running in state.running)
        print(f"batch: {summary_line(state)}{f' ({jobs})' if jobs else ''}", file=self.stream, flush=True)


@contextmanager
def _display(stream: TextIO) -> Iterator[Watcher]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream)
    with Live(console=console, refresh_per_second=4) as live:

        def watch(state: State) -> None:
            for outcome in state.latest:
                if outcome.error is not None:
                    console.print(Text(f"failed: {outcome.job.id}: {outcome.error}", style="red"))
            finished = state.counts["done"] + state.counts["failed"]
            whole = Table.grid(padding=(0, 1))
            whole.add_row(ProgressBar(max(1, state.total), finished, width=24), Text(summary_line(state)))
            rows = [Text(f"  {running_line(r)}", overflow="ellipsis", no_wrap=True) for r in state.running]
            live.update(Group(whole, *rows))

        yield watch


class MetricsFile:
    """Figures in the text format of Prometheus, for the textfile collector of its node exporter."""

    def __init__(self, path: Path):
        self.path, self.last = path, -SECONDS_PER_FILE

    def __call__(self, state: State) -> None:
        now = time.monotonic()
        if now - self.last >= SECONDS_PER_FILE or state.ended:
            self.last = now
            write_text(self.path, metrics_text(state))


def metrics_text(state: State) -> str:
    """Jobs by state, passes by stage, the rate and the time left."""
    registry = CollectorRegistry()
    registry.register(_Figures(state))
    return generate_latest(registry).decode()


@dataclass(eq=False)
class _Figures(Collector):
    state: State

    def collect(self) -> Iterator[Metric]:
        state = self.state
        jobs = GaugeMetricFamily("kvlock_batch_jobs", "Jobs of the manifest by state.", labels=["state"])
        passes = GaugeMetricFamily("kvlock_batch_passes_running", "Passes in a worker by stage.", labels=["stage"])
        stages = sorted(Counter(running.stage for running in state.running).items())
        for family, counts in ((jobs, state.counts.items()), (passes, stages)):
            for name, count in counts:
                family.add_metric([name], count)
            yield family
        rate = 3600 * state.made / state.seconds if state.made and state.seconds else 0.0
        left = math.nan if state.seconds_left is None else state.seconds_left
        finished = "Jobs done or failed since the program began."
        yield CounterMetricFamily("kvlock_batch_finished", finished, state.finished)
        for name, text, value in (
            ("edits_per_hour", "Jobs done an hour since the program began.", rate),
            ("seconds_left", "Seconds left at that rate; NaN before there is one.", left),
            ("updated_seconds", "Unix time of this file.", time.time()),
        ):
            yield GaugeMetricFamily(f"kvlock_batch_{name}", text, value)


def failures_table(failures: Sequence[tuple[str, int, str]]) -> str:
    """Write id, tries and error of what failed in columns."""
    rows = [(id, str(tries), error) for id, tries, error in failures]
    return text_table([("job", "tries", "error"), *rows], "<>")


def all_of(watchers: Sequence[Watcher]) -> Watcher:
    """Make one watcher of several. One that cannot write its file is said once, and costs no job."""
    said: set[str] = set()

    def watch(state: State) -> None:
        for watcher in watchers:
            try:
                watcher(state)
            except OutputError as error:
                if str(error) not in said:
                    said.add(str(error))
                    warn(str(error))

    return watch
