"""How a pass fits a machine: the planner asked for a group of jobs, before or after the model is there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvlock_fast.batch.jobs import Decision, Setup
from kvlock_fast.errors import InputError

if TYPE_CHECKING:
    from kvlock_fast.planning.extent import Extent
    from kvlock_fast.planning.machine import Machine
    from kvlock_fast.planning.model_size import ModelSize


def fit_extent(given: tuple[int, int, int], size: tuple[int, int] | None, setup: Setup, model: ModelSize) -> Extent:
    """Fit a clip to a model as an edit of the setup does.

    Args:
        given: frames, height and width of the files.
        size: height and width to work at, None for the files' own.
        setup: the job's setup.
        model: the sizes of the model.

    Raises:
        InputError: the frames policy refuses, or the model's position codes end.
    """
    from kvlock_fast.loop.inputs import nearest_size, refuse_frames
    from kvlock_fast.media import fit_frames
    from kvlock_fast.planning.extent import Extent

    refuse_frames(model.geometry, given[0])
    frames = len(fit_frames(np.empty(given[0], np.bool_), setup.frames_policy, *model.geometry.frame_rule)[0])
    extent = Extent(model, frames, *nearest_size(model.geometry, *(size or given[1:])))
    replace(extent, frames=min(frames, setup.clip_frames or frames)).refuse_beyond("this model")
    return extent


def foreground_tokens(mask: np.ndarray, extent: Extent, setup: Setup) -> int:
    """Count the tokens of a mask bool [F, H, W] on the source. Raises InputError for one that leaves none to edit."""
    tokens = extent.foreground(mask, setup.frames_policy)
    if tokens == 0:
        kept = f"{extent.frames} frames that frames_policy={setup.frames_policy!r} keeps"
        raise InputError(f"is empty on the {kept}")
    return tokens


def decide(setup: Setup, extent: Extent, foreground: int, prompts: int, machine: Machine) -> Decision:
    """Decide on tier, format and prompts at once. A clip in stretches is made for little memory, and not planned.

    Args:
        setup: what the jobs share.
        extent: the clip as the model takes it.
        foreground: tokens that may change.
        prompts: how many jobs there are.
        machine: the memory there is.

    Raises:
        InputError: nothing fits a machine without a GPU, with what is short. On a GPU the plan may be too careful, and
            one prompt at a time is tried.
    """
    from kvlock_fast.planning.plan_edit import Edits, plan_edit

    cache = setup.cache
    if setup.clip_frames is not None:
        tier = "lockstep" if cache.tier == "auto" else cache.tier
        return Decision(tier, cache.format, min(prompts, cache.prompts_at_once or prompts))
    guided = setup.guidance > 1 and extent.model.two_branches
    planned = plan_edit(extent, Edits(setup.lock, cache, setup.steps, foreground, guided, prompts), machine)
    choice, asked = planned.choice, planned.fitting(cache.tier)
    if choice.tier is None:
        if planned.machine.gpu_bytes is None:
            raise InputError(f"there is too little memory: {choice.reason}")
        return Decision("lockstep", cache.format, 1)
    if asked is not None:
        return Decision(asked.tier, cache.format, asked.prompts)
    return Decision(choice.tier, choice.format or cache.format, choice.prompts)
