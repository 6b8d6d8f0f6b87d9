"""A mask as the model sees it: its tokens over the video, beside the pixels that were marked."""

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
        """Number of the latent frame that a pixel frame is in."""
        stride = self.geometry.temporal_stride
        return -(-frame // stride) if self.geometry.causal else frame // stride

    def tokens_over(self, frame: int) -> np.ndarray:
        """The tokens [h, w] that hold a pixel frame's latents."""
        lead = self.geometry.lead(self.latent_of(len(self.video) + self.padded - 1) + 1)
        return self.tokens[(self.latent_of(frame) + lead) // self.geometry.patch_size[0]]


def geometry_of(model: str) -> Geometry:
    """Geometry of a model's tokens, from its config files alone.

    model: a known name, a config file, a folder, or a hub id, of which only the configs are fetched. Raises InputError
    naming it if there is no such model, or of no known family.
    """
    from kvlock_fast.planning.find_model import find_model

    if is_local(model):
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
    """Say whether a model's configs are at hand without asking the hub."""
    from kvlock_fast.planning.known_models import MODELS

    return model in MODELS or Path(model).exists()


def view_tokens(
    video: np.ndarray, mask: np.ndarray, geometry: Geometry, size: tuple[int, int] | None, policy: str
) -> TokenView:
    """Bring a clip to the model's size and length and project its mask, as an edit does.

    Args:
        video: uint8 [F, H, W, 3].
        mask: bool [F, H, W].
        geometry: the model's.
        size: (height, width) to work at; None for the video's.
        policy: what is done with frames that do not fit.

    Raises InputError and warns as the pipeline does.
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
    down, across = (n * factor for n in view.geometry.size_multiple())
    caption, total = 26, view.tokens[0].size
    high, wide = height * factor, width * factor
    tall, broad = (side + side % 2 for side in (high + caption, wide))
    result = np.empty((len(view.video), tall, broad, 3), np.uint8)
    words = typeface(14)
    for i, (picture, marked) in enumerate(zip(view.video, view.mask, strict=True)):
        latent = view.latent_of(i)
        tokens = view.tokens_over(i)
        shown = _enlarged(picture, factor, factor).astype(np.float32)
        foreground = _enlarged(tokens, down, across)[:high, :wide, None]
        shown = np.where(foreground, 0.55 * shown + 0.45 * _TINT, 0.6 * shown)
        for lines in (shown[::down], shown[:, ::across]):
            lines[:] = 0.7 * lines + 0.3 * 200
        canvas = np.rint(shown).astype(np.uint8)
        canvas[border(_enlarged(marked, factor, factor)[None])[0]] = OUTLINE
        page = Image.new("RGB", (broad, tall), "#16181d")
        page.paste(Image.fromarray(canvas))
        text = f"frame {i}, latent {latent}: {int(tokens.sum())} of {total} tokens may change ({tokens.mean():.1%})"
        ImageDraw.Draw(page).text((8, high + 4), text, fill="#c9ced8", font=words)
        result[i] = np.asarray(page)
    return result


def write_preview(path: str | os.PathLike, view: TokenView, fps: Fraction | float) -> None:
    """Draw the tokens into a video. Raises OutputError if it cannot be written."""
    write_video(path, draw_tokens(view), fps)


def _enlarged(picture: np.ndarray, down: int, across: int) -> np.ndarray:
    return picture.repeat(down, axis=0).repeat(across, axis=1)
