"""Checks of a configuration's values: each raises ValueError that begins with the name and quotes the value."""

import math
from typing import Any


def choice(config: Any, name: str, *allowed: str | None) -> None:
    """One of these words."""
    value = getattr(config, name)
    if value not in allowed:
        known = ", ".join(word for word in allowed if word is not None)
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def number(
    config: Any, name: str, low: float, high: float | None, *, open_low: bool = False, or_word: str = ""
) -> None:
    """A finite number from low (open_low: above it) to high (None: any)."""
    value = getattr(config, name)
    finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    fits = finite and (value > low if open_low else value >= low) and (high is None or value <= high)
    if not fits:
        bound = f"greater than {low}" if open_low else f"at least {low}"
        bound = bound if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {bound}{f' or {or_word!r}' if or_word else ''}, got {value!r}")


def whole(config: Any, name: str, low: int) -> None:
    """A whole number of at least low."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
