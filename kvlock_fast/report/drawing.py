"""Pictures for people: outlines, heat maps, sizes that can be seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvlock_fast.media import resize_video

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

LEGIBLE = 256
"""Videos whose longer side is smaller than this are enlarged, or nobody would see anything."""

OUTLINE = np.array([255, 64, 129], dtype=np.uint8)

SCALES = (32, 64, 128, 255)
"""Ends that the scale of a difference map may have, in levels."""


def outline(source: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The source with the background dimmed and the mask's border drawn: uint8 `[F, H, W, 3]`."""
    result = np.where(mask[..., None], source, (source * np.float32(0.45) + 20).astype(np.uint8))
    result[border(mask)] = OUTLINE
    return result


def border(mask: np.ndarray) -> np.ndarray:
    """The pixels of a bool `[F, H, W]` that have a neighbour outside of it; beyond the picture counts as inside."""
    from scipy import ndimage

    cross = ndimage.generate_binary_structure(2, 1)[None]
    return mask & np.logical_not(ndimage.binary_erosion(mask, cross, border_value=1))


def as_pictures(mask: np.ndarray) -> np.ndarray:
    """A bool `[F, H, W]` in black and white: uint8 `[F, H, W, 3]`."""
    return np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=3)


def at_most(frames: np.ndarray, longest: int) -> np.ndarray:
    """Large uint8 frames `[F, H, W, 3]` made smaller, until the longer side is no longer than `longest`."""
    height, width = frames.shape[1:3]
    shrink = longest / max(height, width)
    if shrink >= 1:
        return frames
    return resize_video(frames, max(1, round(height * shrink)), max(1, round(width * shrink)))


def legible(frames: np.ndarray) -> np.ndarray:
    """Small frames enlarged by whole numbers, nearest pixel, until the longer side is legible."""
    factor = max(1, math.ceil(LEGIBLE / max(frames.shape[1:3])))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def difference(source: np.ndarray, edited: np.ndarray) -> np.ndarray:
    """|edited - source| of the channel that differs most, of uint8 `[F, H, W, 3]`: uint8 `[F, H, W]`."""
    result = np.empty(source.shape[:3], dtype=np.uint8)
    for i, (before, after) in enumerate(zip(source, edited, strict=True)):
        result[i] = (np.maximum(before, after) - np.minimum(before, after)).max(axis=-1)
    return result


def difference_scale(maps: Sequence[np.ndarray], background: np.ndarray | None = None) -> int:
    """End of a scale for `difference` maps: the least of SCALES that covers 98 % of the pixels.

    background: bool `[F, H, W]`, the pixels that count (all by default, or where there are none), as the edit itself
    would outshine them.
    """
    if background is None or not background.any():
        background = np.ones_like(maps[0], dtype=bool)
    counts = np.sum([np.bincount(one[background], minlength=256) for one in maps], axis=0)
    level = int(np.searchsorted(np.cumsum(counts), 0.98 * counts.sum()))
    return next(scale for scale in SCALES if scale >= level)


def heat(levels: np.ndarray, scale: int) -> np.ndarray:
    """A `difference` map in colours, uint8 `[F, H, W, 3]`: black is 0, the brightest is `scale` levels and more."""
    return heat_colours()[np.minimum(levels.astype(np.uint16) * 255 // scale, 255)]


def heat_colours() -> np.ndarray:
    """The 256 colours of a heat map from dark to bright, uint8 `[256, 3]`: matplotlib's inferno."""
    import matplotlib

    return (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def typeface(size: int) -> FreeTypeFont:
    """Load matplotlib's own DejaVu Sans: Pillow alone has no scalable font on every build."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)
