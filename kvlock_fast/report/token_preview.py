"""A mask as the model sees it: its tokens over the video, beside the pixels that were marked."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from kvlock_fast.errors import InputError
from kvlock_fast.masks import Geometry
from kvlock_fast.media import write_video
from kvlock_fast.report.drawing import OUTLINE, border, typeface

LEGIBLE = 720
"""Pixels of the longer side below which pictures are enlarged."""

_TINT = np.array([255, 176, 32], dtype=np.float32)


@dataclass(frozen=True)
class TokenView:
    """A clip as the model takes it: video uint8 [F, H, W, 3], mask bool [F, H, W], tokens bool [t, h, w]; padded says
    how many frames the model gets beside those of the video.
    """

    video: np.ndarray
    mask: np.ndarray
    tokens: np.ndarray
    padded: int
    geometry: Geometry

    def facts(self) -> dict[str, Any]:
        """Sizes and shares as plain values."""
        foreground = int(self.tokens.sum())
        return {
            "frames": len(self.video),
            "padded_frames": self.padded,
            "size": list(self.video.shape[1:3]),
            "tokens": list(self.tokens.shape),
            "foreground_tokens": foreground,
            "background_tokens": self.tokens.size - foreground,
            "foreground_share": foreground / self.tokens.size,
            "pixel_share": float(self.mask.mean()),
        }

    def latent_of(self, frame: int) -> int:
        """The latent frame that a pixel frame is in."""
        stride = self.geometry.temporal_stride
        return -(-frame // stride) if self.geometry.causal else frame // stride

    def tokens_over(self, frame: int) -> np.ndarray:
        """The tokens [h, w] that hold a pixel frame's latents."""
        lead = self.geometry.lead(self.latent_of(len(self.video) + self.padded - 1) + 1)
        return self.tokens[(self.latent_of(frame) + lead) // self.geometry.patch_size[0]]


def geometry_of(model: str) -> Geometry:
    """How a model cuts videos into tokens, by its config files alone.

    model: a known name, a config file, a folder, or a hub id, of which only the configs are fetched. Raises InputError
    naming it if there is no such model, or of no known family.
    """
    from kvlock_fast.planning.find_model import find_model
    from kvlock_fast.planning.known_models import MODELS

    if model in MODELS or Path(model).exists():
        return find_model(model).geometry
    from huggingface_hub import snapshot_download

    configs = ["model_index.json", "transformer*/config.json", "vae/config.json"]
    try:
        folder = snapshot_download(model, allow_patterns=configs)
    except Exception as error:  # of the network, of the hub's answers, of a name that cannot be one
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"model {model!r} cannot be loaded: {first[:300]}") from error
    return find_model(folder).geometry


def is_local(model: str) -> bool:
    """Whether a model's configs are at hand without asking the hub."""
    from kvlock_fast.planning.known_models import MODELS

    return model in MODELS or Path(model).exists()


def view_tokens(
    video: np.ndarray, mask: np.ndarray, geometry: Geometry, size: tuple[int, int] | None, policy: str
) -> TokenView:
    """Bring a clip to the model's size and length and project its mask, as an edit does.

    video: uint8 [F, H, W, 3]; mask: bool [F, H, W]; size: (height, width) to work at, None for the video's. Raises
    InputError and warns as the pipeline does.
    """
    from kvlock_fast.loop.inputs import fit_to_model
    from kvlock_fast.masks import project_mask

    frames, pixels, count = fit_to_model(video, mask, geometry, *(size or (None, None)), policy)
    grid = geometry.token_grid(*frames.shape[:3])
    tokens = project_mask(pixels, geometry).tokens.view(grid).numpy()
    kept = min(count, len(frames))
    return TokenView(frames[:kept].numpy(), pixels[:kept].numpy(), tokens, len(frames) - kept, geometry)


def draw_tokens(view: TokenView) -> np.ndarray:
    """The video with its foreground tokens tinted, their grid, the mask's outline, and a line of words below.

    uint8 [F, H', W', 3]; both sides even.
    """
    from PIL import Image, ImageDraw

    height, width = view.video.shape[1:3]
    factor = max(1, math.ceil(LEGIBLE / max(height, width)))
    cell = [n * factor for n in view.geometry.size_multiple()]
    caption, total = 26, view.tokens[0].size
    shape = (height * factor, width * factor)
    result = np.empty((len(view.video), *(side + side % 2 for side in (shape[0] + caption, shape[1])), 3), np.uint8)
    words = typeface(14)
    for i, (picture, marked) in enumerate(zip(view.video, view.mask, strict=True)):
        latent = view.latent_of(i)
        tokens = view.tokens_over(i)
        canvas = _tinted(_enlarged(picture, factor), _enlarged(tokens, 1, cell, shape), cell)
        canvas[border(_enlarged(marked, factor)[None])[0]] = OUTLINE
        page = Image.new("RGB", (result.shape[2], result.shape[1]), "#16181d")
        page.paste(Image.fromarray(canvas))
        text = f"frame {i}, latent {latent}: {int(tokens.sum())} of {total} tokens may change ({tokens.mean():.1%})"
        ImageDraw.Draw(page).text((8, shape[0] + 4), text, fill="#c9ced8", font=words)
        result[i] = np.asarray(page)
    return result


def write_preview(path: str | os.PathLike, view: TokenView, fps: Fraction | float) -> None:
    """Draw the tokens into a video. Raises OutputError if it cannot be written."""
    write_video(path, draw_tokens(view), fps)


def _enlarged(
    picture: np.ndarray, factor: int, cell: list[int] | None = None, shape: tuple[int, int] | None = None
) -> np.ndarray:
    """Every pixel `factor` times as large, or as large as `cell` and cut to `shape`."""
    down, across = cell or (factor, factor)
    large = picture.repeat(down, axis=0).repeat(across, axis=1)
    return large if shape is None else large[: shape[0], : shape[1]]


def _tinted(picture: np.ndarray, foreground: np.ndarray, cell: list[int]) -> np.ndarray:
    """The picture dimmed, its foreground tokens in colour, and the lines between tokens: uint8 [H, W, 3]."""
    shown = picture.astype(np.float32)
    shown = np.where(foreground[..., None], 0.55 * shown + 0.45 * _TINT, 0.6 * shown)
    for axis, step in enumerate(cell):
        lines = (slice(None), slice(0, None, step)) if axis else (slice(0, None, step),)
        shown[lines] = 0.7 * shown[lines] + 0.3 * 200
    return np.rint(shown).astype(np.uint8)
