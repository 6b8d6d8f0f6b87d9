"""What is done to a mask after it is read: threshold, invert, grow or shrink, a soft edge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvlock_fast.errors import InputError

MOST_GROW, MOST_FEATHER = 1024, 256
"""The farthest a mask is grown or shrunk, and softened, in pixels."""


@dataclass(frozen=True)
class MaskShape:
    """How a mask becomes the part of the video that may change. Lengths in pixels of the video.

    threshold: above this share of the full range a pixel is marked (pictures and arrays of numbers); invert: what is
    marked stays, the rest may change; grow: by so many pixels in every direction, negative shrinks; feather: a soft
    edge around that: so many more pixels that may change, over which a composite passes from the edit to the source.
    They apply in this order. Raises InputError for a value out of range.
    """

    threshold: float = 0.5
    invert: bool = False
    grow: int = 0
    feather: int = 0

    def __post_init__(self):
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or not 0 <= self.threshold < 1:
            raise InputError(f"the mask threshold must be at least 0 and below 1, not {self.threshold}")
        if not isinstance(self.invert, bool):
            raise InputError(f"mask_invert must be true or false, got {self.invert!r}")
        for name, least, most in (("grow", -MOST_GROW, MOST_GROW), ("feather", 0, MOST_FEATHER)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise InputError(f"mask_{name} must be a whole number from {least} to {most}, got {value!r}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, named as the command line names them."""
        return {f"mask_{name}": value for name, value in vars(self).items()}


def grow_mask(mask: np.ndarray, radius: int) -> np.ndarray:
    """bool `[F, H, W]` with every pixel set that lies within `radius` pixels of a set one, in its own frame.

    By Euclidean distance between centres: dilation by a disc. A negative radius is the same done to the rest (erosion
    by the disc); what lies beyond the picture's edge counts for neither.
    """
    if radius < 0:
        return ~grow_mask(~mask, -radius)
    if radius == 0:
        return mask
    grown = np.empty_like(mask)
    for i, frame in enumerate(mask):
        # Still masks are common, and one frame of them is enough.
        still = i > 0 and np.array_equal(frame, mask[i - 1])
        grown[i] = grown[i - 1] if still else _grow_frame(frame, radius)
    return grown


def _grow_frame(frame: np.ndarray, radius: int) -> np.ndarray:
    """Pixels whose distance along the row, in some row nearby, leaves them within the disc."""
    height, width = frame.shape
    columns, far = np.arange(width), 2 * (width + radius)
    before = np.maximum.accumulate(np.where(frame, columns, -far), axis=1)
    after = np.minimum.accumulate(np.where(frame, columns, far)[:, ::-1], axis=1)[:, ::-1]
    distance = np.minimum(columns - before, after - columns)
    grown = distance <= radius
    for rows in range(1, min(radius, height - 1) + 1):
        near = distance <= math.isqrt(radius * radius - rows * rows)
        grown[rows:] |= near[:-rows]
        grown[:-rows] |= near[rows:]
    return grown
