"""The page of an edit, made again from its trace and the files that are left."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from kvlock_fast.edit import read_clip
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.media import MaskShape, is_box, read_video, resize_mask, resize_video
from kvlock_fast.report import write_report
from kvlock_fast.sheet import write_sheet
from kvlock_fast.trace_file import read_trace


@dataclass(frozen=True)
class Pictures:
    """What is left of an edit, all of one size and length: uint8 [F, H, W, 3], bool [F, H, W], None where missing."""

    source: np.ndarray | None
    mask: np.ndarray | None
    edits: list[np.ndarray]
    fps: Fraction


def remake_report(
    trace_path: Path, output: Path, sheet: Path | None, source: str | None, mask: str | None, edited: list[str]
) -> None:
    """Write the page, and the sheet if one is wanted, with the files given or else those that the trace names.

    The figures are those of the trace. Warns where a file that the trace names is no longer there. Raises InputError
    for a trace or a file that cannot be read or does not fit, and for a sheet without all three kinds of video.
    """
    trace = read_trace(trace_path)
    found = _Files(trace_path, trace)
    wanted_edits = edited or found.listed("outputs")
    if len(edited) not in (0, len(trace["prompts"])):
        raise InputError(
            f"--edited names {len(edited)} videos, but '{trace_path}' is of {len(trace['prompts'])} prompts"
        )
    pictures = _read(trace, source or found.one("source"), mask or found.one("mask"), wanted_edits)
    if sheet is not None:
        if pictures.source is None or pictures.mask is None or not pictures.edits:
            raise InputError(f"--sheet '{sheet}' needs the source, the mask and the edit: give those that are missing")
        write_sheet(sheet, pictures.source, pictures.mask, pictures.edits)
    write_report(
        output,
        source=pictures.source,
        mask=pictures.mask,
        edited=pictures.edits,
        trace=trace,
        settings=trace["settings"],
        command=trace["command"],
        metrics=trace["metrics"] or None,
        fps=pictures.fps,
    )


class _Files:
    """The files that a trace names: as they were typed, or beside the trace."""

    def __init__(self, trace_path: Path, trace: dict[str, Any]):
        self.folder, self.names = trace_path.parent, trace["files"]

    def one(self, kind: str) -> str | None:
        """The path, or box, of that kind; None (with a warning) where it is not there."""
        return self._found(kind, self.names.get(kind))

    def listed(self, kind: str) -> list[str]:
        """All the paths of a kind, or none where one is not there."""
        names = self.names.get(kind)
        paths = [self._found(kind, name) for name in names] if isinstance(names, list) else []
        return [] if None in paths else paths

    def _found(self, kind: str, name: Any) -> str | None:
        if not isinstance(name, str) or not name or is_box(name):
            return name if isinstance(name, str) and name else None
        for path in (Path(name), self.folder / name):
            if path.exists():
                return str(path)
        message = f"'{name}' of the trace ({kind}) is not there any more: the page goes without it"
        warnings.warn(message, InputWarning, stacklevel=2)
        return None


def _read(trace: dict[str, Any], source: str | None, mask: str | None, edited: list[str]) -> Pictures:
    edits = [read_video(path) for path in edited]
    for path, edit in zip(edited, edits, strict=True):
        if edit.frames.shape != edits[0].frames.shape:
            raise InputError(f"'{path}' has another size or length than '{edited[0]}'")
    count = len(edits[0].frames) if edits else _max_frames(trace)
    rates = [edit.fps for edit in edits]
    video = marked = None
    if source is not None and mask is not None:
        clip = read_clip(source, mask, count, _shape(trace), audio=False)
        video, marked, rates = clip.video, clip.mask, [clip.fps]
    elif source is not None:
        read = read_video(source, max_frames=count)
        video, rates = read.frames, [read.fps]
    if video is not None and edits:
        if len(video) != count:
            raise InputError(f"'{source}' has {len(video)} frames, but '{edited[0]}' has {count}")
        size = edits[0].frames.shape[1:3]
        video = resize_video(video, *size)
        marked = None if marked is None else resize_mask(marked, *size)
    return Pictures(video, marked, [edit.frames for edit in edits], rates[0] if rates else Fraction(16))


def _max_frames(trace: dict[str, Any]) -> int | None:
    count = trace["files"].get("max_frames")
    return count if isinstance(count, int) and count > 0 else None


def _shape(trace: dict[str, Any]) -> MaskShape:
    """How the mask was shaped; InputError where the trace says nonsense."""
    given = {name: trace["settings"].get(f"mask_{name}") for name in ("threshold", "invert", "grow", "feather")}
    return MaskShape(**{name: value for name, value in given.items() if value is not None})
