"""`kvlock-fast plan` from arguments to a plan: which model, how many tokens and steps, what machine."""

from pathlib import Path

import numpy as np
import torch

from kvlock_fast.config import CacheConfig
from kvlock_fast.errors import InputError
from kvlock_fast.kernels.quantize import FORMATS
from kvlock_fast.media import fit_mask, read_mask
from kvlock_fast.planning.extent import Extent, find_extent
from kvlock_fast.planning.find_model import find_model
from kvlock_fast.planning.machine import Machine
from kvlock_fast.planning.plan_edit import Edits, plan_edit
from kvlock_fast.planning.planner import Plan
from kvlock_fast.settings import PlanSettings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_SHARE = 0.2


def make_plan(settings: PlanSettings) -> Plan:
    """Plan what the command asks for; warns where the video is changed to fit the model.

    Raises InputError naming the argument that is wrong.
    """
    _check(settings)
    model = find_model(settings.model)
    mask = _read_mask(settings.mask)
    frames = len(mask) if settings.frames is None and mask is not None and len(mask) > 1 else settings.frames
    extent = find_extent(model, frames, settings.size, "planning for")
    asked = Edits(
        settings.lock,
        CacheConfig(step_stride=settings.step_stride, steps=settings.cache_steps),
        settings.steps,
        _foreground(settings, mask, extent, frames or model.frames),
        guided=settings.guidance > 1 and model.two_branches,
        prompts=settings.prompts,
        edits=settings.edits,
    )
    return plan_edit(
        extent, asked, _machine(settings), formats=settings.formats or FORMATS, dtype=DTYPES.get(settings.dtype)
    )


def _check(settings: PlanSettings) -> None:
    if settings.mask_share is not None and settings.mask is not None:
        raise InputError("--mask-share and --mask say the same: give one of them")
    for format in settings.formats:
        if format not in FORMATS:
            raise InputError(f"--format must be one of {', '.join(FORMATS)}, got '{format}'")


def _read_mask(path: str | None) -> np.ndarray | None:
    if path is None:
        return None
    if not path:
        raise InputError("--mask is empty")
    mask = read_mask(path)
    if not mask.any():
        raise InputError(f"the mask '{path}' is empty: no pixel is marked as foreground")
    return mask


def _foreground(settings: PlanSettings, mask: np.ndarray | None, extent: Extent, frames: int) -> int:
    """Number of foreground tokens, by share or of a mask [F, H, W], which is fitted to so many frames as by `edit`."""
    if mask is None:
        share = DEFAULT_SHARE if settings.mask_share is None else settings.mask_share
        return max(1, round(share * extent.tokens))
    try:
        mask = fit_mask(mask, frames, extent.height, extent.width)
    except InputError as error:
        place = f"{frames} frames of {extent.height}x{extent.width}"
        raise InputError(f"the mask '{settings.mask}' does not fit {place}: {error}") from error
    return extent.foreground(mask, "pad")


def _machine(settings: PlanSettings) -> Machine:
    """This machine, or another as far as its memory was given."""
    gpu, host, disk = settings.gpu_memory, settings.host_memory, settings.disk
    if gpu is not None and host is not None and disk is not None:
        return Machine(gpu, host, disk)
    here = Machine.here(disk_path=Path.cwd())
    return Machine(
        here.gpu_bytes if gpu is None else gpu,
        here.host_bytes if host is None else host,
        here.disk_bytes if disk is None else disk,
    )
