"""The report about an edit: one self-contained page."""

from __future__ import annotations

import base64
import math
import os
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvlock_fast.files import write_text
from kvlock_fast.media import write_video
from kvlock_fast.media.metrics import measure_delivered
from kvlock_fast.report import charts, drawing
from kvlock_fast.version import __version__

if TYPE_CHECKING:
    import jinja2

LARGEST = 1280
"""Pixels of the longer side above which the page's copy of a video is made smaller."""

Metrics = dict[str, float | None]


def write_report(
    path: str | os.PathLike,
    *,
    source: np.ndarray | None,
    mask: np.ndarray | None,
    edited: Sequence[np.ndarray],
    trace: dict[str, Any],
    settings: dict[str, Any],
    command: str,
    metrics: Sequence[Metrics] = (),
    fps: Fraction | float = 16,
) -> None:
    """Write one HTML file that needs nothing else: videos (images where they have one frame), differences, figures,
    plots, settings, command.

    Args:
        path: the file.
        source: uint8 `[F, H, W, 3]`; None leaves out what needs it.
        mask: bool `[F, H, W]`, True on the part that was to be edited; or None.
        edited: uint8 `[F, H, W, 3]`, one per prompt in the order of `trace["prompts"]`; or none.
        trace: prompts, steps, warmup_steps and the records per step and sample, as in trace.json.
        settings: shown as a table; dictionaries within it become headings.
        command: shown at the end.
        metrics: results of `metrics.measure_edit` (raw) and `measure_delivered`, one per edit; with none, what was
            delivered is measured here if it can be.
        fps: frames a second of all videos.

    Raises OutputError if the path cannot be written.
    """
    prompts = trace.get("prompts", [])
    count = max(len(edited), len(prompts), 1)
    still = any(len(edit) == 1 for edit in edited)
    if not metrics and source is not None and mask is not None:
        metrics = [measure_delivered(source, mask, edit) for edit in edited]
    page = template(Path(__file__).with_name("page.html.jinja")).render(
        version=__version__,
        prompts=[*prompts, *[""] * (count - len(prompts))],
        clips=_clips(source, mask, edited, fps),
        heat=", ".join("rgb({}, {}, {})".format(*colour) for colour in drawing.heat_colours()[::15].tolist()),
        figures=[_figures(one, still) for one in metrics],
        charts=charts.schedule_charts(trace, settings),
        facts=_facts(source if source is not None else next(iter(edited), None), mask, trace, fps),
        settings=_rows(settings),
        command=command,
    )
    write_text(path, page)


def _clips(
    source: np.ndarray | None, mask: np.ndarray | None, edits: Sequence[np.ndarray], fps: Fraction | float
) -> list[dict[str, Any]]:
    """Videos to play: source, mask, each edit and its difference from the source."""
    clips = [] if source is None else [_clip("Source", source, fps)]
    if mask is not None:
        clips.append(_clip("Mask", drawing.as_pictures(mask) if source is None else drawing.outline(source, mask), fps))
    maps = [] if source is None else [drawing.difference(source, edit) for edit in edits]
    scale = drawing.difference_scale(maps, None if mask is None else ~mask) if maps else 0
    for i, edit in enumerate(edits):
        number = f" {i + 1}" if len(edits) > 1 else ""
        clips.append({**_clip(f"Edit{number}", edit, fps), "prompt": i})
        if maps:
            clips.append({**_clip(f"Difference{number}", drawing.heat(maps[i], scale), fps), "scale": scale})
    return clips


def _clip(name: str, frames: np.ndarray, fps: Fraction | float) -> dict[str, Any]:
    """A name, a size and the mp4 as a data URI; even sizes, because browsers do not all decode 4:4:4.

    still: whether it is a PNG, of one frame.
    """
    from PIL import Image

    shown = drawing.legible(drawing.at_most(frames, LARGEST))
    still = len(shown) == 1
    if not still:
        shown = np.pad(shown, [(0, 0), (0, shown.shape[1] % 2), (0, shown.shape[2] % 2), (0, 0)], mode="edge")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ("clip.png" if still else "clip.mp4")
        if still:
            Image.fromarray(np.ascontiguousarray(shown[0])).save(file)
        else:
            write_video(file, shown, fps, quality=18)
        data = base64.b64encode(file.read_bytes()).decode()
    uri = f"data:{'image/png' if still else 'video/mp4'};base64,{data}"
    return {"name": name, "uri": uri, "height": shown.shape[1], "width": shown.shape[2], "still": still}


