"""What a model is shown of a clip is made once, however many prompts go with it."""

import weakref
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

Made = TypeVar("Made")


class PerClip:
    """Keeps what was made of the latest clip, by name."""

    def __init__(self):
        self._clip: weakref.ref[Tensor] | None = None
        self._made: dict[str, object] = {}

    def __call__(self, frames: Tensor, name: str, make: Callable[[], Made]) -> Made:
        """What was made of these very frames under this name, or else what `make` gives."""
        if self._clip is None or self._clip() is not frames:
            self._clip, self._made = weakref.ref(frames), {}
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]
