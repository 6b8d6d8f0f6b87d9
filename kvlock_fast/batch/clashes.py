"""Results that would replace an input, or each other: every output of a manifest against all its files."""

import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from kvlock_fast.batch.fields import short
from kvlock_fast.batch.manifest import Reading
from kvlock_fast.batch.places import is_remote, local_path, report_name
from kvlock_fast.errors import InputError
from kvlock_fast.media import is_box
from kvlock_fast.media.images import SUFFIXES

Key = tuple[str, ...]
"""The parts of a resolved path or URL, as a file system sees them that takes no notice of case."""
Own = Sequence[tuple[str, Path]]
"""Files by what to call them."""


@dataclass
class _Taken:
    """The places that are taken, by key: inputs, outputs, and folders that an output lies in, each with its name."""

    inputs: dict[Key, str] = field(default_factory=dict)
    outputs: dict[Key, str] = field(default_factory=dict)
    above: dict[Key, str] = field(default_factory=dict)


def enter_clashes(reading: Reading, base: Path, results: str, own: Own = (), others: Own = ()) -> None:
    """Enter every output that is an input of any job, lies in one, or is another job's output under another name.

    Args:
        reading: jobs and problems.
        base: the folder that the manifest's paths are relative to.
        results: the folder or URL that outputs are relative to.
        own: files that the batch writes itself.
        others: files that it reads beside sources and masks.

    Raises InputError where one of its own files is an input.
    """
    taken, key = _Taken(), cache(_key)  # links are read once
    for name, path in others:
        taken.inputs[key(str(path.absolute()))] = name
    for job in reading.jobs:
        for name, place in (("source", job.setup.source), ("mask", job.setup.mask)):
            if not (name == "mask" and is_box(place)):
                whole = place if is_remote(place) else str(local_path(place, base).absolute())
                taken.inputs.setdefault(key(whole), f"the {name} of line {job.line}")
    for name, path in own:
        if (found := taken.inputs.get(key(str(path.absolute())))) is not None:
            raise InputError(f"{name} '{path}' is {found}: nothing is overwritten")
    said = {line for line, name, _ in reading.problems if name == "output"}
    root = results if is_remote(results) else str(local_path(results, Path()).absolute())
    for job in (job for job in reading.jobs if job.line not in said):
        report = _output_key(root, report_name(job.id), key)
        why = f"has its report where {taken.inputs[report]} is" if report in taken.inputs else None
        why = why or _clash(_output_key(root, job.output, key), job.line, taken)
        if why is not None:
            reading.wrong(job.line, "output", f"{why}, got {short(job.output)}: nothing is overwritten")


def _clash(key: Key, line: int, taken: _Taken) -> str | None:
    """Why this place cannot be an output; None if it can, which then is taken."""
    folders = [key[:length] for length in range(1, len(key))]
    if key in taken.inputs:
        return f"is {taken.inputs[key]}"
    if key[:-1] in taken.inputs and PurePosixPath(key[-1]).suffix in SUFFIXES:  # a folder of images gets one more
        return f"lies in {taken.inputs[key[:-1]]}"
    if key in taken.outputs:
        return f"is the same file as the output of {taken.outputs[key]}"
    below = next((folder for folder in folders if folder in taken.outputs), None)
    if below is not None:
        return f"lies below the output of {taken.outputs[below]}, which is a file"
    if key in taken.above:
        return f"is a folder of the output of {taken.above[key]}"
    taken.outputs[key] = f"line {line}"
    for folder in folders:
        taken.above.setdefault(folder, f"line {line}")
    return None


def _key(place: str) -> Key:
    """The key of an absolute path, with links followed, or of a URL."""
    if is_remote(place):
        parts = urlsplit(place)
        path = PurePosixPath(os.path.normpath(f"/{parts.netloc}/{unquote(parts.path)}"))
        return _folded((f"{parts.scheme}:", *path.parts[1:]))
    return _folded(Path(os.path.realpath(place)).parts)


def _output_key(root: str, output: str, key: Callable[[str], Key]) -> Key:
    *folders, name = PurePosixPath(os.path.normpath(output)).parts or (".",)
    return (*key("/".join([root.rstrip("/") or "/", *folders])), *_folded((name,)))


def _folded(parts: tuple[str, ...]) -> Key:
    return tuple(unicodedata.normalize("NFC", part).lower() for part in parts)
