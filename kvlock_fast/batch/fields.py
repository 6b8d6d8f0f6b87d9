"""The fields of a manifest's line: types, ranges, and what is wrong with one, in words."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Annotated, Any, Literal, Optional

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from kvlock_fast.config import LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.media import check_box, is_box
from kvlock_fast.parameters import Parameter, declared
from kvlock_fast.renamed import CACHE_STEPS, FIELDS, REPLACED
from kvlock_fast.settings import JOB, MOST_TEXT

SIZE = r"^[1-9][0-9]{0,4}[xX][1-9][0-9]{0,4}$"
MOST_ID = 128

Text = Annotated[str, Field(min_length=1, max_length=MOST_TEXT)]


class OwnFields(BaseModel):
    """A job: a line of the manifest. What is not given is taken from the defaults."""

    model_config = ConfigDict(extra="forbid", strict=True, title="kvlock-fast batch: a job")

    id: Annotated[str, Field(min_length=1, max_length=MOST_ID, description="Its name; each job has another.")]
    prompt: Annotated[
        Text | Annotated[list[Text], Field(min_length=1, max_length=10_000)],
        Field(description="What the edit shall show; a list makes a job of each: ID-1, ID-2, ..."),
    ]
    output: Annotated[Text | None, Field(description="A file name below the output folder; else ID.mp4.")] = None


def _type_of(one: Parameter) -> Any:
    """The type of a field, without None, as pydantic has it: choices, bounds, or a word beside a number."""
    if one.words and not one.is_number:
        return Literal[one.words]
    if bool in one.types:
        return bool
    if tuple[int, int] in one.types:
        return Annotated[str, Field(pattern=SIZE)]
    if str in one.types and not one.is_number:
        return Annotated[str, Field(min_length=1 if one.what else one.low, max_length=MOST_TEXT)]
    if tuple[float, float] in one.types:
        return Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=2, max_length=2)]
    if not one.is_number:
        return Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    bounds: dict[str, Any] = {"ge": one.low, "gt": one.above, "le": one.high, "lt": one.below}
    kind: Any = int
    if float in one.types:
        kind, bounds["allow_inf_nan"] = float, None if one.high or one.below else False
    number: Any = Annotated[kind, Field(**{name: bound for name, bound in bounds.items() if bound is not None})]
    return number | Literal[one.words] if one.words else number


def _field_of(one: Parameter, by_preset: bool) -> tuple[Any, Any]:
    """Type and default of a field; by_preset: what is not given is the preset's."""
    about = Field(description=f"{one.text}.")
    if one.required:
        return Annotated[_type_of(one), about], ...
    default = None if by_preset else one.default
    kind = _type_of(one)
    return (Annotated[Optional[kind], about] if default is None else Annotated[kind, about]), default  # noqa: UP045


_OF_THE_LOCK = declared(LockConfig)
_FIELDS: dict[str, Any] = {one.name: _field_of(one, one in _OF_THE_LOCK) for one in declared(*JOB) if one.manifest}
JobFields: type[OwnFields] = create_model("JobFields", __base__=OwnFields, __doc__=OwnFields.__doc__, **_FIELDS)

NAMES = tuple(JobFields.model_fields)
LOCK_NAMES = tuple(f.name for f in fields(LockConfig))
OWN_TO_A_JOB = ("id", "output", "prompt")
"""Fields that no default can give."""
TEXTS = frozenset({"id", "source", "mask", "source_prompt", "negative_prompt", "output", "model", "size"})
"""Fields whose value is never read as JSON."""

Problem = tuple[str, str]
"""A field, and a sentence about it."""


def problems_of(values: dict[str, Any], partial: bool = False) -> list[Problem]:
    """List what is wrong with the fields that are given; partial: none is required (defaults)."""
    found: dict[str, str] = {}
    try:
        JobFields.model_validate(values)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            name = str(fault["loc"][0])
            if not (partial and fault["type"] == "missing"):
                found.setdefault(name, _sentence(name, fault, values))
    for name in values:
        if name in NAMES and name not in found and (why := _text_problem(values[name])):
            found[name] = why
    if "mask" in values and "mask" not in found and (why := _box_problem(values["mask"])):
        found["mask"] = why
    return list(found.items())


def _sentence(name: str, fault: ErrorDetails, values: dict[str, Any]) -> str:
    if fault["type"] == "missing":
        return "is missing"
    if name in FIELDS:
        return f"is called {FIELDS[name]!r} now: kvlock-fast migrate rewrites a manifest"
    if name in REPLACED:
        return f"is called {REPLACED[name]!r} now, and takes another value"
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, NAMES, 1)
        return f"is no field of a job{f'; did you mean {near[0]!r}?' if near else ''}"
    value = values[name]
    if name == "cache_steps" and isinstance(value, str) and value in CACHE_STEPS:
        return f"{value!r} is called {CACHE_STEPS[value]!r} now: kvlock-fast migrate rewrites a manifest"
    if value is None:
        return "must not be null: leave it out instead"
    if why := _text_problem(value):
        return why
    if name in LOCK_NAMES and (why := lock_problem(name, value)):
        return why
    if name == "prompt":
        return f"must be a text or a non-empty list of texts, none of them empty, got {short(value)}"
    if name == "size":
        return f"must be HEIGHTxWIDTH in pixels, like 480x832, got {short(value)}"
    said = fault["msg"].replace("Input should be", "must be").replace("String should", "must")
    return f"{said.replace(' valid', '')}, got {short(value)}"


def lock_problem(name: str, value: Any) -> str | None:
    """Describe what is wrong with a value of the lock, without the name in front."""
    try:
        LockConfig.preset("paper", **{name: value})
    except (ValueError, TypeError) as error:
        return str(error).removeprefix(f"{name} ")
    return None


def _text_problem(value: Any) -> str | None:
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            continue
        if "\0" in text:
            return f"must not hold a NUL, got {short(text)}"
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"is no text that a file can hold: {text[:80]!a}"
    return None


def _box_problem(mask: str) -> str | None:
    """Describe what is wrong with a box mask, as far as that shows without the video."""
    try:
        if is_box(mask):
            check_box(mask)
    except InputError as error:
        return str(error)
    return None


def short(value: Any) -> str:
    """The value quoted, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def lock_of(values: dict[str, Any]) -> LockConfig:
    """The lock of checked fields."""
    changes = {name: values[name] for name in LOCK_NAMES if values.get(name) is not None}
    return LockConfig.preset(values["preset"], **changes)


def made_of(kind: type[Any], values: dict[str, Any], **more: Any) -> Any:
    """A dataclass of parameters from checked fields. more: its values that no field has."""
    given = {one.attribute: values[one.name] for one in declared(kind) if one.name in values and one.manifest}
    return kind(**{**given, **more})


def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object of JSON. Raises ValueError where one is there twice."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the field {name!r} is there twice")
        fields[name] = value
    return fields


def no_constant(word: str) -> Any:
    """Raise ValueError for NaN and infinities, which JSON does not have."""
    raise ValueError(f"{word} is no number of JSON")
