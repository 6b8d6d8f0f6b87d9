"""The manifest: JSON lines or CSV in, jobs out, or everything that is wrong with it at once."""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvlock_fast.batch.fields import (
    NAMES,
    OWN_TO_A_JOB,
    TEXTS,
    JobFields,
    lock_of,
    made_of,
    no_constant,
    no_doubles,
    problems_of,
    short,
)
from kvlock_fast.batch.jobs import Job, Setup
from kvlock_fast.batch.places import id_problem, numbered, output_problem
from kvlock_fast.config import CacheConfig
from kvlock_fast.errors import InputError
from kvlock_fast.files import refuse_special
from kvlock_fast.settings import Finish, MaskShape

MOST_LINE = 1 << 22


@dataclass
class Reading:
    """Contents of a manifest: jobs, and problems of the lines that are none."""

    path: Path
    jobs: list[Job] = field(default_factory=list)
    problems: list[tuple[int, str, str]] = field(default_factory=list)

    def wrong(self, line: int, name: str, sentence: str) -> None:
        self.problems.append((line, name, sentence))

    def sentences(self) -> list[str]:
        """Problems as `line N: field: sentence`, in the order of the lines; unprintable text is escaped."""
        rows = sorted(self.problems, key=lambda row: row[0])
        # A list of prompts is several jobs with the same fault.
        return [
            f"line {line}: {name}: {sentence}".encode(errors="backslashreplace").decode()
            for line, name, sentence in dict.fromkeys(rows)
        ]


def read_manifest(path: Path, folder: Path, defaults: dict[str, Any], dtype: str = "auto") -> Reading:
    """Every job of a .jsonl or .csv file; folder: where results go; defaults: fields for lines that lack them.

    Raises InputError only where the file cannot be read at all; what is wrong with its lines is in the reading.
    """
    reading = Reading(path)
    ids: dict[str, int] = {}
    outputs: dict[str, int] = {}
    for line, values in _lines(path, reading):
        merged = {**defaults, **values}
        problems = problems_of(merged)
        for name, sentence in problems:
            reading.wrong(line, name, sentence)
        wrong = {name for name, _ in problems}
        jobs = [] if wrong else _jobs(line, JobFields.model_validate(merged).model_dump(), dtype, reading)
        if wrong and "id" not in wrong:  # that an id comes twice is worth saying beside other faults
            _claim(ids, merged["id"], line, "id", reading)
        for job in jobs:
            _claim(ids, job.id, line, "id", reading)
            why = output_problem(job.output, folder)
            if why is not None:
                reading.wrong(line, "output", why)
            else:
                _claim(outputs, job.output, line, "output", reading)
                reading.jobs.append(job)
    if not reading.jobs and not reading.problems:
        raise InputError(f"the manifest '{path}' holds no job")
    return reading


def _claim(taken: dict[str, int], name: str, line: int, what: str, reading: Reading) -> None:
    if name in taken:
        reading.wrong(line, what, f"{short(name)} is that of line {taken[name]} already")
    else:
        taken[name] = line


def _jobs(line: int, values: dict[str, Any], dtype: str, reading: Reading) -> list[Job]:
    """The job of checked fields, or one for each of its prompts."""
    why = id_problem(values["id"])
    if why is not None:
        reading.wrong(line, "id", why)
        return []
    try:
        setup = _setup(values, dtype)
    except ValueError as error:  # values that are each right, and wrong together
        name, _, sentence = str(error).partition(" ")
        reading.wrong(line, name, sentence)
        return []
    why = _window_problem(setup)
    if why is not None:
        reading.wrong(line, *why)
        return []
    finish = made_of(Finish, values)
    id, output = values["id"], values["output"] or f"{values['id']}.mp4"
    if isinstance(values["prompt"], str):
        return [Job(id, values["prompt"], output, setup, finish, line)]
    return [
        Job(f"{id}-{number}", prompt, numbered(output, number) if output.strip("/.") else output, setup, finish, line)
        for number, prompt in enumerate(values["prompt"], start=1)
    ]


def _window_problem(setup: Setup) -> tuple[str, str] | None:
    """A field and what is wrong with how a long clip is cut, as far as that shows without the model."""
    frames, overlap = setup.clip_frames, setup.clip_overlap
    if frames is None:
        return None if overlap is None else ("clip_overlap", f"needs clip_frames, got {overlap} alone")
    if overlap is not None and overlap >= frames:
        return "clip_overlap", f"must be less than clip_frames, which is {frames}, got {overlap}"
    if setup.cache.tier == "disk":
        reason = "stretches are kept in memory or run along only"
        return "clip_frames", f"does not go with cache_tier 'disk', got {frames}: {reason}"
    return None


