"""What came out, for people: one self-contained page, and one picture."""

from __future__ import annotations

import base64
import math
import os
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from kvlock_fast import charts
from kvlock_fast.files import atomic_path, write_text
from kvlock_fast.media import write_video
from kvlock_fast.metrics import flicker, measure_edit
from kvlock_fast.version import __version__

LEGIBLE = 256
"""Videos whose longer side is smaller than this are enlarged, or nobody would see anything."""

_OUTLINE = np.array([255, 64, 129], dtype=np.uint8)


def write_report(
    path: str | os.PathLike,
    *,
    source: np.ndarray,
    mask: np.ndarray,
    edited: np.ndarray | Sequence[np.ndarray],
    trace: dict[str, Any],
    settings: dict[str, Any],
    command: str,
    metrics: dict[str, float | None] | Sequence[dict[str, float | None]] | None = None,
    fps: Fraction | float = 16,
) -> None:
    """Write one HTML file that needs nothing else: videos, figures, plots, settings, command.

    Args:
        source: uint8 `[F, H, W, 3]`.
        mask: bool `[F, H, W]`, True on the part that was to be edited.
        edited: one uint8 `[F, H, W, 3]`, or one per prompt in the order of `trace["prompts"]`.
        trace: prompts, steps, warmup_steps and the records per step and sample, as in trace.json.
        settings: shown as a table; dictionaries within it become headings.
        metrics: what `metrics.measure_edit` returns, one per edit (or the one); None measures here.

    Raises OutputError if the path cannot be written.
    """
    edits = _edits(edited)
    outlined = outline(source, mask)
    given = [metrics] if isinstance(metrics, dict) else metrics or [measure_edit(source, mask, e) for e in edits]
    page = _template().render(
        version=__version__,
        prompts=_prompts(trace, len(edits)),
        clips=[_clip("Source", source, fps), _clip("Mask", outlined, fps)]
        + [_clip(f"Edit {i + 1}" if len(edits) > 1 else "Edit", e, fps) for i, e in enumerate(edits)],
        figures=[_figures({**_calm(source, mask, e), **m}) for e, m in zip(edits, given, strict=False)],
        charts=charts.schedule_charts(trace, settings),
        facts=_facts(source, mask, trace, fps),
        settings=_rows(settings),
        command=command,
    )
    write_text(path, page)


def write_sheet(
    path: str | os.PathLike,
    source: np.ndarray,
    mask: np.ndarray,
    edited: np.ndarray | Sequence[np.ndarray],
    *,
    columns: int = 6,
) -> None:
    """Write a contact sheet as PNG: a row each for source, mask and every edit, and a handful of frames across.

    Shapes as in `write_report`. Raises OutputError if the path cannot be written.
    """
    from PIL import Image, ImageDraw

    edits = _edits(edited)
    index = np.linspace(0, len(source) - 1, min(columns, len(source))).round().astype(int)
    names = ["source", "mask"] + [f"edit {i + 1}" if len(edits) > 1 else "edit" for i in range(len(edits))]
    rows = [legible(clip) for clip in (source[index], outline(source[index], mask[index]), *(e[index] for e in edits))]
    height, width = rows[0].shape[1:3]
    gap, margin, caption = 8, 24, 24
    band = height + caption + gap
    sheet = Image.new("RGB", (2 * margin + len(index) * (width + gap) - gap, 2 * margin + len(rows) * band), "#16181d")
    draw, font = ImageDraw.Draw(sheet), _font(15)
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        top = margin + i * band
        draw.text((margin, top), name, fill="#c9ced8", font=font)
        for j, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (margin + j * (width + gap), top + caption))
    for j, frame in enumerate(index):
        draw.text((margin + j * (width + gap), margin + len(rows) * band), f"frame {frame}", fill="#8b92a0", font=font)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _calm(source: np.ndarray, mask: np.ndarray, edited: np.ndarray) -> dict[str, float | None]:
    """The flicker of both regions in the edit, and in the source for comparison. None: nothing to compare."""

    def calm(video: np.ndarray, where: np.ndarray) -> float | None:
        counts = len(video) > 1 and (where[:-1] & where[1:]).any()
        return flicker(video, where) if counts else None

    regions = {"background": ~mask, "foreground": mask}
    return {f"{name}_flicker": calm(edited, where) for name, where in regions.items()} | {
        f"{name}_flicker_source": calm(source, where) for name, where in regions.items()
    }


