"""What fits, how fast it can be, and what to choose: arithmetic before anything runs.

Bytes are those of job.py, seconds the floors of costs.py. How the choice falls: of the stored tiers that fit in fp8,
the fastest over all prompts and edits, if it beats lockstep by more than 1 %. One prompt edited once never does: the
source runs once either way. Another format only where fp8 fits in no stored tier; else lockstep.
`ladder` says what to try next when memory runs out in spite of the plan.
"""

from dataclasses import dataclass, replace
from math import ceil

from kvlock_fast.config import TIERS
from kvlock_fast.kernels.quantize import FORMATS
from kvlock_fast.planning import costs
from kvlock_fast.planning.job import Bytes, Job
from kvlock_fast.planning.machine import Machine
from kvlock_fast.units import text_bytes, text_seconds

MOST_RUNGS = 5
SMALLER = {"native": ("fp8_e4m3", "int4"), "bf16": ("fp8_e4m3", "int4"), "fp8_e4m3": ("int4",), "int8": ("int4",)}
LOWER = {"lockstep": ("host", "disk"), "resident": ("host", "disk", "lockstep"), "host": ("disk", "lockstep")}
PREFERENCE = ("fp8_e4m3", "int8", "int4", "native", "bf16")
"""Formats in the order they are considered: the smaller ones of fp8 before the larger."""
WORTH = 1.01
"""How many times faster than lockstep a tier must be before anything is stored."""


@dataclass(frozen=True)
class Row:
    """A way to run the job: what it needs and what it takes.

    format: None in lockstep; prompts: in one forward, the most that fit (1 where none does); rows: videos in the
    forward of a locked step; short: what is too small, of "GPU", "host", "disk"; transfer, compute, exposed: of one
    locked step; source_seconds: the source's pass before the first edit; seconds: of everything.
    """

    tier: str
    format: str | None
    prompts: int
    rows: int
    needed: Bytes
    short: tuple[str, ...]
    transfer_seconds: float
    compute_seconds: float
    exposed_seconds: float
    source_seconds: float
    seconds: float

    @property
    def fits(self) -> bool:
        return not self.short

    @property
    def label(self) -> str:
        """Name like "host fp8_e4m3"."""
        return self.tier if self.format is None else f"{self.tier} {self.format}"


@dataclass(frozen=True)
class Choice:
    """The way that was chosen, and why. tier: None where nothing fits; format: None there and in lockstep."""

    tier: str | None
    format: str | None
    prompts: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """Every way to run a job, and the choice. rows: lockstep first, then each tier by format."""

    job: Job
    machine: Machine
    rows: tuple[Row, ...]
    choice: Choice

    def row(self, tier: str, format: str | None = None) -> Row | None:
        """Return the row of a tier and format, None where it was not asked for."""
        return next((row for row in self.rows if (row.tier, row.format) == (tier, format)), None)

    def fitting(self, tier: str) -> Row | None:
        """Return the first row of a tier that fits, None where none does."""
        return next((row for row in self.rows if row.tier == tier and row.fits), None)


def plan(job: Job, machine: Machine, formats: tuple[str, ...] = FORMATS, tiers: tuple[str, ...] = TIERS) -> Plan:
    """Work out every way to run a job on a machine, and choose one. `plan_edit` makes the job from configs.

    Args:
        job: what is to be run.
        machine: the memory there is, in bytes.
        formats: cache formats to consider.
        tiers: tiers to consider.

    Raises:
        ValueError: an unknown tier or format.
    """
    for name, given, known in (("formats", formats, FORMATS), ("tiers", tiers, TIERS)):
        if not given or not set(given) <= set(known):
            raise ValueError(f"{name} must be some of {', '.join(known)}, got {given!r}")
    pairs: list[tuple[str, str | None]] = [("lockstep", None)] if "lockstep" in tiers else []
    pairs += [(tier, format) for tier in TIERS[1:] if tier in tiers for format in FORMATS if format in formats]
    rows = tuple(_row_of_most_prompts(job, machine, tier, format) for tier, format in pairs)
    return Plan(job, machine, rows, choose(job, rows, machine))


