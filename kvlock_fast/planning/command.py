"""`kvlock-fast plan` from arguments to a plan: which model, how many tokens and steps, what machine."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvlock_fast.config import LockConfig
from kvlock_fast.errors import InputError, warn
from kvlock_fast.kernels.quantize import FORMATS
from kvlock_fast.locking.arch import select_layers
from kvlock_fast.loop.foreground import sparse_steps
from kvlock_fast.loop.inputs import MOST_STEPS, nearest_size, refuse_frames
from kvlock_fast.loop.schedule import can_lock, first_dynamic_step
from kvlock_fast.masks import project_mask
from kvlock_fast.media import fit_frames, fit_mask, read_mask
from kvlock_fast.planning.find_model import find_model
from kvlock_fast.planning.machine import Machine
from kvlock_fast.planning.model_size import ModelSize
from kvlock_fast.planning.planner import Plan, plan
from kvlock_fast.renamed import CACHE_STEPS
from kvlock_fast.units import parse_bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_SHARE = 0.2
MOST_FRAMES = 100_000
MOST_PROMPTS = 10_000


@dataclass(frozen=True)
class PlanSettings:
    """What is asked. model: a known name, a config file or a folder; frames, size: None for the model's own; mask: a
    file, instead of mask_share; step_stride, cache_steps: as in `CacheConfig`; formats: none for all; memory: GPU, host
    and disk as text, None for this machine's.
    """

    model: str
    frames: int | None = None
    size: tuple[int, int] | None = None
    mask_share: float | None = None
    mask: str | None = None
    steps: int = 50
    lock: LockConfig = field(default_factory=LockConfig)
    prompts: int = 1
    edits: int = 1
    guidance: float = 5.0
    step_stride: int = 1
    cache_steps: str = "all"
    dtype: str = "auto"
    formats: tuple[str, ...] = ()
    memory: tuple[str | None, str | None, str | None] = (None, None, None)


def make_plan(settings: PlanSettings) -> Plan:
    """Raises InputError naming the argument that is wrong; warns where the video is changed to fit the model."""
    _check_numbers(settings)
    model = find_model(settings.model)
    frames, height, width, background = _video(settings, model)
    locked, kept = _steps(settings)
    if settings.dtype not in ("auto", *DTYPES):
        raise InputError(f"dtype '{settings.dtype}' is not one of {', '.join(DTYPES)}, auto")
    return plan(
        model,
        frames,
        height,
        width,
        background,
        math.ceil(kept / settings.step_stride),
        _taken(settings),
        steps_locked=locked,
        steps_along=locked - kept,
        machine=_machine(settings),
        formats=settings.formats or FORMATS,
        dtype=DTYPES.get(settings.dtype),
        prompts=settings.prompts,
        edits=settings.edits,
        guided=settings.guidance > 1 and model.two_branches,
        layers=select_layers(model.layers, settings.lock.layers),
        variance_window=max(2, min(settings.lock.variance_window, _taken(settings))),
        sparse_steps=sparse_steps(settings.lock, _taken(settings)),
    )


def _check_numbers(settings: PlanSettings) -> None:
    ranges = (
        ("--frames", settings.frames, MOST_FRAMES),
        ("--steps", settings.steps, MOST_STEPS),
        ("--prompts", settings.prompts, MOST_PROMPTS),
        ("--edits", settings.edits, MOST_PROMPTS),
        ("--step-stride", settings.step_stride, MOST_STEPS),
    )
    for option, value, most in ranges:
        if value is not None and not 1 <= value <= most:
            raise InputError(f"{option} must be a whole number from 1 to {most}, got {value}")
    if settings.lock.skip_steps >= settings.steps:
        raise InputError(f"skip_steps {settings.lock.skip_steps} leaves none of {settings.steps} steps")
    if settings.mask_share is not None and settings.mask is not None:
        raise InputError("--mask-share and --mask say the same: give one of them")
    if settings.mask_share is not None and not 0 < settings.mask_share <= 1:
        raise InputError(f"--mask-share must be more than 0 and at most 1, got {settings.mask_share}")
    if not (math.isfinite(settings.guidance) and settings.guidance >= 0):
        raise InputError(f"--guidance must be a number of at least 0, got {settings.guidance}")
    for format in settings.formats:
        if format not in FORMATS:
            raise InputError(f"--format must be one of {', '.join(FORMATS)}, got '{format}'")


def _taken(settings: PlanSettings) -> int:
    """How many steps the edit takes."""
    return settings.steps - settings.lock.skip_steps


def _steps(settings: PlanSettings) -> tuple[int, int]:
    """How many steps can lock, and how many of them have the source's K and V stored."""
    lock, steps = settings.lock, _taken(settings)
    locked = [k for k in range(lock.zero_init_steps, steps) if can_lock(lock, steps, k)]
    if settings.cache_steps == "all":
        return len(locked), len(locked)
    if settings.cache_steps in CACHE_STEPS:
        raise InputError(f"--cache-steps {settings.cache_steps} is called {CACHE_STEPS[settings.cache_steps]} now")
    if settings.cache_steps != "dynamic":
        raise InputError(f"--cache-steps must be all or dynamic, got '{settings.cache_steps}'")
    return len(locked), sum(k >= first_dynamic_step(lock, steps) for k in locked)


