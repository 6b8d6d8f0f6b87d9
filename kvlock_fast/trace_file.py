"""A trace that was written to a file, read back and checked: it may come from anywhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from kvlock_fast.errors import InputError

MOST_BYTES = 256 << 20
MOST_STEPS = 10_000
MOST_TOKENS = 10**9

_VALUES = ("variance", "alpha", "omega", "s_star", "seconds")


def read_trace(path: Path) -> dict[str, Any]:
    """What `edit --trace` and `demo` write: prompts, steps, warmup_steps, records; settings, metrics, files, command.

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
    """What is wrong with a trace, in words."""


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
    if not _whole(steps, 1, MOST_STEPS) or not _whole(warmup, 0, MOST_STEPS):
        raise _Wrong(f"steps is {_short(steps)} and warmup_steps is {_short(warmup)}")
    records = data["records"]
    if not isinstance(records, list) or len(records) > steps * len(prompts):
        raise _Wrong("records is not a list with at most one of each step and prompt")
    if not _whole(data.get("tokens", 0), 0, MOST_TOKENS):
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


def _check_record(index: int, record: Any, steps: int, prompts: int) -> None:
    if not isinstance(record, dict):
        raise _Wrong(f"record {index} is {_short(record)}")
    if not _whole(record.get("tokens", 0), 0, MOST_TOKENS):
        raise _Wrong(f"record {index} has {_short(record['tokens'])} as its tokens")
    for name, most in (("step", steps), ("sample", prompts)):
        if not _whole(record.get(name), 0, most - 1):
            raise _Wrong(f"record {index} has {_short(record.get(name))} as its {name}")
    for name in _VALUES:
        value = record.get(name)
        if name not in record or not _number_or_none(value) or (name == "seconds" and value is None):
            raise _Wrong(f"record {index} has {_short(value)} as its {name}")


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number_or_none(value: Any) -> bool:
    if value is None:
        return True
    # A whole number of JSON may be too large for a float.
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