def _row_of_most_prompts(job: Job, machine: Machine, tier: str, format: str | None) -> Row:
    """The row of a way, with as many prompts in a forward as fit."""
    gpu = machine.gpu_bytes is not None
    fitting = (n for n in range(job.prompts, 0, -1) if not short_of(job.needed(tier, format, n, gpu), machine))
    return _make_row(job, machine, tier, format, next(fitting, 1))


def _make_row(job: Job, machine: Machine, tier: str, format: str | None, prompts: int) -> Row:
    """The row of a way, with so many prompts in a forward."""
    needed = job.needed(tier, format, prompts, gpu=machine.gpu_bytes is not None)
    lockstep, forward = tier == "lockstep", job.forward_seconds
    rows = job.rows(prompts, lockstep)
    arena = 0 if format is None else job.layout(format).nbytes
    transfer = costs.transfer_seconds(tier, arena)
    compute = rows * forward + costs.lock_seconds(arena, rows)
    along = 0 if lockstep else job.steps_along
    read = job.locked - along
    # An arena crosses the link once for all the steps that share it.
    exposed = max(0.0, transfer * job.steps_stored - compute * read) / read if read else 0.0
    unlocked = job.rows(prompts, lockstep and job.steps_predicted > 0)
    others = along * job.rows(prompts, True) + (job.num_steps - job.locked) * unlocked
    others -= job.steps_alone * prompts  # whose other branch is not run
    stored = job.steps_stored * max(forward, transfer) + (job.source_forwards - job.steps_stored) * forward
    source = 0.0 if lockstep else stored
    seconds = source + _uses(job, prompts) * (read * (compute + exposed) + others * forward)
    short = short_of(needed, machine)
    return Row(tier, format, prompts, rows, needed, short, transfer, compute, exposed, source, seconds)


def _uses(job: Job, prompts: int) -> int:
    """Number of passes over the source's keys and values, with so many prompts in a forward."""
    return job.edits * ceil(job.prompts / prompts)


def _places(needed: Bytes, machine: Machine) -> tuple[tuple[str, str, int, int], ...]:
    """Name and words of each place, with the bytes needed and there."""
    return (
        ("GPU", "on the GPU", needed.gpu, machine.gpu_bytes or 0),
        ("host", "of memory", needed.host, machine.host_bytes),
        ("disk", "on disk", needed.disk, machine.disk_bytes),
    )


def short_of(needed: Bytes, machine: Machine) -> tuple[str, ...]:
    """Names of the places that are too small, of "GPU", "host" and "disk"."""
    return tuple(name for name, _, need, there in _places(needed, machine) if need > there)


def choose(job: Job, rows: tuple[Row, ...], machine: Machine) -> Choice:
    """Choose a row by the rule at the top of this file."""
    fitting = [row for row in rows if row.fits]
    if not fitting:
        return Choice(None, None, 0, _why_nothing(machine, rows))
    lockstep = next((row for row in fitting if row.tier == "lockstep"), None)
    if lockstep is not None and (job.locked == 0 or job.background_tokens == 0):
        nothing = "step is locked" if job.locked == 0 else "token is background"
        return Choice("lockstep", None, lockstep.prompts, f"no {nothing}, so there is nothing to store")
    by_format = ([row for row in fitting if row.format == format] for format in PREFERENCE)
    best = min(next(filter(None, by_format), []), key=lambda row: row.seconds, default=None)
    if lockstep is not None and (best is None or lockstep.seconds <= WORTH * best.seconds):
        return Choice("lockstep", None, lockstep.prompts, _why_lockstep(job, rows, lockstep, best))
    assert best is not None
    return Choice(best.tier, best.format, best.prompts, _why_stored(job, rows, lockstep, best))