def _video(settings: PlanSettings, model: ModelSize) -> tuple[int, int, int, int]:
    """Frames, height and width as the model takes them, and how many tokens are kept of the source."""
    mask = None if settings.mask is None else _read_mask(settings.mask)
    wanted = settings.size or (model.height, model.width)
    size = nearest_size(model.geometry, *wanted)
    if size != wanted:
        down, across = model.geometry.size_multiple()
        warn(f"size {wanted[0]}x{wanted[1]} is not a multiple of {down}x{across}: planning for {size[0]}x{size[1]}")
    frames = settings.frames or (len(mask) if mask is not None and len(mask) > 1 else model.frames)
    padded = model.geometry.whole_frames(frames)
    if padded != frames:
        warn(f"{frames} frames are not {model.geometry.frame_words}: planning for {padded}, as an edit would pad them")
    _check_extent(model, padded, size)
    grid = model.geometry.token_grid(padded, *size)
    if mask is None:
        share = DEFAULT_SHARE if settings.mask_share is None else settings.mask_share
        foreground = max(1, round(share * math.prod(grid)))
    else:
        foreground = _foreground(settings.mask, mask, model, frames, size)
    kept = math.prod(grid) if settings.lock.foreground_mix else math.prod(grid) - foreground
    return padded, *size, kept


def _read_mask(path: str) -> Any:
    if not path:
        raise InputError("--mask is empty")
    mask = read_mask(path)
    if not mask.any():
        raise InputError(f"the mask '{path}' is empty: no pixel is marked as foreground")
    return mask


def _foreground(path: str, mask: Any, model: ModelSize, frames: int, size: tuple[int, int]) -> int:
    """Foreground tokens of a mask, fitted to the video as `edit` does."""
    try:
        mask = fit_mask(mask, frames, *size)
    except InputError as error:
        raise InputError(f"the mask '{path}' does not fit {frames} frames of {size[0]}x{size[1]}: {error}") from error
    mask, _ = fit_frames(mask, "pad", *model.geometry.frame_rule)
    return int(project_mask(torch.from_numpy(mask), model.geometry).tokens.sum())


def _check_extent(model: ModelSize, frames: int, size: tuple[int, int]) -> None:
    """Raise InputError for several frames of a model of images, and where the model's position codes end."""
    refuse_frames(model.geometry, frames)
    if not model.geometry.knows(frames, *size):
        raise InputError(
            f"{frames} frames of {size[0]}x{size[1]} are too many for {model.name}: "
            f"it takes at most {model.geometry.limits_text}"
        )


def _machine(settings: PlanSettings) -> Machine:
    """This machine, or another as far as its memory was given."""
    names = ("--gpu-memory", "--host-memory", "--disk")
    given = [None if t is None else parse_bytes(t, n) for t, n in zip(settings.memory, names, strict=True)]
    if None not in given:
        return Machine(*given)
    here = Machine.here(disk_path=Path.cwd())
    found = (here.gpu_bytes, here.host_bytes, here.disk_bytes)
    return Machine(*(h if g is None else g for g, h in zip(given, found, strict=True)))
