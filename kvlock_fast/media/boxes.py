"""Masks in words: a box, or boxes at keyframes with straight motion between them."""

from __future__ import annotations

import re

import numpy as np

from kvlock_fast.errors import InputError

FORMS = "box:x,y,w,h or box:FRAME=x,y,w,h;FRAME=x,y,w,h;... with whole numbers"

_BOX = re.compile(r"\s*(?:(\d{1,9})\s*=)?\s*(-?\d{1,9})\s*,\s*(-?\d{1,9})\s*,\s*(-?\d{1,9})\s*,\s*(-?\d{1,9})\s*")


def is_box(spec: str) -> bool:
    """Whether a mask is given in words, and not as a file."""
    return spec.startswith("box:")


def check_box(spec: str) -> None:
    """Raise InputError quoting `spec` if it has another form or names a frame twice, whatever the video is."""
    _keyframes(spec)


def box_mask(spec: str, frames: int, height: int, width: int) -> np.ndarray:
    """The mask of `box:x,y,w,h` (pixels of the video, from the top left corner): bool `[frames, height, width]`.

    `box:0=10,20,64,48;24=40,20,64,48` gives the box at some frames, counted from 0. Between two of them its four edges
    move in straight lines and are rounded to whole pixels; before the first and after the last it stands still.
    Keyframes may lie beyond the last frame, in any order.

    Raises InputError quoting `spec` if it has another form, names a frame twice, or a box does not lie in the picture.
    """
    keys = _keyframes(spec)
    for x, y, w, h in keys.values():
        if x < 0 or y < 0 or w < 1 or h < 1 or x + w > width or y + h > height:
            raise InputError(f"the mask '{spec}' does not lie within the video of {width} columns and {height} rows")
    times = sorted(keys)
    # Edges, not corner and size: each then stays within the picture after rounding.
    edges = np.array([(x, y, x + w, y + h) for x, y, w, h in (keys[time] for time in times)], dtype=np.float64)
    at = [np.floor(np.interp(np.arange(frames), times, column) + 0.5).astype(int) for column in edges.T]
    mask = np.zeros((frames, height, width), dtype=bool)
    for frame, (left, top, right, bottom) in enumerate(zip(*at, strict=True)):
        mask[frame, top:bottom, left:right] = True
    return mask


def _keyframes(spec: str) -> dict[int, tuple[int, int, int, int]]:
    """The boxes (x, y, w, h) by frame; a box without a frame is that of frame 0."""
    boxes = spec.removeprefix("box:").split(";") if is_box(spec) else []
    found = [_BOX.fullmatch(box) for box in boxes]
    timed = len(boxes) > 1
    if not found or any(match is None or (timed and match[1] is None) for match in found):
        raise InputError(f"the mask '{spec}' is not of the form {FORMS}")
    keys: dict[int, tuple[int, int, int, int]] = {}
    for match in found:
        frame = int(match[1] or 0)
        if frame in keys:
            raise InputError(f"the mask '{spec}' gives the box at frame {frame} twice")
        keys[frame] = tuple(int(number) for number in match.groups()[1:])
    return keys
