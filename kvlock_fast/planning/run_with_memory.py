"""Room for an edit: which tier a call takes, and what is tried when memory runs out in spite of the plan."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from kvlock_fast.config import CacheConfig
from kvlock_fast.errors import InputError, warn
from kvlock_fast.files import user_cache_folder
from kvlock_fast.locking.lock import kv_sizes
from kvlock_fast.loop.graph import CapturedLoops
from kvlock_fast.loop.task import Task
from kvlock_fast.planning.extent import Extent
from kvlock_fast.planning.find_model import from_model
from kvlock_fast.planning.machine import Machine
from kvlock_fast.planning.plan_edit import Edits, plan_edit
from kvlock_fast.planning.planner import Plan, Rung, ladder
from kvlock_fast.planning.render import render
from kvlock_fast.scene import Scene

Result = TypeVar("Result")


@dataclass(frozen=True)
class Way:
    """A way to run a call: the cache's config with its tier decided, and whether to decode in tiles."""

    cache: CacheConfig
    tiled_decoding: bool = False


def run_with_memory(run: Callable[[Way], Result], scene: Scene, task: Task, cache: CacheConfig) -> Result:
    """Call `run` in the way that the planner chooses, and in smaller ones while memory runs out.

    Args:
        run: does the edit in a way that it is given.
        scene: the source as the model takes it.
        task: what the edit's forwards are given.
        cache: the config that was asked for.
    """
    cache = _what_layers_allow(scene, cache)
    planned = _plan(scene, task, cache)
    way = _first_way(planned, scene, cache)

    def rungs() -> list[Rung]:
        format = way.cache.format if scene.saved is None else scene.saved.layout.format
        prompts = way.cache.prompts_at_once or task.batch
        below = _unplanned(way, prompts) if planned is None else ladder(planned, way.cache.tier, format, prompts)
        # A cache that is there has its format, and is to be read.
        return [r for r in below if scene.saved is None or (r.format == format and r.tier != "lockstep")]

    return _downwards(way, rungs, run, scene)


def _what_layers_allow(scene: Scene, cache: CacheConfig) -> CacheConfig:
    """Lockstep, with a warning, where a cache is asked for that layers of several sizes cannot have."""
    if cache.tier in ("auto", "lockstep") or scene.saved is not None or not scene.lock.locks:
        return cache
    try:
        for transformer in scene.model.transformers:
            kv_sizes(transformer, scene.model.arch)
    except InputError as error:
        warn(f"{error}: the source is run along instead")
        return replace(cache, tier="lockstep")
    return cache


def _plan(scene: Scene, task: Task, cache: CacheConfig) -> Plan | None:
    """The plan of a call on this machine, for the tier that was asked for, or for all; None where there is none."""
    if scene.windows is not None:  # a clip in stretches is made for little memory, and not planned
        return None
    try:
        model = from_model(scene.model)
    except InputError:
        return None
    frames, height, width = scene.frames.shape[:3]
    machine = Machine.here(scene.mask.tokens.device, cache.root or user_cache_folder())
    if cache.tier == "disk":  # there may be an entry already; if not, a full disk shows when it is written
        machine = replace(machine, disk_bytes=sys.maxsize)
    asked = Edits(
        scene.lock,
        cache,
        scene.solver.num_steps + scene.solver.skip,
        int(scene.mask.tokens.sum()),
        guided=task.negative is not None,
        prompts=task.batch,
    )
    return plan_edit(Extent(model, frames, height, width), asked, machine, stage=scene.stage, saved=scene.saved)


def _first_way(planned: Plan | None, scene: Scene, cache: CacheConfig) -> Way:
    """The tier and the prompts at once that fit best.

    Raises InputError with the plan's table where nothing fits the host's memory, which nobody can hand back; what
    does not fit a GPU by the plan is tried all the same.
    """
    smallest = "disk" if scene.saved is not None else "lockstep"
    if planned is None:
        return Way(replace(cache, tier=smallest) if cache.tier == "auto" else cache)
    choice = planned.choice
    asked = planned.fitting(cache.tier)
    if asked is not None:
        return Way(replace(cache, prompts_at_once=asked.prompts))
    if choice.tier is not None:
        tier = _tier_of_saved(planned, cache) if scene.saved is not None else choice.tier
        if cache.tier not in ("auto", tier):
            warn(f"there is too little memory for the tier {cache.tier}: the source is run along instead")
        return Way(replace(cache, tier=tier, prompts_at_once=choice.prompts))
    if planned.machine.gpu_bytes is None and scene.saved is None:
        table = render(planned)
        raise InputError(f"there is too little memory:\n{table}\nthere is too little memory: {choice.reason}")
    return Way(replace(cache, tier=smallest if cache.tier == "auto" else cache.tier, prompts_at_once=1))


def _tier_of_saved(planned: Plan, cache: CacheConfig) -> str:
    """Where a cache's files are read to: the fastest place with room, but no copy in memory where models run in it."""
    if cache.tier != "auto":
        return cache.tier
    if planned.machine.gpu_bytes is None:
        return "disk"
    fitting = [row.tier for row in planned.rows if not set(row.short) - {"disk"}]
    return next((tier for tier in ("resident", "host") if tier in fitting), "disk")


def _unplanned(way: Way, prompts: int) -> list[Rung]:
    """Rungs of a clip in stretches, or of a model whose sizes are not known."""
    along = Rung("lockstep", None, prompts, False, "running the source along")
    alone = replace(along, prompts=1, reason="running the source along, one prompt at a time")
    return [along] * (way.cache.tier in ("resident", "host")) + [alone] * (prompts > 1)


def _downwards(way: Way, rungs: Callable[[], list[Rung]], run: Callable[[Way], Result], scene: Scene) -> Result:
    """`run` by way, then by the ladder's rungs while memory runs out; each is said in a warning.

    Raises InputError when the last one fails.
    """
    for attempt in _attempts(way, rungs, scene.kept_loops):
        try:
            return run(attempt)
        except torch.OutOfMemoryError:
            pass  # what it held is free once the handler is left
    raise InputError("there is too little memory on the device: use a smaller size or fewer frames")


def _attempts(way: Way, rungs: Callable[[], list[Rung]], kept: CapturedLoops | None) -> Iterator[Way]:
    """The way itself, once more without the captured steps of earlier calls, then smaller ways."""
    yield way
    if kept is not None and kept.loops:
        kept.clear()
        _free()
        yield way
    for rung in rungs():
        if kept is not None:
            kept.clear()
        _free()
        warn(f"memory ran out: {rung.reason}")
        changes: dict[str, Any] = {"tier": rung.tier, "prompts_at_once": rung.prompts}
        if way.cache.path is None and rung.format is not None:  # a cache that is there has its own
            changes["format"] = rung.format
        way = Way(replace(way.cache, **changes), rung.tiled_decoding)
        yield way


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
