"""Frames to files: video, page and thumbnail of one job, in memory."""

from __future__ import annotations

import io
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvlock_fast.batch.jobs import Job
from kvlock_fast.batch.speed import Speed
from kvlock_fast.edit import Clip, EditResult, finish_edit, write_page
from kvlock_fast.media import write_video

THUMBNAIL = 160
"""The longer side of each half of a thumbnail, in pixels."""


def finished_files(
    job: Job,
    clip: Clip,
    video: np.ndarray,
    trace: dict[str, Any],
    command: str | None,
    speed: Speed | None = None,
) -> tuple[bytes, bytes | None, bytes, dict[str, float | None]]:
    """The video's file, the page (None without a command to show), the thumbnail and the metrics.

    video: uint8 [F, h, w, 3] as the model made it; speed: as it was run, for the page.
    """
    settings = replace(job.edit_settings(), **vars(speed or Speed()))
    result = finish_edit(clip, [video], trace, settings)
    with tempfile.TemporaryDirectory(prefix="kvlock-") as folder:
        file, page = Path(folder) / f"video{Path(job.output).suffix.lower()}", Path(folder) / "report.html"
        audio = clip.audio if job.finish.audio else None
        write_video(file, result.videos[0], clip.fps, audio=audio, called=job.output)
        if command is not None:
            write_page(page, clip, result, settings, command)
        report = page.read_bytes() if command is not None else None
        return file.read_bytes(), report, thumbnail(result), result.metrics[0]


def thumbnail(result: EditResult) -> bytes:
    """The middle frame of source and edit side by side, as JPEG."""
    from PIL import Image

    middle = len(result.source) // 2
    both = np.concatenate([result.source[middle], result.videos[0][middle]], axis=1)
    height, width = result.source.shape[1:3]
    scale = THUMBNAIL / max(height, width)
    picture = Image.fromarray(both).resize((max(2, round(2 * width * scale)), max(1, round(height * scale))))
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=80)
    return data.getvalue()
