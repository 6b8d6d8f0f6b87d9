"""A source and its mask read together: what an edit, a cache, a preview and a page begin with."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from kvlock_fast.errors import InputError
from kvlock_fast.media.audio import Audio
from kvlock_fast.media.fitting import fit_mask
from kvlock_fast.media.masks import box_mask, grow_mask, is_box, read_mask
from kvlock_fast.media.video_in import read_video
from kvlock_fast.settings import MaskShape


@dataclass(frozen=True)
class Clip:
    """A source and its mask, at the source's size: uint8 [F, H, W, 3] and bool [F, H, W].

    solid: the mask without its soft edge, where it has one; audio: the source's sound, if it shall be kept.
    """

    video: np.ndarray
    mask: np.ndarray
    fps: Fraction
    solid: np.ndarray | None = None
    audio: Audio | None = None


def read_clip(
    source: str, mask: str, max_frames: int | None = None, shape: MaskShape | None = None, audio: bool = True
) -> Clip:
    """Read a video and its mask (a file, a folder, or a box in words), which is shaped as asked.

    Raises InputError naming what is wrong.
    """
    for option, value in (("--source", source), ("--mask", mask)):
        if not value:
            raise InputError(f"{option} is empty")
    video = read_video(source, max_frames=max_frames)
    shape = shape or MaskShape()
    pixels = None if is_box(mask) else read_mask(mask, threshold=shape.threshold, max_frames=max_frames)
    solid = solid_mask(source, mask, video.frames.shape[:3], pixels, shape)
    return Clip(
        video.frames,
        grow_mask(solid, shape.feather),
        video.fps,
        solid if shape.feather else None,
        video.audio if audio else None,
    )


def solid_mask(
    source: str, mask: str, extent: tuple[int, int, int], pixels: np.ndarray | None, shape: MaskShape
) -> np.ndarray:
    """The mask at the source's size, without its soft edge: bool [F, H, W].

    source, mask: what to call them; extent: (F, H, W); pixels: bool as it was read, None for a box in words. Raises
    InputError for one that does not fit, or leaves nothing.
    """
    pixels = box_mask(mask, *extent) if pixels is None else pixels
    pixels = ~pixels if shape.invert else pixels
    try:
        pixels = fit_mask(pixels, *extent)
    except InputError as error:
        raise InputError(f"the mask '{mask}' does not fit '{source}': {error}") from error
    if not pixels.any():
        reason = "every pixel is marked, and it is inverted" if shape.invert else "no pixel is marked as foreground"
        raise InputError(f"the mask '{mask}' is empty: {reason}")
    grown = grow_mask(pixels, shape.grow)
    if not grown.any():
        raise InputError(f"the mask '{mask}' is empty once it is shrunk by {-shape.grow} pixels")
    return grown


def refuse_same(files: list[tuple[str, str | Path | None]]) -> None:
    """Raise InputError where a file is named twice. (option, path) of inputs, which may be one, then of outputs."""
    taken: dict[Path, str] = {}
    for option, path in files:
        if path is None or path == "-" or is_box(str(path)):
            continue
        place = Path(path).resolve()
        if place in taken and option not in ("--mask", "--edited"):
            raise InputError(f"{option} '{path}' is the same file as {taken[place]}: nothing is overwritten")
        taken.setdefault(place, option)
