"""Manifests and files of defaults of version 0.1 with the names of today; what needs no other name stays as it was."""

from __future__ import annotations

import csv
import io
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvlock_fast.batch.fields import no_constant, no_doubles
from kvlock_fast.errors import InputError
from kvlock_fast.files import refuse_special, write_bytes
from kvlock_fast.renamed import CACHE_STEPS, FIELDS, REPLACED
from kvlock_fast.settings import PASTE

BOM = b"\xef\xbb\xbf"


def migrate_file(path: Path, output: Path | None) -> tuple[Path, int]:
    """Write a manifest with today's names to `output`; None: in its place, the old one kept beside it as NAME.0.1.

    Returns where it is, and how many lines changed; where none did, the file stays as it is. Raises InputError for a
    file that cannot be migrated, or where one would be overwritten.
    """
    if path.suffix.lower() not in _KINDS:
        raise InputError(f"'{path}' is no manifest: its name must end in {', '.join(_KINDS)}")
    refuse_special(path)
    try:
        data = path.read_bytes()
        bom = BOM if data.startswith(BOM) else b""
        text = data.removeprefix(bom).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}") from error
    fresh, changed = migrate_text(text, path.suffix.lower(), str(path))
    if output is None and not changed:
        return path, 0
    kept = path.with_name(f"{path.name}.0.1")
    place = kept if output is None else output
    if place.exists():
        raise InputError(f"'{place}' is there already: nothing is overwritten")
    if output is None:
        write_bytes(kept, data)
    write_bytes(output or path, bom + fresh.encode())
    return output or path, changed


def migrate_text(text: str, suffix: str, name: str) -> tuple[str, int]:
    """The text of a manifest or a file of defaults with today's names, and how many lines changed.

    Raises InputError naming the file, and the line where it is one line's fault.
    """
    return _KINDS[suffix](text, name)


def migrate_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job under today's names, in their order. Raises InputError where both names are there."""
    for old, new in FIELDS.items():
        if old in values and new in values:
            raise InputError(f"{old} and {new} are both given, and {old} is called {new} now")
    for old in REPLACED.keys() & values.keys():
        raise InputError(f"{old} is called {REPLACED[old]} now, and takes another value: change it by hand")
    renamed = {FIELDS.get(name, name): value for name, value in values.items()}
    steps = renamed.get("cache_steps")
    if isinstance(steps, str) and steps in CACHE_STEPS:
        renamed["cache_steps"] = CACHE_STEPS[steps]
    return renamed


def migrate_spec(spec: str) -> str:
    """A job as a ledger of version 1 or 2 has it, under today's names. Values take their new form.

    A raw result has no paste, so it is still what its line asks for. A composite of that time is not: it lacks a
    paste, and its feather was wider and outside the mask.
    """
    data = _without_old_feather(json.loads(spec))
    cache = data.get("cache", {})
    cache = {**cache, "steps": CACHE_STEPS.get(cache["steps"], cache["steps"])} if "steps" in cache else cache
    lock = {FIELDS.get(name, name): value for name, value in data.get("lock", {}).items()}
    lock = dict(_replaced(name, value, data) if name in REPLACED else (name, value) for name, value in lock.items())
    nested = {name: value for name, value in (("lock", lock), ("cache", cache)) if name in data}
    return json.dumps({FIELDS.get(name, name): value for name, value in {**data, **nested}.items()})


def _without_old_feather(data: dict[str, Any]) -> dict[str, Any]:
    if (data.get("feather") or 0) > 2:
        data = {**data, "feather": None}
    if data.get("composite") is not False or "paste" in data:
        return data
    items = list(data.items())
    place = 1 + list(data).index("feather") if "feather" in data else len(items)
    return dict([*items[:place], ("paste", PASTE), *items[place:]])


def _replaced(name: str, value: float, job: dict[str, Any]) -> tuple[str, float | list[float]]:
    """A parameter of the lock by its new name, and its value in the form of today."""
    return REPLACED[name], [0.0, value] if name == "lock_share" else value / job["steps"]


