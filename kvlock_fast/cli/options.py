"""Options made from declared parameters, and how what was typed becomes a value."""

import inspect
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.parameters import OUTPUT, PANELS, DataclassInstance, Parameter, declared
from kvlock_fast.settings import EditFiles, EditSettings, MaskShape, Preset
from kvlock_fast.units import parse_bytes

_OWN_SENTENCES = {one.name for one in declared(LockConfig, CacheConfig)}
D = TypeVar("D", bound=DataclassInstance)

ALL = {one.name: one for one in declared(EditFiles, EditSettings, MaskShape, Preset, LockConfig, CacheConfig)}
"""Every declared parameter by its name on the command line."""


def option(text: str, *names: str, panel: str | None = None, **more: Any) -> Any:
    """An option that belongs to one command alone."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


JsonFile = Annotated[str | None, option(ALL["json"].text, "--json", panel=OUTPUT)]
Quiet = Annotated[bool, option("Show no progress", "--quiet", "-q", panel=OUTPUT)]


@dataclass(frozen=True)
class Given:
    """The options of a command that are made from declared parameters, as typed; None where one was not given."""

    typed: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.typed[name]

    def values(self, kind: type[DataclassInstance]) -> dict[str, Any]:
        """Values for the fields of a dataclass, by the fields' names: only what was given."""
        found = ((one, self.typed.get(one.name)) for one in declared(kind))
        return {one.attribute: parsed(one, value) for one, value in found if value is not None}

    def make(self, kind: type[D], **more: Any) -> D:
        """A dataclass from what was given. more: further values, which count more."""
        return kind(**{**self.values(kind), **more})

    def lock(self) -> LockConfig:
        """The preset with the values that were given. Raises InputError naming the bad one."""
        values = self.values(LockConfig)
        try:
            return LockConfig.preset(self.make(Preset).preset, **values)
        except ValueError as error:
            raise InputError(str(error)) from error

    def cache(self) -> CacheConfig:
        """The cache's configuration. Raises InputError naming the bad value."""
        values = self.values(CacheConfig)
        try:
            return CacheConfig(**values)
        except ValueError as error:
            raise InputError(f"cache {error}") from error

    def settings(self, **more: Any) -> EditSettings:
        """All settings of an edit. more: further values, which count more."""
        nested = {"lock": self.lock(), "cache": self.cache(), "mask_shape": self.make(MaskShape)}
        return self.make(EditSettings, **nested, **more)


C = TypeVar("C", bound=Callable[..., Any])


def takes(
    *wanted: str | Parameter, optional: Sequence[str] = (), also: Mapping[str, str] | None = None
) -> Callable[[C], C]:
    """Decorate a command: it gets the options of declared parameters, and `given` holds what was typed.

    Args:
        wanted: The parameters, or their names in `ALL`.
        optional: Names among them that need not be given.
        also: Other spellings of an option, by its name.
    """
    made = [ALL[one] if isinstance(one, str) else one for one in wanted]
    more = also or {}

    def decorate(function: C) -> C:
        own = [p for name, p in inspect.signature(function).parameters.items() if name != "given"]
        places = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        for one in made:
            required = one.required and one.name not in optional
            kind = _annotation(one, required, more.get(one.name))
            default = inspect.Parameter.empty if required else None
            places.append(inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))

        @wraps(function)
        def command(**values: Any) -> Any:
            return function(Given({one.name: values.pop(one.name) for one in made}), **values)

        places.sort(key=lambda p: (_panel(p), p.default is not inspect.Parameter.empty))
        command.__signature__ = inspect.Signature(places)  # pyright: ignore[reportAttributeAccessIssue]
        command.__annotations__ = {p.name: p.annotation for p in places}
        return command  # pyright: ignore[reportReturnType]

    return decorate


def _panel(place: inspect.Parameter) -> int:
    """Position of an option's panel; panels of one command alone come first."""
    panel = getattr(place.annotation.__metadata__[0], "rich_help_panel", None)
    return PANELS.index(panel) if panel in PANELS else -1


def _annotation(one: Parameter, required: bool, also: str | None) -> Any:
    """The type of a generated option as typer reads it. Every default is None: what was not given is not passed on."""
    kind: Any = str
    names = [one.option] if also is None else [also, one.option]
    more: dict[str, Any] = {"metavar": one.values}
    if bool in one.types:
        kind = bool
        names = ["/".join([*names, f"--no-{one.option[2:]}"])]
    elif list[str] in one.types or tuple[str, ...] in one.types:
        kind = list[str]
    elif Path in one.types:
        kind = Path
    elif one.is_number and not one.words and not one.values.endswith("GB"):
        kind = float if float in one.types else int
    if one.words:
        more["autocompletion"] = lambda incomplete: [word for word in one.words if word.startswith(incomplete)]
    info = option(one.text, *names, panel=one.panel, show_default=False, **more)
    return Annotated[kind if required else kind | None, info]


def parsed(one: Parameter, value: Any) -> Any:
    """The value of an option as its field has it. Raises InputError naming the option."""
    if tuple[int, int] in one.types:
        return parse_size(value)
    if tuple[float, float] in one.types:
        return parse_interval(value, one.option)
    if tuple[int, ...] in one.types:
        return parse_layers(value)
    if one.values.endswith("GB"):
        return parse_bytes(value, one.option)
    if (
        one.types == (int,)
        and one.name not in _OWN_SENTENCES
        and not one.said
        and not one.sentence
        and one.problem(value)
    ):
        low, high = one.low, one.high
        bounds = f"{low}<=x" + ("" if high is None else f"<={high}")
        raise typer.BadParameter(f"{value} is not in the range {bounds}", param_hint=f"'{one.option}'")
    return number_or(one.words[0], value, one.option) if one.words and one.is_number else value


def parse_size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH as (height, width)."""
    height, cross, width = text.lower().partition("x")
    if not (cross and _is_number(height, 5) and _is_number(width, 5) and int(height) and int(width)):
        raise InputError(f"--size must be HEIGHTxWIDTH in pixels, like 480x832, got '{_short(text)}'")
    return int(height), int(width)


def parse_interval(text: str, option: str) -> tuple[float, float]:
    """Shares of the steps, START-STOP, as 0-0.55."""
    start, _, stop = text.partition("-")
    try:
        return float(start), float(stop)
    except ValueError:
        raise InputError(f"{option} must be two shares of the steps like 0-0.55, got '{_short(text)}'") from None


def parse_layers(text: str) -> tuple[int, ...]:
    """Layers as 0,1,5-9."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (_is_number(first, 4) and _is_number(last, 4) and int(first) <= int(last)):
            raise InputError(f"--layers must be numbers and ranges like 0,1,5-9, got '{_short(text)}'")
        layers += range(int(first), int(last) + 1)
    if len(set(layers)) < len(layers):
        raise InputError(f"--layers names a layer twice: '{_short(text)}'")
    return tuple(layers)


def _is_number(text: str, digits: int) -> bool:
    """Whether it is a whole number that is not absurdly long."""
    return text.isascii() and text.isdecimal() and len(text) <= digits


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def number_or(word: str, text: str, option: str) -> float | str:
    """A number, or the one word that is allowed instead."""
    if text == word:
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option} must be a number or '{word}', got '{text}'") from None


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["kvlock-fast", *sys.argv[1:]])
