"""What holds for every job that does not say otherwise: a YAML or TOML file, and flags above it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from kvlock_fast.batch.fields import NAMES, OWN_TO_A_JOB, TEXTS, problems_of, short
from kvlock_fast.errors import InputError

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
