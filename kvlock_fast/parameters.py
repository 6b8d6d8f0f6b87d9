"""One declaration per parameter: the metadata of a dataclass field, and what is made from it.

A parameter has its default, help, bounds, choices and panel in the field that holds it. From there come the checks of
`__post_init__`, the Args block of the class, the options of the command line, the fields of a manifest's line and the
options page of the docs.
"""

import math
import re
import sys
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from inspect import cleandoc
from os import PathLike
from types import NoneType, UnionType
from typing import Any, ClassVar, Protocol, TypeGuard, TypeVar, get_args

EDIT, MASK, MODEL, LOCK = "What to edit", "Mask", "Model", "Lock"
MEMORY, SPEED, OUTPUT, OTHERS = "Memory", "Speed", "Output", "Other methods"
PANELS = (EDIT, MASK, MODEL, LOCK, MEMORY, SPEED, OUTPUT, OTHERS)


def is_whole(value: object, low: float = -math.inf, high: float = math.inf) -> TypeGuard[int]:
    """Say whether a value is a whole number from low to high; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


class DataclassInstance(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


_RANGE = re.compile(r"(?P<least>>=?)?(?P<low>-?[0-9]+)(?:\.\.(?P<below><)?(?P<high>[0-9]+))?(?: (?P<unit>[a-z]+))?")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """Declaration of a parameter. `described` reads words and bounds from the values.

    Args:
        help: One plain sentence.
        values: Words and ranges, as in "dynamic|0..1", "all|dynamic", ">=2 frames" or "0..<1"; or one word for a form.
        panel: Panel of a command's help, one of `PANELS`.
        name: Name on the command line and in a manifest (default: the field's).
        said: Name in error sentences.
        what: Noun for a text that must not be empty, as in "a folder".
        unset: What a default of None means.
        sentence: Error sentence with {name}, {value!r}, {words} and {low}, where the usual one does not serve.
        manifest: Whether a line of a manifest may give it.
        words: The words among the values: choices, or what may stand instead of a number.
        low, above: Least number, or number that must be exceeded; for a text the least length.
        high, below: Greatest number, or number that must not be reached.
        attribute, types, optional, default: Name, types without None, whether it may be None, and default.
    """

    help: str
    values: str
    panel: str
    name: str = ""
    said: str = ""
    what: str = ""
    unset: str = ""
    sentence: str = ""
    manifest: bool = True
    words: tuple[str, ...] = ()
    low: int | None = None
    above: int | None = None
    high: int | None = None
    below: int | None = None
    attribute: str = ""
    types: tuple[Any, ...] = ()
    optional: bool = False
    default: Any = None

    @property
    def option(self) -> str:
        """Option of the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is MISSING

    @property
    def is_number(self) -> bool:
        """Whether the value is a number, or a word instead of one."""
        return float in self.types or int in self.types

    @property
    def default_text(self) -> str:
        """The default as a reader types it, or what happens without a value."""
        if any(self.default is nothing for nothing in (None, MISSING, False, ())):
            return self.unset
        return "on" if self.default is True else str(self.default)

    @property
    def text(self) -> str:
        """The help, with the default in brackets."""
        return f"{self.help} (default: {self.default_text})" if self.default_text else self.help

    def problem(self, value: Any) -> str | None:
        """Describe what is wrong with a value, in a sentence without its subject; None if nothing is."""
        if value is None and self.optional:
            return None
        if self.words and str in self.types and not self.is_number:
            return None if value in self.words else f"must be one of {', '.join(self.words)}"
        if bool in self.types:
            return None if isinstance(value, bool) else "must be True or False"
        if self.what:
            return None if isinstance(value, (str, PathLike)) and str(value) else f"must be {self.what}"
        if not self.is_number or value in self.words:
            return None
        if is_whole(value) or (isinstance(value, float) and float in self.types):
            # Neither NaN, nor infinite, nor too large for a float.
            fits = float not in self.types or abs(value) <= sys.float_info.max
            if fits and self._within(value):
                return None
        return f"must be {self._bounds()}"

    def _within(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )

    def _bounds(self) -> str:
        low, high, least = self.low, self.high, self.low if self.above is None else self.above
        if float not in self.types:
            if high is None:
                return f"a whole number of at least {low}"
            return f"{low} or {high}" if low == high - 1 else f"a whole number from {low} to {high}"
        bound = f"at least {low}" if self.above is None else f"greater than {least}"
        bound = bound if high is None else f"between {least} and {high}"
        bound = bound if self.below is None else f"{bound} and less than {self.below}"
        return f"{bound} or {self.words[0]!r}" if self.words else bound


def described(help: str, values: str, panel: str, **more: Any) -> dict[str, Parameter]:
    """Metadata of a field that has no default. more: as `Parameter` has them."""
    parts = values.split("|")
    ranges = [found for part in parts if (found := _RANGE.fullmatch(part))]
    for found in ranges:
        more = {"above" if found["least"] == ">" else "low": int(found["low"]), **more}
        if found["high"]:
            more = {"below" if found["below"] else "high": int(found["high"]), **more}
    words = tuple(part for part in parts if not _RANGE.fullmatch(part)) if len(parts) > 1 else ()
    return {"parameter": Parameter(help=help, values=values, panel=panel, **{"words": words, **more})}


def parameter(default: Any, values: str, help: str, panel: str, **more: Any) -> Any:
    """A dataclass field with a default, values, help and panel. more: as `Parameter` has them."""
    return field(default=default, metadata=described(help, values, panel, **more))


def again(kind: type[DataclassInstance], attribute: str, **changes: Any) -> Any:
    """A dataclass field as another class declares it, default and all. changes: as `Parameter` has them."""
    [one] = [one for one in declared(kind) if one.attribute == attribute]
    return field(default=one.default, metadata={"parameter": replace(one, **changes)})


@cache
def declared(*kinds: type[DataclassInstance]) -> tuple[Parameter, ...]:
    """The declared parameters of dataclasses, in the order of their fields."""
    found = []
    for f in (f for kind in kinds for f in fields(kind) if "parameter" in f.metadata):
        types = get_args(f.type) if isinstance(f.type, UnionType) else (f.type,)
        kept, about = tuple(member for member in types if member is not NoneType), f.metadata["parameter"]
        own = {"name": about.name or f.name, "attribute": f.name, "default": f.default}
        found.append(replace(about, **own, types=kept, optional=len(kept) < len(types)))
    return tuple(found)


def check(config: DataclassInstance, error: type[ValueError] = ValueError) -> None:
    """Raise `error` for a value that its declaration does not allow: the sentence names it and quotes the value.

    An InputError names it as the command line and the manifest do, a ValueError by its field.
    """
    for one in declared(type(config)):
        value = getattr(config, one.attribute)
        problem = one.problem(value)
        if problem is not None:
            name = one.said or (one.attribute if error is ValueError else one.name)
            words = ", ".join(map(repr, one.words))
            sentence = one.sentence or f"{{name}} {problem}, got {{value!r}}"
            raise error(sentence.format(name=name, value=value, words=words, low=one.low))


K = TypeVar("K", bound=type[Any])


def documented(kind: K) -> K:
    """Decorate a dataclass: its docstring gets an Args block made of the declarations."""
    rows = [f"    {one.attribute}: {one.text} [{one.values}]".removesuffix(" []") for one in declared(kind)]
    kind.__doc__ = "\n".join([cleandoc(kind.__doc__ or ""), "", "Args:", *rows])
    return kind
