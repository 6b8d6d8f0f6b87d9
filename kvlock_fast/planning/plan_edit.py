"""The front door to the planner: what an edit locks and stores, computed from its configs, and the plan of that."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from kvlock_fast.cache.saved_source import SavedSource
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.locking.arch import select_layers
from kvlock_fast.loop.foreground import sparse_steps
from kvlock_fast.loop.schedule import asks_source, in_interval, skipped_steps
from kvlock_fast.loop.stored_source import steps_to_store
from kvlock_fast.planning.extent import Extent
from kvlock_fast.planning.job import Job
from kvlock_fast.planning.machine import Machine
from kvlock_fast.planning.planner import TIERS, Plan, plan


@dataclass(frozen=True)
class Edits:
    """Edits of a source.

    lock, cache: the configs; steps: denoising steps asked for, those left out among them; foreground: tokens that may
    change; guided: whether a forward has two branches; prompts: edits made together; edits: how often, with the same
    cache.
    """

    lock: LockConfig
    cache: CacheConfig
    steps: int
    foreground: int
    guided: bool
    prompts: int = 1
    edits: int = 1


def plan_edit(
    extent: Extent,
    asked: Edits,
    machine: Machine,
    *,
    formats: tuple[str, ...] | None = None,
    dtype: torch.dtype | None = None,
    encoders: bool = True,
    stage: Callable[[int], int] = lambda step: 0,
    saved: SavedSource | None = None,
) -> Plan:
    """Plan an edit on a machine: every tier and format that its cache config allows.

    Args:
        extent: the model's sizes, and the clip as the model takes it.
        asked: how the source is edited.
        machine: the memory there is, in bytes.
        formats: cache formats to consider, by default the config's own.
        dtype: of the weights, by default the model's own.
        encoders: whether text encoders and autoencoder stay on the device.
        stage: which of a model's transformers serves a step. It needs the scheduler, and moves the number of stored
            steps by one at most.
        saved: a cache made earlier, which has its own steps, tokens and format and is always read.

    Raises:
        InputError: layers that the model does not have.
        ValueError: an unknown format, or numbers that cannot be.
    """
    lock, cache, model = asked.lock, asked.cache, extent.model
    steps = asked.steps - skipped_steps(lock, asked.steps)
    slots = steps_to_store(lock, cache, steps, stage)
    locked = len(steps_to_store(lock, replace(cache, steps="all", step_stride=1), steps, stage))
    background = extent.tokens if lock.foreground_mix else extent.tokens - asked.foreground
    tiers = TIERS if cache.tier == "auto" else tuple(dict.fromkeys(("lockstep", cache.tier)))
    formats = formats or (cache.format,)
    if saved is not None:
        slots, background, formats = saved.slots, len(saved.background), (saved.layout.format,)
        tiers = tuple(tier for tier in tiers if tier != "lockstep")
    job = Job(
        model,
        extent.frames,
        extent.height,
        extent.width,
        background,
        len(set(slots.values())),
        steps,
        prompts=min(asked.prompts, cache.prompts_at_once or asked.prompts),
        guided=asked.guided,
        edits=asked.edits,
        steps_locked=max(locked, len(slots)),
        steps_along=max(0, locked - len(slots)),
        layers=select_layers(model.layers, lock.layers),
        dtype=dtype or model.dtype,
        variance_window=max(2, min(lock.variance_window, steps)),
        encoders_on_device=encoders,
        steps_guided=sum(in_interval(lock.guidance_interval, steps, k) for k in range(steps)),
        # Where every token may change, a pass computes in full.
        sparse_steps=sparse_steps(lock, steps) if asked.foreground < extent.tokens else None,
        steps_predicted=steps if asks_source(lock) else 0,
    )
    return plan(job, machine, formats, tiers)