def _setup(values: dict[str, Any], dtype: str) -> Setup:
    height, _, width = (values["size"] or "").lower().partition("x")
    return made_of(
        Setup,
        values,
        dtype=dtype,
        size=(int(height), int(width)) if height else None,
        lock=lock_of(values),
        cache=made_of(CacheConfig, values),
        mask_shape=made_of(MaskShape, values),
    )


def _lines(path: Path, reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    """The fields of each line, with its number from 1; what cannot be read goes to the reading."""
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".ndjson", ".csv"):
        raise InputError(f"the manifest '{path}' must be a .jsonl or .csv file")
    refuse_special(path)
    try:
        with path.open("rb") as file:
            yield from _csv_lines(path, file, reading) if suffix == ".csv" else _json_lines(file, reading)
    except OSError as error:
        raise InputError(f"the manifest '{path}' cannot be read: {error.strerror or error}") from error


def _json_lines(file: Any, reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, raw in enumerate(iter(lambda: file.readline(MOST_LINE + 1), b""), start=1):
        if len(raw) > MOST_LINE:
            reading.wrong(number, "json", f"is longer than {MOST_LINE} bytes")
            return
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not text:
                continue
            values = json.loads(text, object_pairs_hook=no_doubles, parse_constant=no_constant)
        except (ValueError, RecursionError) as error:
            reading.wrong(number, "json", f"cannot be read: {error}")
            continue
        if isinstance(values, dict):
            yield number, values
        else:
            reading.wrong(number, "json", f"must be an object of fields, got {short(values)}")


def _csv_lines(path: Path, file: Any, reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield fields by the names in the first line; an empty cell is not given."""
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the manifest '{path}' is not UTF-8 text: {error}") from error
    rows = csv.reader(text.splitlines(keepends=True), strict=True)
    try:
        names = next(rows, [])
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"the manifest '{path}' has the column '{name}' twice")
        begin = rows.line_num + 1
        for cells in rows:
            number, begin = begin, rows.line_num + 1
            if not any(cells):
                continue
            if len(cells) > len(names):
                reading.wrong(number, "csv", f"has {len(cells)} cells, and the first line has {len(names)} names")
                continue
            pairs = zip(names, cells, strict=False)
            yield number, {name: typed(name, cell) for name, cell in pairs if cell != ""}
    except csv.Error as error:
        raise InputError(f"the manifest '{path}' cannot be read as CSV near line {rows.line_num}: {error}") from error


MOST_BYTES = 1 << 20


def read_defaults(path: Path | None) -> dict[str, Any]:
    """The fields of a .yaml, .yml or .toml file. Raises InputError naming the file and the field."""
    if path is None:
        return {}
    data = _load(Path(path))
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise InputError(f"the defaults '{path}' must be names with values, got {short(data)}")
    _check(data, f"the defaults '{path}'")
    return data


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """NAME=VALUE as typed after --set; a value of a field that is no text is JSON, or else a word."""
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise InputError(f"--set must be NAME=VALUE, like --set kappa=15, got '{setting[:80]}'")
        if name in found:
            raise InputError(f"--set names '{name}' twice")
        found[name] = typed(name, value)
    _check(found, "--set")
    return found


def typed(name: str, value: str) -> Any:
    """A field's value from text: what is no text field is JSON where it can be read so, like 3, true or [1, 2]."""
    if name in TEXTS or (name == "prompt" and not value.lstrip().startswith("[")):
        return value
    try:
        return json.loads(value, parse_constant=lambda word: word)
    except ValueError:
        return value


def check_flags(flags: dict[str, Any]) -> None:
    """Raise InputError naming the option whose value no job could have."""
    for name, sentence in problems_of(flags, partial=True):
        raise InputError(f"--{name.replace('_', '-')}: {sentence}")


def _check(data: dict[str, Any], where: str) -> None:
    for name in OWN_TO_A_JOB:
        if name in data:
            raise InputError(f"{where}: {name}: is each job's own, and has no default")
    for name, sentence in problems_of(data, partial=True):
        raise InputError(f"{where}: {name}: {sentence}")
    assert set(data) <= set(NAMES)


def _load(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise InputError(f"the defaults '{path}' must be a .yaml, .yml or .toml file")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"the defaults '{path}' are larger than {MOST_BYTES} bytes")
        refuse_special(path)
        text = path.read_bytes().decode()
    except OSError as error:
        raise InputError(f"the defaults '{path}' cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the defaults '{path}' are not UTF-8 text: {error}") from error
    import yaml

    try:
        return tomllib.loads(text) if suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"the defaults '{path}' cannot be read: {' '.join(str(error).split())[:300]}") from error