def _why_lockstep(job: Job, rows: tuple[Row, ...], lockstep: Row, best: Row | None) -> str:
    if _uses(job, lockstep.prompts) == 1:
        return "the source is needed once, so storing its keys and values would save no forward"
    if best is None:
        return f"{'no stored tier fits' if len(rows) > 1 else 'nothing else was asked for'}: the source runs along"
    seconds = text_seconds(lockstep.seconds), text_seconds(best.seconds)
    return f"running the source along takes {seconds[0]} in all, the fastest that fits ({best.label}) {seconds[1]}"


def _why_stored(job: Job, rows: tuple[Row, ...], lockstep: Row | None, best: Row) -> str:
    why = "the fastest that fits"
    if best.format != PREFERENCE[0] and any(row.format == PREFERENCE[0] for row in rows):
        why = f"{PREFERENCE[0]} fits in no stored tier, and of {best.format} this is {why}"
    if lockstep is not None:
        gain = lockstep.seconds / best.seconds
        why += f": {job.edits * job.prompts} edits of one source take {gain:.2f}x less time than in lockstep"
    elif any(row.tier == "lockstep" for row in rows):
        why += "; lockstep, with one more video in a forward, does not fit"
    if best.exposed_seconds:
        return f"{why}, though each step waits {text_seconds(best.exposed_seconds)} for its transfer"
    return f"{why}, and transfers hide under compute" if best.transfer_seconds else why


def _why_nothing(machine: Machine, rows: tuple[Row, ...]) -> str:
    least = min(rows, key=lambda row: (len(row.short), row.needed.gpu + row.needed.host + row.needed.disk))
    places = [
        f"{text_bytes(need)} {what}, where {text_bytes(there)} are free"
        for name, what, need, there in _places(least.needed, machine)
        if name in least.short
    ]
    return f"nothing fits: {least.label}, which comes nearest, needs {' and '.join(places)}"


@dataclass(frozen=True)
class Rung:
    """A smaller way to run. format: None in lockstep; prompts: in one forward; reason: a sentence to tell the user."""

    tier: str
    format: str | None
    prompts: int
    tiled_decoding: bool
    reason: str


def ladder(plan: Plan, tier: str, format: str | None, prompts: int) -> list[Rung]:
    """List at most 5 rungs, each with less on the device than the one before.

    In turn: a smaller format, the next tier (in the format that was asked for), fewer prompts at once; at last the
    video decoded in tiles. Rungs that the host's memory or the disk cannot hold are left out.

    Args:
        plan: the plan of the run.
        tier: the tier that was too large.
        format: its format, None in lockstep.
        prompts: its prompts in a forward.
    """
    rungs = [Rung(tier, format, prompts, False, "")]
    kept = format or "fp8_e4m3"
    candidates: list[tuple[str, str | None, str]] = [
        (tier, smaller, f"store as {smaller}") for smaller in SMALLER.get(format or "", ())
    ]
    for lower in LOWER.get(tier, ()):
        what = "run the source along" if lower == "lockstep" else f"keep the cache in the tier {lower} as {kept}"
        candidates.append((lower, None if lower == "lockstep" else kept, what))
    for next_tier, next_format, reason in candidates:
        _append(plan, rungs, Rung(next_tier, next_format, prompts, False, f"{reason} and try again"))
    for fewer in dict.fromkeys((ceil(prompts / 2), 1)):
        at_once = f"edit {fewer} prompt{'s' * (fewer > 1)} at once instead of {prompts} and try again"
        _append(plan, rungs, replace(rungs[-1], prompts=fewer, reason=at_once))
    rungs = rungs[:MOST_RUNGS]
    tiled = replace(rungs[-1], tiled_decoding=True, reason="decode the video in tiles and try again")
    return [*rungs[1:], tiled]


def _append(plan: Plan, rungs: list[Rung], rung: Rung) -> None:
    """Append a rung if it takes less of the device than the last, and what it takes elsewhere is there."""
    before, after = (_make_row(plan.job, plan.machine, r.tier, r.format, r.prompts) for r in (rungs[-1], rung))
    device, name = ("host", "host") if plan.machine.gpu_bytes is None else ("GPU", "gpu")
    if getattr(after.needed, name) < getattr(before.needed, name) and set(after.short) <= {device}:
        rungs.append(rung)
