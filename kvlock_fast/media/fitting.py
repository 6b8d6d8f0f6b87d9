"""Frames and masks made to fit each other in size and length."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kvlock_fast.errors import InputError


def by_distance(mask: np.ndarray, result: Callable[[np.ndarray], np.ndarray], chessboard: bool = False) -> np.ndarray:
    """A result `[F, H, W]` of every pixel's distance to the nearest set pixel of its frame, infinite where none is set.

    mask: bool `[F, H, W]`; result: from distances `[H, W]` in pixels; chessboard: diagonal steps count 1 (else the
    distances are Euclidean).
    """
    from scipy.ndimage import distance_transform_cdt, distance_transform_edt

    transform = distance_transform_cdt if chessboard else distance_transform_edt
    results: list[np.ndarray] = []
    for i, frame in enumerate(mask):
        if i > 0 and np.array_equal(frame, mask[i - 1]):  # still masks are common, and one frame of them is enough
            results.append(results[-1])
        else:
            far = np.full(frame.shape, np.inf)
            results.append(result(np.asarray(transform(~frame)) if frame.any() else far))
    return np.stack(results) if results else result(np.full(mask.shape, np.inf))


def fit_frames(
    frames: np.ndarray, policy: str, multiple: int = 4, rest: int = 1, least: int = 1
) -> tuple[np.ndarray, int]:
    """Bring the first dimension of `frames` `[F, ...]` to `multiple * n + rest`, at least `least`; and the original F.

    `pad` repeats the last frame (cut the result back to the original count afterwards), `trim` drops frames at the
    end, `error` refuses. Raises InputError for no frames, another policy, a length that `error` refuses, or one that
    leaves `trim` nothing.
    """
    count = len(frames)
    if count == 0:
        raise InputError("there are no frames")
    excess, missing = (count - rest) % multiple, least - count
    if policy not in ("pad", "trim", "error"):
        raise InputError(f"the frames policy must be pad, trim or error, not '{policy}'")
    if excess == 0 and missing <= 0:
        return frames, count
    if policy == "error":
        rule = f"{multiple}n+{rest}" if rest else f"{multiple}n"
        rule = f"{least} or more" if missing > 0 else rule
        raise InputError(f"the video has {count} frames, which is not {rule} (frames policy 'error')")
    if policy == "trim" and (count == excess or missing > 0):
        enough = max(multiple * (not rest), least)
        raise InputError(f"the video has {count} frames, and the model takes {enough} or more (frames policy 'trim')")
    if policy == "trim":
        return frames[: count - excess], count
    tail = np.repeat(frames[-1:], max(-excess % multiple, missing), axis=0)
    return np.concatenate([frames, tail]), count


def fit_mask(mask: np.ndarray, frames: int, height: int, width: int) -> np.ndarray:
    """Fit a bool mask `[F, H, W]` to a video: `[frames, height, width]`.

    One frame is repeated for all. Another size of the same shape is resampled by `resize_mask`.

    Raises:
        InputError: any other difference in length, or another aspect ratio (beyond rounding to whole pixels): how
            such a mask is meant to lie on the video would be a guess.
    """
    given, rows, columns = mask.shape
    if given not in (1, frames):
        raise InputError(f"the mask has {given} frames but the video has {frames} (a mask has 1 or as many)")
    # One of the two may be the other scaled and rounded, so each side may be off by a pixel of the smaller one.
    slack = max(height + width, rows + columns)
    if abs(columns * height - rows * width) > slack:
        raise InputError(f"the mask is {rows}x{columns} but the video is {height}x{width}: another aspect ratio")
    mask = resize_mask(mask, height, width)
    return mask if given == frames else np.repeat(mask, frames, axis=0)


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resample a bool mask `[F, H, W]` to `[F, height, width]`, whatever the aspect ratio.

    Shrinking, a pixel is set if any pixel beneath it is, so nothing thin is lost; growing takes the nearest pixel.
    """
    return _resample_axis(_resample_axis(mask, 1, height), 2, width)


def _resample_axis(mask: np.ndarray, axis: int, size: int) -> np.ndarray:
    old = mask.shape[axis]
    if size >= old:
        nearest = (2 * np.arange(size) + 1) * old // (2 * size)
        return mask if size == old else np.take(mask, nearest, axis=axis)
    shape = list(mask.shape)
    shape[axis] = size
    result = np.empty(shape, dtype=bool)
    source, target = np.moveaxis(mask, axis, 0), np.moveaxis(result, axis, 0)
    for i in range(size):
        target[i] = source[i * old // size : math.ceil((i + 1) * old / size)].any(axis=0)
    return result


def resize_video(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resample `[F, H, W, 3]`, uint8 or float 0..1, to `[F, height, width, 3]`, bicubic with antialiasing."""
    if frames.shape[1:3] == (height, width):
        return frames
    import torch
    from torch.nn.functional import interpolate

    result = np.empty((len(frames), height, width, 3), dtype=frames.dtype)
    # A few frames at a time: float32 copies of a whole clip would be the largest thing in memory.
    for start in range(0, len(frames), 8):
        chunk = torch.from_numpy(np.ascontiguousarray(frames[start : start + 8])).permute(0, 3, 1, 2).float()
        resized = interpolate(chunk, (height, width), mode="bicubic", antialias=True, align_corners=False)
        bounded = resized.round_().clamp_(0, 255) if frames.dtype == np.uint8 else resized.clamp_(0, 1)
        result[start : start + 8] = bounded.permute(0, 2, 3, 1).numpy()
    return result
