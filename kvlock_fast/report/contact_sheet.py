"""A contact sheet of an edit, which is one picture."""

import os
from collections.abc import Sequence

import numpy as np

from kvlock_fast.files import atomic_path
from kvlock_fast.report.drawing import at_most, difference, difference_scale, heat, legible, outline, typeface

LARGEST = 480
"""Pixels of the longer side above which frames are made smaller."""
COLUMNS = 6
"""The most frames across."""


def write_sheet(
    path: str | os.PathLike,
    source: np.ndarray,
    mask: np.ndarray,
    edits: Sequence[np.ndarray],
) -> None:
    """Write a PNG: a row each for source, mask, every edit and its difference from the source, some frames across.

    Args:
        path: the file.
        source: uint8 `[F, H, W, 3]`.
        mask: bool `[F, H, W]`.
        edits: uint8 `[F, H, W, 3]` each.

    Raises OutputError if the path cannot be written.
    """
    from PIL import Image, ImageDraw

    index = np.linspace(0, len(source) - 1, min(COLUMNS, len(source))).round().astype(int)
    names, rows = _rows(source[index], mask[index], [edit[index] for edit in edits])
    rows = [legible(at_most(row, LARGEST)) for row in rows]
    height, width = rows[0].shape[1:3]
    gap, margin, caption = 8, 24, 24
    band = height + caption + gap
    sheet = Image.new("RGB", (2 * margin + len(index) * (width + gap) - gap, 2 * margin + len(rows) * band), "#16181d")
    draw, font = ImageDraw.Draw(sheet), typeface(15)
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        top = margin + i * band
        draw.text((margin, top), name, fill="#c9ced8", font=font)
        for j, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (margin + j * (width + gap), top + caption))
    for j, frame in enumerate(index):
        draw.text((margin + j * (width + gap), margin + len(rows) * band), f"frame {frame}", fill="#8b92a0", font=font)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _rows(source: np.ndarray, mask: np.ndarray, edits: list[np.ndarray]) -> tuple[list[str], list[np.ndarray]]:
    names, rows = ["source", "mask"], [source, outline(source, mask)]
    maps = [difference(source, edit) for edit in edits]
    scale = difference_scale(maps, ~mask)
    for i, (edit, levels) in enumerate(zip(edits, maps, strict=True), start=1):
        number = f" {i}" if len(edits) > 1 else ""
        names += [f"edit{number}", f"difference{number}, bright = {scale} levels or more"]
        rows += [edit, heat(levels, scale)]
    return names, rows
