"""What a model is shown of a clip is made once, however many prompts go with it."""

import weakref
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

Made = TypeVar("Made")


class PerClip:
    """Keeps what was made of the latest clip, by name."""

    def __init__(self):
        self._clip: list[weakref.ref[Tensor]] = []
        self._made: dict[str, object] = {}

    def __call__(self, clip: tuple[Tensor, ...], name: str, make: Callable[[], Made]) -> Made:
        """What was made of these very tensors under this name, or else what `make` gives."""
        held = [tensor() for tensor in self._clip]
        if len(held) != len(clip) or any(a is not b for a, b in zip(held, clip, strict=True)):
            self._clip, self._made = [weakref.ref(tensor) for tensor in clip], {}
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]
