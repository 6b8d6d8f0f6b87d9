"""Names that are others now. Each is refused in one sentence with the new name; nothing reads both."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from kvlock_fast.errors import InputError

FIELDS = {"window": "variance_window", "clip_window": "clip_frames"}
"""Fields of a manifest's line, from version 0.1."""
REPLACED = {
    "lock_share": "lock_interval",
    "skip_steps": "skip_share",
    "zero_init_steps": "zero_init_share",
    "free_steps": "free_share",
}
"""Lock parameters whose values have another form now: a share x is the interval (0, x), n of T steps are n / T."""
OPTIONS = {"--window": "--clip-frames", "--overlap": "--clip-overlap"} | {
    f"--{old}".replace("_", "-"): f"--{new}".replace("_", "-") for old, new in REPLACED.items()
}
"""Options of `kvlock-fast edit`."""
CACHE_STEPS = {"window": "dynamic"}
"""Values of cache_steps, `CacheConfig.steps`."""

F = TypeVar("F", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[F], F]:
    """Decorate a function, or a class for its constructor: an argument of an old name is refused with the new one."""

    def decorate(kind: F) -> F:
        named = kind
        function = kind.__init__ if isinstance(kind, type) else kind

        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                raise TypeError(f"{old} is called {names[old]} now")
            return function(*args, **kwargs)

        if isinstance(kind, type):
            kind.__init__ = checked
            return named
        return checked  # pyright: ignore[reportReturnType]

    return decorate


def refuse_cache_steps(name: str, value: object) -> None:
    """Raise InputError for a value of cache_steps that has another name now."""
    if isinstance(value, str) and value in CACHE_STEPS:
        raise InputError(f"{name} {value!r} is called {CACHE_STEPS[value]!r} now")
