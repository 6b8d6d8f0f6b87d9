"""Results that would replace an input, or each other: every output of a manifest against all its files."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

from kvlock_fast.batch.fields import short
from kvlock_fast.batch.manifest import Reading
from kvlock_fast.batch.places import is_remote, local_path
from kvlock_fast.media import is_box

Key = tuple[str, ...]
"""The parts of a path that is resolved, as a file system sees them that takes no notice of case."""


@dataclass
class _Taken:
    """Whose a place is. inputs, outputs: by key, what to call it; above: by key, an output below it."""

    inputs: dict[Key, str] = field(default_factory=dict)
    outputs: dict[Key, str] = field(default_factory=dict)
    above: dict[Key, str] = field(default_factory=dict)


def enter_clashes(reading: Reading, base: Path, results: str) -> None:
    """Enter every output that is an input of any job, lies in one, or is another job's output under another name.

    base: what the manifest's paths are relative to; results: the folder or URL that outputs are relative to.
    """
    taken, resolved = _Taken(), cache(_key)  # links are read once
    if not is_remote(results):
        taken.inputs[resolved(reading.path)] = "the manifest itself"
    for job in reading.jobs:
        for name, place in (("source", job.setup.source), ("mask", job.setup.mask)):
            if not is_remote(place) and not (name == "mask" and is_box(place)):
                taken.inputs.setdefault(resolved(local_path(place, base)), f"the {name} of line {job.line}")
    for job in reading.jobs:
        why = _clash(_output_key(results, job.output, resolved), job.line, taken, remote=is_remote(results))
        if why is not None:
            reading.wrong(job.line, "output", f"{why}, got {short(job.output)}: nothing is overwritten")


def _clash(key: Key, line: int, taken: _Taken, remote: bool) -> str | None:
    """Why this place cannot be an output; None if it can, which then is taken."""
    folders = [key[:length] for length in range(1, len(key))]
    if not remote:
        if key in taken.inputs:
            return f"is {taken.inputs[key]}"
        if key[:-1] in taken.inputs:  # a folder of images, which would have one more
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


def _key(path: Path) -> Key:
    return _folded(Path(os.path.realpath(path)).parts)


def _output_key(results: str, output: str, resolved: Callable[[Path], Key]) -> Key:
    *folders, name = PurePosixPath(os.path.normpath(output)).parts
    if is_remote(results):
        return _folded((*folders, name))
    return (*resolved(local_path(results, Path()).joinpath(*folders)), *_folded((name,)))


def _folded(parts: tuple[str, ...]) -> Key:
    return tuple(unicodedata.normalize("NFC", part).casefold() for part in parts)
