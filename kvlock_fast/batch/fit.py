"""How a pass fits a machine: the planner asked for a group of jobs, before or after the model is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvlock_fast.batch.jobs import Decision, Setup
from kvlock_fast.errors import InputError


@dataclass(frozen=True)
class Extent:
    """A clip as the model takes it."""

    frames: int
    height: int
    width: int

    @classmethod
    def of(cls, given: tuple[int, int, int], size: tuple[int, int] | None, setup: Setup, model: Any) -> Extent:
        """given: frames, height, width of the files; size: to work at; model: a `ModelSize`.

        Raises InputError where the frames policy refuses, or the model's position codes end.
        """
        from kvlock_fast.loop.inputs import nearest_size, refuse_frames
        from kvlock_fast.media import fit_frames

        geometry = model.geometry
        refuse_frames(geometry, given[0])
        frames = len(fit_frames(np.empty(given[0], np.bool_), setup.frames_policy, *geometry.frame_rule)[0])
        height, width = nearest_size(geometry, *(size or given[1:]))
        at_once = min(frames, setup.clip_frames or frames)
        if not geometry.knows(at_once, height, width):
            raise InputError(
                f"{at_once} frames of {height}x{width} are too many for this model: it takes at most "
                f"{geometry.limits_text}"
            )
        return cls(frames, height, width)


def foreground_tokens(mask: np.ndarray, extent: Extent, setup: Setup, model: Any) -> int:
    """Of a mask bool [F, H, W] that lies on the source. Raises InputError for one that leaves nothing to edit."""
    import torch

    from kvlock_fast.masks import project_mask
    from kvlock_fast.media import fit_frames, resize_mask

    mask = resize_mask(mask, extent.height, extent.width)
    mask, _ = fit_frames(mask, setup.frames_policy, *model.geometry.frame_rule)
    tokens = int(project_mask(torch.from_numpy(np.ascontiguousarray(mask)), model.geometry).tokens.sum())
    if tokens == 0:
        raise InputError(f"is empty on the {len(mask)} frames that frames_policy={setup.frames_policy!r} keeps")
    return tokens


def decide(setup: Setup, model: Any, extent: Extent, foreground: int, prompts: int, machine: Any) -> Decision:
    """Tier, format and prompts at once for so many prompts of one setup.

    Raises InputError saying what is short where nothing fits a machine without a GPU; on a GPU the plan may be too
    careful, and one prompt at a time is tried. A clip in stretches is made for little memory, and not planned.
    """
    if setup.clip_frames is not None:
        tier = "lockstep" if setup.cache.tier == "auto" else setup.cache.tier
        return Decision(tier, setup.cache.format, min(prompts, setup.cache.prompts_at_once or prompts))
    planned = plan_pass(setup, model, extent, foreground, prompts, machine)
    choice = planned.choice
    if choice.tier is None:
        if planned.machine.gpu_bytes is None:
            raise InputError(f"there is too little memory: {choice.reason}")
        return Decision("lockstep", setup.cache.format, 1)
    asked = next((row for row in planned.rows if row.tier == setup.cache.tier and row.fits), None)
    if asked is not None:
        return Decision(asked.tier, setup.cache.format, asked.prompts)
    return Decision(choice.tier, choice.format or setup.cache.format, choice.prompts)


def plan_pass(setup: Setup, model: Any, extent: Extent, foreground: int, prompts: int, machine: Any) -> Any:
    """The `Plan` of so many prompts of one setup."""
    from kvlock_fast.locking.arch import select_layers
    from kvlock_fast.loop.foreground import sparse_steps
    from kvlock_fast.loop.stored_source import steps_to_store
    from kvlock_fast.planning.planner import TIERS, plan

    lock, cache, steps = setup.lock, setup.cache, max(1, setup.steps - setup.lock.skip_steps)
    # Which of two transformers a step takes is not known without the scheduler; it moves the count by one at most.
    stage: Callable[[int], int] = lambda k: 0  # noqa: E731
    slots = steps_to_store(lock, cache, steps, stage)
    locked = len(steps_to_store(lock, replace(cache, steps="all", step_stride=1), steps, stage))
    tokens = int(np.prod(model.geometry.token_grid(extent.frames, extent.height, extent.width)))
    return plan(
        model,
        extent.frames,
        extent.height,
        extent.width,
        tokens if lock.foreground_mix else tokens - foreground,
        len(set(slots.values())),
        steps,
        steps_locked=locked,
        steps_along=max(0, locked - len(slots)),
        machine=machine,
        formats=(cache.format,),
        tiers=TIERS if cache.tier == "auto" else tuple(dict.fromkeys(("lockstep", cache.tier))),
        prompts=min(prompts, cache.prompts_at_once or prompts),
        guided=setup.guidance > 1 and model.two_branches,
        layers=select_layers(model.layers, lock.layers),
        variance_window=max(2, min(lock.variance_window, steps)),
        # Where every token may change, a pass computes in full.
        sparse_steps=sparse_steps(lock, steps) if foreground < tokens else None,
    )
