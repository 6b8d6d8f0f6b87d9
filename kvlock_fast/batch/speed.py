"""What changes how fast every edit of a batch is, and not what is asked for: CUDA graphs, torch.compile, attention."""

from dataclasses import dataclass

from kvlock_fast.batch.jobs import Setup
from kvlock_fast.batch.manifest import Reading
from kvlock_fast.errors import InputError


@dataclass(frozen=True)
class Speed:
    """graph, compile, processors: as `EditSettings` has them."""

    graph: str = "off"
    compile: str = "off"
    processors: str = "auto"


def check_speed(speed: Speed) -> None:
    """Raise InputError for a word that is none of --graph, --compile or --processors."""
    from kvlock_fast.graph import GRAPH
    from kvlock_fast.models.compiling import COMPILE
    from kvlock_fast.models.fast import PROCESSORS

    words = ("--graph", speed.graph, GRAPH), ("--compile", speed.compile, COMPILE)
    for option, value, known in (*words, ("--processors", speed.processors, PROCESSORS)):
        if value not in known:
            raise InputError(f"{option} must be one of {', '.join(known)}, got '{value}'")


def enter_uncaptured(reading: Reading) -> None:
    """Enter the jobs whose steps no graph can hold, as far as that shows without the model: for --graph on."""
    for job in reading.jobs:
        why = _why_not_captured(job.setup)
        if why is not None:
            name, reason = why
            reading.wrong(job.line, name, f"{reason}, which --graph on cannot capture")


def _why_not_captured(setup: Setup) -> tuple[str, str] | None:
    """A field and what it brings; as `denoise.why_not_captured`, which knows the model too."""
    from kvlock_fast.controller import compares_with_source

    if setup.clip_window is not None:
        return "clip_window", f"{setup.clip_window} has the clip go through the model in stretches"
    if setup.lock.stock:
        return "preset", "with nothing locked or guided the edit takes the scheduler's own steps"
    if compares_with_source(setup.lock):
        return "tau", "'auto' counts the source's predictions on the host"
    return None
