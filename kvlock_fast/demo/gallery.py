"""A contact sheet of clips of the demo's world: frames from left to right, the caption below."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kvlock_fast.demo.world import Clip

_PAPER, _INK, _MARGIN = (250, 250, 247), (40, 40, 44), 12


def contact_sheet(clips: list[Clip], *, columns: int = 2, shown: int = 5, scale: int = 2) -> Image.Image:
    """Lay out clips as a picture.

    Args:
        clips: clips of one size, at least one.
        columns: clips side by side.
        shown: frames of each.
        scale: pixels of the picture for one of a clip.
    """
    if not clips:
        raise ValueError("contact_sheet needs at least one clip")
    height, width = clips[0].mask.shape[1:]
    cell_width = shown * (width * scale + 4) - 4
    cell_height = height * scale + 40
    rows = -(-len(clips) // columns)
    size = (columns * (cell_width + 2 * _MARGIN), rows * (cell_height + _MARGIN) + _MARGIN)
    page = Image.new("RGB", size, _PAPER)
    for i, clip in enumerate(clips):
        left = _MARGIN + (i % columns) * (cell_width + 2 * _MARGIN)
        top = _MARGIN + (i // columns) * (cell_height + _MARGIN)
        _draw_clip(page, clip, left, top, shown, scale, cell_width)
    return page


def _draw_clip(page: Image.Image, clip: Clip, left: int, top: int, shown: int, scale: int, cell_width: int) -> None:
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=15)
    frames, height, width = clip.mask.shape
    for k, index in enumerate(np.linspace(0, frames - 1, shown).round().astype(int)):
        frame = Image.fromarray(clip.video[index]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        page.paste(frame, (left + k * (width * scale + 4), top))
    lines = textwrap.wrap(clip.caption, max(20, cell_width // 8))
    draw.multiline_text((left, top + height * scale + 5), "\n".join(lines[:2]), fill=_INK, font=font, spacing=2)
