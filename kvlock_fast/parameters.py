"""One declaration per parameter: the metadata of a dataclass field, and what is made from it.

A parameter has its default, help, bounds, choices and panel in the field that holds it. From there come the checks of
`__post_init__`, the Args block of the class, the options of the command line, the fields of a manifest's line and the
options page of the docs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from inspect import cleandoc
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Protocol, TypeVar, get_args

EDIT, MASK, MODEL, LOCK = "What to edit", "Mask", "Model", "Lock"
MEMORY, SPEED, OUTPUT, OTHERS = "Memory", "Speed", "Output", "Other methods"
SHARE = {"low": 0, "high": 1}
PANELS = (EDIT, MASK, MODEL, LOCK, MEMORY, SPEED, OUTPUT, OTHERS)


class DataclassInstance(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """What is declared of a parameter beside its type and default.

    Args:
        help: One plain sentence.
        panel: The panel of the command's help, one of `PANELS`.
        name: Name on the command line and in a manifest, where it is not the field's.
        said: Name in error sentences, where it is not the field's.
        choices: The only values.
        word: A word that may stand instead of a number.
        low: Least value, or least length of a text.
        above: Value that must be exceeded.
        high: Greatest value, or greatest length of a text.
        below: Value that must not be reached.
        unit: Unit of a number, as in "pixels".
        shown: Text of the values in help and docs, where it is not made of the rest.
        what: Noun for a text that must not be empty, as in "a folder".
        unset: What happens where the default is None.
        sentence: Error sentence with {name} and {value!r}, where the usual one does not serve.
        manifest: Whether a line of a manifest may give it.
    """

    help: str
    panel: str
    name: str = ""
    said: str = ""
    choices: Sequence[str] = ()
    word: str = ""
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    unit: str = ""
    shown: str = ""
    what: str = ""
    unset: str = ""
    sentence: str = ""
    manifest: bool = True


def described(help: str, panel: str, **more: Any) -> dict[str, Parameter]:
    """The metadata of a field that has no default. more: as `Parameter` has them."""
    return {"parameter": Parameter(help=help, panel=panel, **more)}


def parameter(default: Any, help: str, panel: str, **more: Any) -> Any:
    """A dataclass field with a default, help and panel. more: as `Parameter` has them."""
    return field(default=default, metadata=described(help, panel, **more))


@dataclass(frozen=True)
class Declared:
    """A parameter together with its field: name, types (without None) and default."""

    attribute: str
    types: tuple[Any, ...]
    optional: bool
    default: Any
    about: Parameter

    @property
    def name(self) -> str:
        """Name on the command line and in a manifest."""
        return self.about.name or self.attribute

    @property
    def option(self) -> str:
        """Option of the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def values(self) -> str:
        """The values it takes, in short: `dynamic|0..1`, `int>=2`, `HEIGHTxWIDTH`."""
        about = self.about
        if about.shown or about.choices:
            return about.shown or "|".join(about.choices)
        if not self.is_number:
            return "" if bool in self.types else "PATH" if Path in self.types else "TEXT"
        number = "float" if float in self.types else "int"
        if about.low is not None and about.high is not None:
            number = f"{about.low}..{about.high}" if about.high < 2**31 else f"{number}>={about.low}"
        elif about.low is not None and about.below is not None:
            number = f"{about.low}..<{about.below}"
        elif about.above is not None and about.high is not None:
            number = f">{about.above}..{about.high}"
        elif about.low is not None or about.above is not None:
            number += f">={about.low}" if about.above is None else f">{about.above}"
        return f"{about.word}|{number}" if about.word else number

    @property
    def amount(self) -> str:
        """The values with their unit."""
        return f"{self.values} {self.about.unit}".strip()

    @property
    def is_number(self) -> bool:
        return float in self.types or int in self.types

    @property
    def default_text(self) -> str:
        """The default as a reader types it, or what happens without a value."""
        if any(self.default is nothing for nothing in (None, MISSING, False)):
            return self.about.unset
        return "on" if self.default is True else str(self.default)

    @property
    def text(self) -> str:
        """The help, with the default in brackets."""
        return f"{self.about.help} (default: {self.default_text})" if self.default_text else self.about.help

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, as a sentence without its subject; None if nothing is."""
        about = self.about
        if value is None and self.optional:
            return None
        if about.choices:
            return None if value in about.choices else f"must be one of {', '.join(about.choices)}"
        if bool in self.types:
            return None if isinstance(value, bool) else "must be True or False"
        if about.what:
            right = isinstance(value, (str, PathLike)) and str(value)
            return None if right else f"must be {about.what}"
        if not self.is_number or (about.word and value == about.word):
            return None
        whole = float not in self.types
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if number and math.isfinite(value) and self._within(value):
            return None
        return f"must be {self._bounds(whole)}" + (f" or {about.word!r}" if about.word else "")

    def _within(self, value: float) -> bool:
        about = self.about
        return (
            (about.low is None or value >= about.low)
            and (about.above is None or value > about.above)
            and (about.high is None or value <= about.high)
            and (about.below is None or value < about.below)
        )

    def _bounds(self, whole: bool) -> str:
        low, high = self.about.low, self.about.high
        least = self.about.above if low is None else low
        if whole and high is None:
            return f"a whole number of at least {low}"
        if whole:
            return f"{low} or {high}" if low is not None and high == low + 1 else f"a whole number from {low} to {high}"
        if high is not None:
            return f"between {least} and {high}"
        return f"at least {low}" if low is not None else f"greater than {least}"


def declared(kind: type[DataclassInstance]) -> Iterator[Declared]:
    """The declared parameters of a dataclass, in the order of its fields."""
    for f in fields(kind):
        about = f.metadata.get("parameter")
        if about is not None:
            types = get_args(f.type) if isinstance(f.type, UnionType) else (f.type,)
            kept = tuple(member for member in types if member is not NoneType)
            yield Declared(f.name, kept, len(kept) < len(types), f.default, about)


def check(config: DataclassInstance, error: type[ValueError] = ValueError) -> None:
    """Raise `error` for a value that its declaration does not allow: the sentence names it and quotes the value."""
    for one in declared(type(config)):
        value = getattr(config, one.attribute)
        problem = one.problem(value)
        if problem is not None:
            sentence = one.about.sentence or f"{{name}} {problem}, got {{value!r}}"
            raise error(sentence.format(name=one.about.said or one.attribute, value=value))


K = TypeVar("K", bound=type[Any])


def documented(kind: K) -> K:
    """Decorate a dataclass: its docstring gets an Args block made of the declarations."""
    rows = [f"    {one.attribute}: {one.text}" + (f" [{one.amount}]" if one.amount else "") for one in declared(kind)]
    kind.__doc__ = "\n".join([cleandoc(kind.__doc__ or ""), "", "Args:", *rows])
    return kind
