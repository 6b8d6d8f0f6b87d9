"""The page of an edit, made again from its trace and the files that are left.

A trace may come from anywhere, so what is read back from its file is checked.
"""

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from kvlock_fast.errors import InputError, warn
from kvlock_fast.media import MaskShape, is_box, read_video, resize_mask, resize_video
from kvlock_fast.media.clip import read_clip
from kvlock_fast.parameters import is_whole
from kvlock_fast.report.contact_sheet import write_sheet
from kvlock_fast.report.page import write_report

MOST_BYTES = 256 << 20
MOST_STEPS = 10_000
MOST_TOKENS = 10**9

_VALUES = ("variance", "alpha", "omega", "s_star", "seconds")


def read_trace(path: Path) -> dict[str, Any]:
    """Read a trace of `edit` or `demo`: prompts, steps, warmup_steps, records; settings, metrics, files, command.

    The last four may be missing, then they are empty. Raises InputError naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise InputError(f"'{path}' is not a file" if path.exists() else f"the trace '{path}' does not exist")
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"the trace '{path}' is larger than {MOST_BYTES} bytes")
    try:
        data = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the trace '{path}' is not valid JSON: {str(error).splitlines()[0]}") from error
    try:
        return _checked(data)
    except _Wrong as wrong:
        raise InputError(f"'{path}' is not a trace of an edit: {wrong}") from None


class _Wrong(Exception):
    """A fault of a trace, in words."""


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}")


def _checked(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise _Wrong(f"it holds a {type(data).__name__}")
    for name in ("prompts", "steps", "warmup_steps", "records"):
        if name not in data:
            raise _Wrong(f"it has no {name}")
    prompts = data["prompts"]
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise _Wrong("prompts is not a list of texts")
    steps, warmup = data["steps"], data["warmup_steps"]
    if not is_whole(steps, 1, MOST_STEPS) or not is_whole(warmup, 0, MOST_STEPS):
        raise _Wrong(f"steps is {_short(steps)} and warmup_steps is {_short(warmup)}")
    records = data["records"]
    if not isinstance(records, list) or len(records) > steps * len(prompts):
        raise _Wrong("records is not a list with at most one of each step and prompt")
    if not is_whole(data.get("tokens", 0), 0, MOST_TOKENS):
        raise _Wrong(f"tokens is {_short(data['tokens'])}")
    for i, record in enumerate(records):
        _check_record(i, record, steps, len(prompts))
    kinds = {"settings": dict, "metrics": list, "files": dict, "command": str}
    for name, kind in kinds.items():
        data[name] = data.get(name, kind())
        if not isinstance(data[name], kind):
            raise _Wrong(f"{name} is {_short(data[name])}")
    for one in data["metrics"]:
        if not isinstance(one, dict) or not all(_number_or_none(value) for value in one.values()):
            raise _Wrong(f"metrics holds {_short(one)}")
    return data


def _check_record(index: int, record: object, steps: int, prompts: int) -> None:
    if not isinstance(record, dict):
        raise _Wrong(f"record {index} is {_short(record)}")
    if not is_whole(record.get("tokens", 0), 0, MOST_TOKENS):
        raise _Wrong(f"record {index} has {_short(record['tokens'])} as its tokens")
    for name, most in (("step", steps), ("sample", prompts)):
        if not is_whole(record.get(name), 0, most - 1):
            raise _Wrong(f"record {index} has {_short(record.get(name))} as its {name}")
    for name in _VALUES:
        value = record.get(name)
        if name not in record or not _number_or_none(value) or (name == "seconds" and value is None):
            raise _Wrong(f"record {index} has {_short(value)} as its {name}")


def _number_or_none(value: object) -> bool:
    if value is None:
        return True
    # A whole number of JSON may be too large for a float.
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


@dataclass(frozen=True)
class Pictures:
    """Videos of an edit, all of one size and length: uint8 [F, H, W, 3], bool [F, H, W], None where missing."""

    source: np.ndarray | None
    mask: np.ndarray | None
    edits: list[np.ndarray]
    fps: Fraction


def remake_report(
    trace_path: Path, output: Path, sheet: Path | None, source: str | None, mask: str | None, edited: list[str]
) -> None:
    """Write the page about an edit again; the figures are those of the trace.

    Args:
        trace_path: the trace.
        output: the page.
        sheet: a contact sheet, if one is wanted.
        source, mask, edited: files to take instead of those that the trace names.

    Warns where a file that the trace names is no longer there. Raises InputError for a trace or a file that cannot be
    read or does not fit, and for a sheet without all three kinds of video.
    """
    trace = read_trace(trace_path)
    names, count = trace["files"], len(trace["prompts"])
    if not edited and isinstance(names.get("outputs"), list):
        found = [_found(trace_path.parent, name, "outputs") for name in names["outputs"]]
        listed = [path for path in found if path is not None]
        wanted = listed if len(listed) == len(found) else []
    else:
        wanted = edited
    if len(edited) not in (0, count):
        raise InputError(f"--edited names {len(edited)} videos, but '{trace_path}' is of {count} prompts")
    source = source or _found(trace_path.parent, names.get("source"), "source")
    mask = mask or _found(trace_path.parent, names.get("mask"), "mask")
    pictures = _read(trace, source, mask, wanted)
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
        metrics=trace["metrics"],
        fps=pictures.fps,
    )


def _found(folder: Path, name: object, kind: str) -> str | None:
    """A box, or the path of a file that a trace names, as it was typed or beside the trace; None, with a warning."""
    if not isinstance(name, str) or not name:
        return None
    found = name if is_box(name) else next((str(p) for p in (Path(name), folder / name) if p.exists()), None)
    if found is None:
        warn(f"'{name}' of the trace ({kind}) is not there any more: the page goes without it")
    return found


def _read(trace: dict[str, Any], source: str | None, mask: str | None, edited: list[str]) -> Pictures:
    edits = [read_video(path) for path in edited]
    for path, edit in zip(edited, edits, strict=True):
        if edit.frames.shape != edits[0].frames.shape:
            raise InputError(f"'{path}' has another size or length than '{edited[0]}'")
    count = trace["files"].get("max_frames")
    count = count if isinstance(count, int) and count > 0 else None
    count = len(edits[0].frames) if edits else count
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


def _shape(trace: dict[str, Any]) -> MaskShape:
    """Shape of the mask; InputError where the trace says nonsense."""
    given = {name: trace["settings"].get(f"mask_{name}") for name in ("threshold", "invert", "grow", "feather")}
    return MaskShape(**{name: value for name, value in given.items() if value is not None})
