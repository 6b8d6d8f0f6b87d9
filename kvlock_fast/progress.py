"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

STAGES = {
    "load": "loading the model",
    "encode": "encoding the source",
    "source pass": "running the source",
    "text": "reading the prompts",
    "denoise": "denoising",
    "decode": "decoding",
    "write": "writing",
}

Report = Callable[[str, int, int], None]


@contextmanager
def progress_bar(quiet: bool = False, stream: TextIO | None = None) -> Iterator[Report]:
    """A function report(stage, done, total) that shows where an edit is."""
    out: TextIO = stream or sys.stderr
    if quiet:
        yield lambda stage, done, total: None
    elif out.isatty():
        with _rich_bar(out) as report:
            yield report
    else:
        yield PlainLines(out)


@contextmanager
def _rich_bar(stream: TextIO) -> Iterator[Report]:
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description:<20}"), rich.BarColumn(), rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(), rich.TextColumn("left"), rich.TimeRemainingColumn(),
    )  # fmt: skip
    with rich.Progress(*columns, console=Console(file=stream)) as bar:
        rows: dict[str, rich.TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in rows:
                rows[stage] = bar.add_task(STAGES.get(stage, stage), total=total)
            bar.update(rows[stage], completed=done, total=total)

        yield report


class PlainLines:
    """Prints a line where a stage begins, and for long ones a line every tenth with the time that is left."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.begun: dict[str, float] = {}
        self.tenths: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage not in self.begun:
            self.begun[stage] = now
            self.tenths[stage] = 0
            if done == 0:
                print(STAGES.get(stage, stage), file=self.stream, flush=True)
                return
        tenth = 10 * done // max(total, 1)
        if total > 1 and tenth > self.tenths[stage]:
            self.tenths[stage] = tenth
            left = (now - self.begun[stage]) / done * (total - done)
            name = STAGES.get(stage, stage)
            print(f"{name}: step {done} of {total}, {duration(left)} left", file=self.stream, flush=True)


def duration(seconds: float) -> str:
    """Write seconds in their two largest units: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
