"""A contact sheet of clips: a row per clip, frames from left to right, the caption below.

`write_world` draws clips of the demo's world, and writes them as videos with their contact sheet.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kvlock_fast.demo.scene import sample_scene
from kvlock_fast.demo.world import Clip, render

_PAPER, _INK, _MARGIN = (250, 250, 247), (40, 40, 44), 12


def contact_sheet(clips: list[Clip], *, columns: int = 2, shown: int = 5, scale: int = 2) -> Image.Image:
    """Lay out clips as a picture: `columns` clips side by side, `shown` frames each, pixels enlarged `scale` times."""
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


def write_world(n: int, output_folder: str | Path, seed: int = 0) -> list[Path]:
    """Write n clips (`world_000.mp4` ...) and `world.png`, a sheet of their frames with captions; returns the paths."""
    from kvlock_fast.media import write_video

    if n < 1:
        raise ValueError(f"the number of clips must be at least 1, got {n}")
    folder = Path(output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    clips = [render(sample_scene(seed + i)) for i in range(n)]
    paths = [folder / f"world_{i:03d}.mp4" for i in range(n)]
    for path, clip in zip(paths, clips, strict=True):
        write_video(path, clip.video, 8)
    sheet = folder / "world.png"
    contact_sheet(clips).save(sheet)
    return [*paths, sheet]