def _figures(values: Metrics, still: bool = False) -> list[list[dict[str, Any]]]:
    """The tiles of one edit, delivered and raw (the model's own frames): label, value, and how to read it.

    still: an image, which cannot flicker.
    """

    def number(key: str, digits: int) -> str:
        value = values.get(key)
        return "–" if value is None else "∞" if math.isinf(value) else f"{value:.{digits}f}"

    def decibels(name: str, beside: str) -> str:
        # JSON has no infinity: from there an untouched region comes as null.
        untouched = name in values and values[name] is None and values.get(beside) is not None
        return "∞" if untouched else number(name, 1)

    notes = {
        "background": ("dB against the source; higher is closer, ∞ untouched", "1 is equal; its windows see the edit"),
        "foreground": ("dB against the source; lower is more change", "1 is equal to the source"),
    }
    groups = []
    if "delivered_psnr" in values:
        groups.append([
            ("Delivered background PSNR", decibels("delivered_psnr", "delivered_seam"),
             "dB of the delivered video against the source, before its codec; ∞ untouched"),
            ("Delivered seam", number("delivered_seam", 1), "root mean square step across the mask's edge, in levels"),
        ])  # fmt: skip
    for region, (of_psnr, of_ssim) in notes.items():
        if f"{region}_ssim" not in values:
            continue
        calm = f"mean change from frame to frame, in levels; source {number(f'{region}_flicker_source', 2)}"
        ring = "root mean square error just outside the mask, in levels; 0 is untouched"
        groups.append([
            (f"Raw {region} PSNR", decibels(f"{region}_psnr", f"{region}_ssim"), of_psnr),
            (f"Raw {region} SSIM", number(f"{region}_ssim", 4), of_ssim),
            *([("Raw seam", number("seam", 1), ring)] if region == "background" and "seam" in values else []),
            *([] if still else [(f"Raw {region} flicker", number(f"{region}_flicker", 2), calm)]),
        ])  # fmt: skip
    return [[{"label": label, "value": value, "note": note} for label, value, note in tiles] for tiles in groups]


def _facts(
    video: np.ndarray | None, mask: np.ndarray | None, trace: dict[str, Any], fps: Fraction | float
) -> list[str]:
    facts = []
    if video is not None:
        frames, height, width = video.shape[:3]
        moving = [f"{frames} frames", f"{height}×{width}", f"{float(fps):.4g} fps"]
        facts = moving if frames > 1 else [f"{height}×{width}"]
    if mask is not None:
        facts.append(f"mask {mask.mean():.1%}")
    records = trace.get("records", [])
    if records:
        seconds = sum({r["step"]: r["seconds"] for r in records}.values())
        facts += [f"{trace['steps']} steps", f"{seconds:.1f} s denoising"]
        if charts.computes_less(trace):
            share = sum(r["tokens"] for r in records) / (len(records) * trace["tokens"])
            facts.append(f"{share:.0%} of {trace['tokens']} tokens computed")
    return facts


def _rows(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Settings as table rows, one level of nesting becoming headings."""
    plain = [{"name": k, "value": _text(v)} for k, v in settings.items() if not isinstance(v, dict)]
    for name, group in settings.items():
        if isinstance(group, dict):
            plain += [{"heading": name}] + [{"name": k, "value": _text(v)} for k, v in group.items()]
    return plain


def _text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(_text(v) for v in value) if isinstance(value, (list, tuple)) else str(value)


def template(path: Path, trim_blocks: bool = False) -> jinja2.Template:
    """Load a template whose values are escaped, and must all be given."""
    import jinja2

    loader = jinja2.FileSystemLoader(path.parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=trim_blocks
    )
    return environment.get_template(path.name)
