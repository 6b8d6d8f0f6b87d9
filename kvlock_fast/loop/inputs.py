"""What a caller of the pipeline gave, checked and brought to a size and length that the model takes."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlock_fast import parameters
from kvlock_fast.errors import InputError, warn
from kvlock_fast.masks import Geometry
from kvlock_fast.media import fit_frames, resize_mask, resize_video
from kvlock_fast.settings import MOST_STEPS


def check_texts(prompts: Any, source_prompt: Any, negative_prompt: Any) -> list[str]:
    """The prompts as a list; InputError naming the argument that is not text."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(p, str) for p in texts):
        raise InputError(f"prompt must be a text or a non-empty list of texts, got {prompts!r}")
    if not isinstance(source_prompt, str):
        raise InputError(f"source_prompt must be a text, got {source_prompt!r}")
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        raise InputError(f"negative_prompt must be a text, got {negative_prompt!r}")
    return list(texts)


def check_numbers(steps: Any, scale: Any, scale_2: Any, two_stages: bool) -> None:
    """Raise InputError naming the number that is wrong."""
    if not is_whole(steps, 1) or steps > MOST_STEPS:
        raise InputError(f"num_inference_steps must be a whole number from 1 to {MOST_STEPS}, got {steps!r}")
    for name, value in (("guidance_scale", scale), ("guidance_scale_2", scale_2)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        if not number and not (value is None and name == "guidance_scale_2"):
            raise InputError(f"{name} must be a number of at least 0, got {value!r}")
    if scale_2 is not None and not two_stages:
        raise InputError(f"guidance_scale_2 is {scale_2}, but the model has no low-noise stage of its own")
    if scale_2 is not None and scale <= 1 < scale_2:
        raise InputError(f"guidance_scale_2 is {scale_2}, but guidance_scale {scale} turns guidance off")


def is_whole(value: Any, low: int) -> bool:
    """Whether `value` is a whole number of at least `low`."""
    return parameters.is_whole(int(value) if isinstance(value, np.integer) else value, low)


def as_video(video: Any) -> np.ndarray:
    """uint8 [F, H, W, 3] of an array, a tensor or a list of frames; InputError for anything else."""
    if isinstance(video, Tensor):
        video = video.cpu().numpy() if video.dtype == torch.uint8 else video
    elif not isinstance(video, np.ndarray):
        if not isinstance(video, (list, tuple)):
            raise InputError(f"video must be uint8 [F, H, W, 3], got {type(video).__name__}")
        pictures = [np.asarray(frame) for frame in video]
        shapes = {picture.shape for picture in pictures}
        if len(shapes) > 1:
            raise InputError(f"video holds frames of different shapes: {sorted(shapes)}")
        video = np.stack(pictures) if pictures else np.empty((0,), np.uint8)
    if (
        isinstance(video, Tensor)
        or video.dtype != np.uint8
        or video.ndim != 4
        or video.shape[-1] != 3
        or 0 in video.shape
    ):
        raise InputError(f"video must be uint8 [F, H, W, 3], got {video.dtype} {tuple(video.shape)}")
    return video


def as_mask(mask: Any, frames: int, height: int, width: int) -> np.ndarray:
    """bool [F, H, W] of a bool [F, H, W], [1, H, W] or [H, W]; InputError for anything else."""
    if not isinstance(mask, Tensor):
        mask = np.asarray(mask)
    if mask.dtype not in (bool, torch.bool):
        raise InputError(f"mask must be bool, True where the video may change, got {mask.dtype}")
    mask = mask.cpu().numpy() if isinstance(mask, Tensor) else mask
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or mask.shape[0] not in (1, frames) or mask.shape[1:] != (height, width):
        raise InputError(f"mask must be [{frames} or 1, {height}, {width}] like the video, got {tuple(mask.shape)}")
    if not mask.any():
        raise InputError("mask is empty: no pixel is marked as foreground")
    return np.repeat(mask, frames // len(mask), axis=0)


def nearest_size(geometry: Geometry, height: int, width: int) -> tuple[int, int]:
    """The nearest size in pixels that gives whole tokens, at least one each way."""
    down, across = geometry.size_multiple()
    return max(down, round(height / down) * down), max(across, round(width / across) * across)


def fit_to_model(
    video: Any,
    mask: Any,
    geometry: Geometry,
    height: int | None,
    width: int | None,
    policy: str,
    at_once: int | None = None,
    can_be_cut: bool = True,
) -> tuple[Tensor, Tensor, int]:
    """Video uint8 [F, H, W, 3] and mask bool [F, H, W] as the model takes them, and how many frames to give back.

    at_once: the most frames that go through the model together, None for all; can_be_cut: whether a longer clip
    may go through it in stretches (clip_frames). Warns where the size or the number of frames is changed.
    """
    video = as_video(video)
    count, *given = video.shape[:3]
    mask = as_mask(mask, count, *given)
    for name, value in (("height", height), ("width", width)):
        if value is not None and not is_whole(value, 1):
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    wanted = (height or given[0], width or given[1])
    size = nearest_size(geometry, *wanted)
    if size != wanted:
        down, across = geometry.size_multiple()
        warn(f"size {wanted[0]}x{wanted[1]} is not a multiple of {down}x{across}: working at {size[0]}x{size[1]}")
    _check_extent(geometry, count if geometry.one_frame else min(count, at_once or count), *size, can_be_cut)
    video, mask = resize_video(video, *size), resize_mask(mask, *size)
    video, _ = fit_frames(video, policy, *geometry.frame_rule)
    mask, _ = fit_frames(mask, policy, *geometry.frame_rule)
    if not mask.any():
        raise InputError(f"mask is empty on the {len(mask)} frames that frames_policy={policy!r} keeps")
    if len(video) > count:
        warn(f"{count} frames padded to {len(video)} by repeating the last; cut back afterwards")
    elif len(video) < count:
        plus = " plus 1" if geometry.lone_frames else ""
        warn(f"{count} frames trimmed to {len(video)}, a multiple of {geometry.frame_step}{plus}")
    return torch.from_numpy(np.ascontiguousarray(video)), torch.from_numpy(np.ascontiguousarray(mask)), count


def refuse_frames(geometry: Geometry, frames: int) -> None:
    """Raise InputError for several frames of a model of images."""
    if geometry.one_frame and frames > 1:
        raise InputError(f"the model makes images, which are videos of 1 frame, and the video has {frames} frames")


def _check_extent(geometry: Geometry, frames: int, height: int, width: int, can_be_cut: bool) -> None:
    """Raise InputError for several frames of a model of images, and where the model's position codes end."""
    refuse_frames(geometry, frames)
    if geometry.knows(frames, height, width):
        return
    (down, across), (long, high, wide) = geometry.size_multiple(), geometry.limits
    alone = geometry.lone_frames
    most = None if long is None else geometry.temporal_stride * (long * geometry.patch_size[0] - alone) + alone
    most_of = [] if most is None else [f"{most} frames"]
    if high is not None or wide is not None:
        sides = ("any" if side is None else side * step for side, step in ((high, down), (wide, across)))
        most_of.append("x".join(map(str, sides)))
    way_out = ": give clip_frames" if can_be_cut and most is not None and frames > most else ""
    raise InputError(
        f"{frames} frames of {height}x{width} are too many for this model: "
        f"it takes at most {' and '.join(most_of)}{way_out}"
    )
