"""Manifests and files of defaults of version 0.1 with the names of today; nothing else in them changes."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from kvlock_fast.errors import InputError
from kvlock_fast.renamed import CACHE_STEPS, FIELDS


def migrate_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job under today's names, in their order. Raises InputError where both names are there."""
    for old, new in FIELDS.items():
        if old in values and new in values:
            raise InputError(f"{old} and {new} are both given, and {old} is called {new} now")
    renamed = {FIELDS.get(name, name): value for name, value in values.items()}
    steps = renamed.get("cache_steps")
    if isinstance(steps, str) and steps in CACHE_STEPS:
        renamed["cache_steps"] = CACHE_STEPS[steps]
    return renamed


def migrate_text(text: str, suffix: str, name: str) -> tuple[str, int]:
    """The text of a .jsonl, .csv, .yaml, .yml or .toml file with today's names, and how many lines changed.

    Raises InputError naming the file, and the line, that cannot be read.
    """
    if suffix == ".csv":
        return _csv(text, name)
    change = _json_line if suffix == ".jsonl" else _assignment
    lines = text.split("\n")
    fresh = []
    for number, line in enumerate(lines, start=1):
        try:
            fresh.append(change(line))
        except (ValueError, InputError) as error:
            raise InputError(f"'{name}', line {number}: {error}") from error
    return "\n".join(fresh), sum(a != b for a, b in zip(lines, fresh, strict=True))


def _json_line(line: str) -> str:
    if not line.strip():
        return line
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, not an object")
    renamed = migrate_fields(values)
    if list(renamed.items()) == list(values.items()):
        return line
    return json.dumps(renamed, ensure_ascii=False) + ("\r" if line.endswith("\r") else "")


_ASSIGNED = re.compile(r"""^(?P<quote>["']?)(?P<name>\w+)(?P=quote)(?P<between>\s*[:=]\s*)(?P<value>.*)$""", re.DOTALL)


def _assignment(line: str) -> str:
    """A line of flat YAML or TOML."""
    found = _ASSIGNED.match(line)
    if found is None:
        return line
    name, value = found["name"], found["value"]
    if name == "cache_steps":
        for old, new in CACHE_STEPS.items():
            value = re.sub(rf"^([\"']?){old}\1(?=\s|$)", rf"\g<1>{new}\g<1>", value)
    return f"{found['quote']}{FIELDS.get(name, name)}{found['quote']}{found['between']}{value}"


def _csv(text: str, name: str) -> tuple[str, int]:
    rows = list(csv.reader(io.StringIO(text, newline="")))
    if not rows:
        return text, 0
    header = rows[0]
    try:
        renamed = list(migrate_fields(dict.fromkeys(header)))
    except InputError as error:
        raise InputError(f"'{name}', line 1: {error}") from error
    column = header.index("cache_steps") if "cache_steps" in header else None
    fresh = [renamed if len(renamed) == len(header) else header, *(list(row) for row in rows[1:])]
    for row in fresh[1:]:
        if column is not None and column < len(row):
            row[column] = CACHE_STEPS.get(row[column], row[column])
    changed = sum(a != b for a, b in zip(rows, fresh, strict=True))
    if not changed:
        return text, 0
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\r\n" if "\r\n" in text else "\n").writerows(fresh)
    return out.getvalue(), changed


SUFFIXES = (".jsonl", ".csv", ".yaml", ".yml", ".toml")


def migrate_file(path: Path, output: Path | None) -> tuple[Path, int]:
    """Write a manifest with today's names to `output`; None: in its place, the old one kept beside it as NAME.0.1.

    Returns where it is, and how many lines changed; where none did, nothing is written. Raises InputError for a file
    that is no manifest, or where one would be overwritten.
    """
    from kvlock_fast.files import write_bytes

    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"'{path}' is no manifest: its name must end in {', '.join(SUFFIXES)}")
    try:
        data = path.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}") from error
    fresh, changed = migrate_text(text, path.suffix.lower(), str(path))
    if not changed:
        return path, 0
    kept = path.with_name(f"{path.name}.0.1")
    for place in (kept,) if output is None else (output,):
        if place.exists():
            raise InputError(f"'{place}' is there already: nothing is overwritten")
    if output is None:
        write_bytes(kept, data)
    write_bytes(output or path, fresh.encode())
    return output or path, changed


def migrate_spec(spec: str) -> str:
    """A job as a ledger of 0.1 has it, under today's names."""
    data = json.loads(spec)
    cache = data.get("cache", {})
    cache = {**cache, "steps": CACHE_STEPS.get(cache["steps"], cache["steps"])} if "steps" in cache else cache
    lock = {FIELDS.get(name, name): value for name, value in data.get("lock", {}).items()}
    nested = {name: value for name, value in (("lock", lock), ("cache", cache)) if name in data}
    return json.dumps({FIELDS.get(name, name): value for name, value in {**data, **nested}.items()})
