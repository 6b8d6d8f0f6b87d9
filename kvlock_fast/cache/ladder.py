"""What to try next when memory runs out in spite of the plan."""

from dataclasses import dataclass, replace
from math import ceil

from kvlock_fast.cache.planner import Plan, Row, make_row

MOST_RUNGS = 5
SMALLER = {"native": ("fp8_e4m3", "int4"), "bf16": ("fp8_e4m3", "int4"), "fp8_e4m3": ("int4",), "int8": ("int4",)}
LOWER = {"lockstep": ("host", "disk"), "resident": ("host", "disk", "lockstep"), "host": ("disk", "lockstep")}


@dataclass(frozen=True)
class Rung:
    """How to run next. format: None in lockstep; prompts: in one forward; reason: a sentence to tell the user."""

    tier: str
    format: str | None
    prompts: int
    tiled_decoding: bool
    reason: str


def ladder(plan: Plan, tier: str, format: str | None, prompts: int) -> list[Rung]:
    """At most 5 rungs, each with less on the device than the one before: a smaller format, the next tier (in the
    format that was asked for), fewer prompts at once; at last the video decoded in tiles.

    Rungs that the host's memory or the disk cannot hold are left out.
    """
    rungs = [Rung(tier, format, prompts, False, "")]
    kept = format or "fp8_e4m3"
    candidates = [(tier, smaller, f"store as {smaller}") for smaller in SMALLER.get(format, ())]
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
    """If it takes less of the device than the last, and what it takes elsewhere is there."""
    before, after = (make_row(plan.job, plan.machine, r.tier, r.format, r.prompts) for r in (rungs[-1], rung))
    device = "host" if plan.machine.gpu_bytes is None else "GPU"
    if _on(device, after) < _on(device, before) and set(after.short) <= {device}:
        rungs.append(rung)


def _on(device: str, row: Row) -> int:
    return row.needed.gpu if device == "GPU" else row.needed.host