def _json_lines(text: str, name: str) -> tuple[str, int]:
    lines, fresh = text.split("\n"), []
    for number, line in enumerate(lines, start=1):
        try:
            fresh.append(_json_line(line))
        except (ValueError, RecursionError) as error:
            raise InputError(f"'{name}', line {number}: {error}") from error
    return "\n".join(fresh), sum(a != b for a, b in zip(lines, fresh, strict=True))


def _json_line(line: str) -> str:
    if not line.strip():
        return line
    values = json.loads(line, object_pairs_hook=no_doubles, parse_constant=no_constant)
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, not an object")
    renamed = migrate_fields(values)
    if list(renamed.items()) == list(values.items()):
        return line
    text = json.dumps(renamed, ensure_ascii=False)
    if not text.isascii() and text.encode(errors="replace") != text.encode(errors="ignore"):
        text = json.dumps(renamed)  # half of a pair of surrogates has no UTF-8
    return text + ("\r" if line.endswith("\r") else "")


def _csv(text: str, name: str) -> tuple[str, int]:
    """Rename row by row; a row that needs no other name keeps its text."""
    lines = text.splitlines(keepends=True)
    rows, begin, fresh, changed = csv.reader(lines, strict=True), 0, [], 0
    column = None
    try:
        for number, row in enumerate(rows):
            source, begin = "".join(lines[begin : rows.line_num]), rows.line_num
            if number == 0:
                if len(set(row)) < len(row):
                    raise InputError("a column is there twice")
                column = row.index("cache_steps") if "cache_steps" in row else None
                renamed = list(migrate_fields(dict.fromkeys(row)))
            else:
                renamed = [CACHE_STEPS.get(cell, cell) if i == column else cell for i, cell in enumerate(row)]
            changed += renamed != row
            fresh.append(source if renamed == row else _csv_row(renamed, source))
    except (csv.Error, InputError) as error:
        raise InputError(f"'{name}', line {max(rows.line_num, 1)}: {error}") from error
    return "".join(fresh), changed


def _csv_row(cells: list[str], source: str) -> str:
    ending = source[len(source.rstrip("\r\n")) :]
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator=ending).writerow(cells)
    return out.getvalue()


_ASSIGNED = re.compile(
    r"""^(?P<head>\s*(?P<quote>["']?))(?P<name>\w+)(?P<between>(?P=quote)\s*[:=]\s*)(?P<value>.*)$"""
)


def _assignments(parse: Callable[[str], Any], text: str, name: str) -> tuple[str, int]:
    """A flat file of YAML or TOML, line by line; what comes out must mean what was meant."""
    values = _parsed(parse, text, name)
    wanted = migrate_fields(values)
    lines = text.split("\n")
    fresh = [_assignment(line) for line in lines]
    if _parsed(parse, "\n".join(fresh), name) != wanted:
        old = ", ".join(sorted((FIELDS.keys() | {"cache_steps"}) & values.keys())) or "names in longer texts"
        raise InputError(f"'{name}' has {old} in a form that is not rewritten here: change it by hand")
    return "\n".join(fresh), sum(a != b for a, b in zip(lines, fresh, strict=True))


def _parsed(parse: Callable[[str], Any], text: str, name: str) -> dict[str, Any]:
    try:
        values = parse(text)
    except Exception as error:  # each library has errors of its own
        raise InputError(f"'{name}' cannot be read: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"'{name}' holds a {type(values).__name__}, not fields of a job")
    return values


def _assignment(line: str) -> str:
    found = _ASSIGNED.match(line)
    if found is None:
        return line
    name, value = found["name"], found["value"]
    if name == "cache_steps":
        for old, new in CACHE_STEPS.items():
            value = re.sub(rf"^([\"']?){old}\1(?=\s|#|$)", rf"\g<1>{new}\g<1>", value)
    return f"{found['head']}{FIELDS.get(name, name)}{found['between']}{value}"


def _yaml(text: str, name: str) -> tuple[str, int]:
    import yaml

    return _assignments(yaml.safe_load, text, name)


def _toml(text: str, name: str) -> tuple[str, int]:
    return _assignments(tomllib.loads, text, name)


_KINDS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".yaml": _yaml, ".yml": _yaml, ".toml": _toml}
