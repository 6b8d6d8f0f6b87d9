"""Inputs of a transformer beside latents and time: texts, and whatever else its family takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlock_fast.errors import InputError
from kvlock_fast.masks import ProjectedMask

MASK = "mask"
"""The name of a text's mask [n, L], 0 where a text of another length has been filled up."""


@dataclass(frozen=True)
class Given:
    """Inputs of a model beside the words: the source, and where it may change.

    frames: uint8 [F, H, W, 3]; pixels: the mask bool [F, H, W] (None where models are measured without a video);
    mask: the same as the model sees it; guidance_scale: that of the call, for models that take it as an input.
    """

    frames: Tensor
    pixels: Tensor | None
    mask: ProjectedMask
    guidance_scale: float


class Conditioning(dict[str, Tensor]):
    """Tensors by name, all of `rows` samples along their first dimension."""

    def __init__(self, unmasked: str | None = None, /, **tensors: Tensor):
        """unmasked: the name of texts [n, L, C] that have a mask only where `cat` fills them up.

        Raises ValueError where there are no tensors, or of different numbers of samples.
        """
        counts = {len(x) for x in tensors.values()}
        if len(counts) != 1:
            raise ValueError(f"conditioning must be of one number of samples, got {sorted(counts)}")
        super().__init__(tensors)
        self._unmasked = unmasked
        self.rows = counts.pop()

    def part(self, first: int, end: int) -> "Conditioning":
        """The samples from `first` to before `end`, as views."""
        return self._like({name: x[first:end] for name, x in self.items()})

    def expand(self, rows: int) -> "Conditioning":
        """Repeat the sample for `rows`, as views."""
        return self._like({name: x.expand(rows, *x.shape[1:]) for name, x in self.items()})

    def replace(self, **tensors: Tensor) -> "Conditioning":
        """A copy with some of the tensors replaced or added."""
        return self._like({**self, **tensors})

    def _like(self, tensors: Mapping[str, Tensor]) -> "Conditioning":
        return Conditioning(self._unmasked, **tensors)

    def _masked(self) -> "Conditioning":
        """A copy with a mask, of all tokens where it had none."""
        if MASK in self or self._unmasked is None:
            return self
        text = self[self._unmasked]
        return self.replace(mask=text.new_ones(text.shape[:2], dtype=torch.bool))

    @staticmethod
    def fit(parts: Sequence["Conditioning"]) -> bool:
        """Whether `cat` takes them: all of one length, or texts that can be filled up."""
        first = parts[0]
        if MASK in first or first._unmasked is not None:
            return True
        return all(len({part[name].shape[1:2] for part in parts}) == 1 for name in first)

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Concatenate. Texts of different lengths are filled up with zeros, which their mask tells apart.

        Raises InputError where texts of different lengths have no mask, so that no forward can take them together.
        """
        unmasked = parts[0]._unmasked
        if unmasked is not None:
            lengths = {part[unmasked].shape[1] for part in parts}
            if len(lengths) > 1 or any(MASK in part for part in parts):
                parts = [part._masked() for part in parts]
        first = parts[0]
        return first._like({name: _cat([part[name] for part in parts], MASK in first) for name in first})


def _cat(tensors: Sequence[Tensor], masked: bool) -> Tensor:
    lengths = {x.shape[1] for x in tensors if x.ndim > 1}
    if len(lengths) > 1:
        if not masked:
            raise InputError(
                f"the model takes texts of one length in a forward, and the prompts have {sorted(lengths)} tokens: "
                "give one prompt at a time, and guidance_batching 'separate'"
            )
        most = max(lengths)
        tensors = [F.pad(x, (0, 0) * (x.ndim - 2) + (0, most - x.shape[1])) for x in tensors]
    return torch.cat(list(tensors))
