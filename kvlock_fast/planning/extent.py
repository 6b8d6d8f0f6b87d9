"""A clip as a model takes it: how large it is, and how many tokens of it may change."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch

from kvlock_fast.errors import InputError, warn
from kvlock_fast.loop.inputs import nearest_size, refuse_frames
from kvlock_fast.masks import project_mask
from kvlock_fast.media import fit_frames, resize_mask
from kvlock_fast.planning.model_size import ModelSize

MOST_FRAMES = 100_000


@dataclass(frozen=True)
class Extent:
    """Frames, height and width (in pixels) of a clip that a model is given."""

    model: ModelSize
    frames: int
    height: int
    width: int

    @cached_property
    def tokens(self) -> int:
        """Number of tokens of the video."""
        return prod(self.model.geometry.token_grid(self.frames, self.height, self.width))

    def foreground(self, mask: np.ndarray, policy: str) -> int:
        """Number of foreground tokens of a mask bool [F, H, W] that lies on the clip; policy: the frames policy."""
        mask, _ = fit_frames(resize_mask(mask, self.height, self.width), policy, *self.model.geometry.frame_rule)
        return int(project_mask(torch.from_numpy(np.ascontiguousarray(mask)), self.model.geometry).tokens.sum())

    def refuse_beyond(self, name: str) -> None:
        """Raise InputError where the model's position codes end; name: of the model, for the sentence."""
        geometry = self.model.geometry
        if not geometry.knows(self.frames, self.height, self.width):
            raise InputError(
                f"{self.frames} frames of {self.height}x{self.width} are too many for {name}: "
                f"it takes at most {geometry.limits_text}"
            )


def find_extent(model: ModelSize, frames: int | None, size: tuple[int, int] | None, doing: str) -> Extent:
    """Fit frames and size to a model, with a warning for each that is changed.

    Args:
        model: the sizes of the model.
        frames: how many frames are asked for, None for the model's usual number.
        size: height and width in pixels, None for the model's usual ones.
        doing: verb of the warnings, like "profiling".

    Raises:
        InputError: a number of frames out of range, or more than the model takes.
    """
    geometry, wanted = model.geometry, size or (model.height, model.width)
    frames = model.frames if frames is None else frames
    if not 1 <= frames <= MOST_FRAMES:
        raise InputError(f"--frames must be a whole number from 1 to {MOST_FRAMES}, got {frames}")
    extent = Extent(model, geometry.whole_frames(frames), *nearest_size(geometry, *wanted))
    if (extent.height, extent.width) != wanted:
        multiple = "x".join(map(str, geometry.size_multiple()))
        instead = f"{doing} {extent.height}x{extent.width}"
        warn(f"size {wanted[0]}x{wanted[1]} is not a multiple of {multiple}: {instead}")
    if extent.frames != frames:
        instead = f"{doing} {extent.frames}, as an edit would pad them"
        warn(f"{frames} frames are not {geometry.frame_words}: {instead}")
    refuse_frames(geometry, extent.frames)
    extent.refuse_beyond(model.name)
    return extent