def outline(source: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The source with the background dimmed and the mask's border drawn: uint8 `[F, H, W, 3]`."""
    result = np.where(mask[..., None], source, (source * np.float32(0.45) + 20).astype(np.uint8))
    inner = mask.copy()
    for axis in (1, 2):
        for step in (-1, 1):
            inner &= _shifted(mask, axis, step)
    result[mask & ~inner] = _OUTLINE
    return result


def legible(frames: np.ndarray) -> np.ndarray:
    """Small frames enlarged by whole numbers, nearest pixel, until the longer side is legible."""
    factor = max(1, math.ceil(LEGIBLE / max(frames.shape[1:3])))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def _shifted(mask: np.ndarray, axis: int, step: int) -> np.ndarray:
    """The mask moved by one pixel; beyond the picture's edge counts as inside, so the edge itself is no border."""
    moved = np.roll(mask, step, axis)
    edge = [slice(None)] * 3
    edge[axis] = 0 if step == 1 else -1
    moved[tuple(edge)] = True
    return moved


def _edits(edited: np.ndarray | Sequence[np.ndarray]) -> list[np.ndarray]:
    return [edited] if isinstance(edited, np.ndarray) and edited.ndim == 4 else list(edited)


def _prompts(trace: dict[str, Any], count: int) -> list[str]:
    prompts = list(trace.get("prompts", []))[:count]
    return prompts + [""] * (count - len(prompts))


def _clip(name: str, frames: np.ndarray, fps: Fraction | float) -> dict[str, Any]:
    """A name, a size and the mp4 as a data URI; even sizes, because browsers do not all decode 4:4:4."""
    shown = legible(frames)
    shown = np.pad(shown, [(0, 0), (0, shown.shape[1] % 2), (0, shown.shape[2] % 2), (0, 0)], mode="edge")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_video(file, shown, fps, quality=18)
        data = base64.b64encode(file.read_bytes()).decode()
    return {"name": name, "uri": f"data:video/mp4;base64,{data}", "height": shown.shape[1], "width": shown.shape[2]}


def _figures(values: dict[str, float | None]) -> list[dict[str, str]]:
    """The tiles of one edit: label, value, and what it is to be read against."""

    def number(key: str, digits: int) -> str:
        value = values.get(key)
        return "–" if value is None else "∞" if math.isinf(value) else f"{value:.{digits}f}"

    decibels = number("background_psnr", 1)
    if values.get("background_psnr") is None and values.get("background_ssim") is not None:
        # JSON has no infinity: from there an untouched background comes as null.
        decibels = "∞"
    tiles = [
        ("Background PSNR", decibels, "dB against the source; higher is closer, ∞ untouched"),
        ("Background SSIM", number("background_ssim", 4), "1 is equal; windows at the border see the edit"),
    ]
    for region in ("background", "foreground"):
        note = f"levels from frame to frame; source {number(f'{region}_flicker_source', 2)}"
        tiles.append((f"{region.capitalize()} flicker", number(f"{region}_flicker", 2), note))
    return [dict(zip(("label", "value", "note"), tile, strict=True)) for tile in tiles]


def _facts(source: np.ndarray, mask: np.ndarray, trace: dict[str, Any], fps: Fraction | float) -> list[str]:
    frames, height, width = source.shape[:3]
    facts = [f"{frames} frames", f"{height}×{width}", f"{float(fps):.4g} fps", f"mask {mask.mean():.1%}"]
    records = trace.get("records", [])
    if records:
        seconds = sum({r["step"]: r["seconds"] for r in records}.values())
        facts += [f"{trace['steps']} steps", f"{seconds:.1f} s denoising"]
    return facts


def _rows(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Settings as table rows, one level of nesting becoming headings."""
    plain = [{"name": k, "value": _text(v)} for k, v in settings.items() if not isinstance(v, dict)]
    for name, group in settings.items():
        if isinstance(group, dict):
            plain += [{"heading": name}] + [{"name": k, "value": _text(v)} for k, v in group.items()]
    return plain


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(_text(v) for v in value) if isinstance(value, (list, tuple)) else str(value)


def _font(size: int):
    """matplotlib's own DejaVu Sans: Pillow alone has no scalable font on every build."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def _template():
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("report.html.jinja")
