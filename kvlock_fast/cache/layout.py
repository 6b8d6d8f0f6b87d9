"""Layout of one step's keys and values: every tensor of every locked layer in one block of bytes, the step's arena.

One block a step makes copies bulk, addresses fixed and sizes arithmetic: what the planner says is what is allocated.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from kvlock_fast.kernels.packed import packed_layout
from kvlock_fast.kernels.quantize import QuantizedKV

ALIGNMENT = 256
"""Bytes that CUDA's allocator aligns to, more than any vector load or bulk copy asks for."""

NARROW, LONG = 64, 4096
"""The most channels a head, and the fewest tokens, for 128 tokens to share a scale of fp8. In a short sequence 128
tokens are a large part of the picture, and their scales few bytes.
"""

Key = tuple[int, str]
"""Layer number, and "k" or "v"."""


def shard_name(step: int) -> str:
    """Name of a stored step's shard."""
    return f"step-{step:05d}"


@dataclass(frozen=True)
class KVShape:
    """Extent of what is kept of a step: layers (by number), tokens, heads and channels a head."""

    layers: tuple[int, ...]
    tokens: int
    heads: int
    dim: int

    @property
    def tensor(self) -> tuple[int, int, int, int]:
        """Shape of a layer's keys, or values: [1, N, H, D]."""
        return 1, self.tokens, self.heads, self.dim


@dataclass(frozen=True)
class Part:
    """A tensor of an arena: codes, scale or minimum of a layer's keys or values."""

    key: Key
    role: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The name in files: 12.k.codes."""
        return f"{self.key[0]}.{self.key[1]}.{self.role}"

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def view(self, arena: Tensor) -> Tensor:
        """This tensor in an arena, uint8 [nbytes] on any device."""
        return arena[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class StepLayout:
    """The arena of one step, in one of the formats of `quantize_kv`.

    dtype: the model's, for native; tokens_per_scale: how many tokens of a head share a scale of fp8, 1 or 128.
    """

    shape: KVShape
    format: str
    dtype: torch.dtype
    tokens_per_scale: int = 1

    @classmethod
    def usual(cls, shape: KVShape, format: str, dtype: torch.dtype) -> "StepLayout":
        """Layout of new caches. In long sequences of narrow heads 128 tokens share a scale, else 6 % of the bytes."""
        shares = format == "fp8_e4m3" and shape.dim <= NARROW and shape.tokens >= LONG
        return cls(shape, format, dtype, 128 if shares else 1)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Tensors in the order of their addresses."""
        parts, offset = [], 0
        for layer in self.shape.layers:
            for kind in ("k", "v"):
                for role, (shape, dtype) in zip(("codes", "scale", "minimum"), self._tensors(kind), strict=False):
                    part = Part((layer, kind), role, offset, shape, dtype)
                    parts.append(part)
                    offset += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
        return tuple(parts)

    def _tensors(self, kind: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
        if self.format == "native":
            return [(self.shape.tensor, self.dtype)]
        return packed_layout(self.shape.tensor, self.format, kind, self.tokens_per_scale)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole arena, alignment included."""
        if not self.parts:
            return 0
        last = self.parts[-1]
        return last.offset + -(-last.nbytes // ALIGNMENT) * ALIGNMENT

    @property
    def payload_bytes(self) -> int:
        """Bytes of the codes."""
        return sum(part.nbytes for part in self.parts if part.role == "codes")

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales and minima."""
        return sum(part.nbytes for part in self.parts if part.role != "codes")

    def new_arena(self, device: torch.device | str) -> Tensor:
        """Allocate uint8 [nbytes], not initialised."""
        with torch.inference_mode(False):  # it may be written to after the mode that it was made in
            return torch.empty(self.nbytes, dtype=torch.uint8, device=device)

    def tensors(self, arena: Tensor) -> dict[str, Tensor]:
        """Views of an arena by part name."""
        return {part.name: part.view(arena) for part in self.parts}

    def packed(self, arena: Tensor) -> dict[Key, QuantizedKV]:
        """The arena as keys and values by layer and kind; they share its memory."""
        return self.from_tensors(self.tensors(arena))

    def from_tensors(self, tensors: dict[str, Tensor]) -> dict[Key, QuantizedKV]:
        """Tensors by part name as keys and values by layer and kind."""
        held: dict[Key, dict[str, Tensor]] = {}
        for part in self.parts:
            held.setdefault(part.key, {})[part.role] = tensors[part.name]
        shape = torch.Size(self.shape.tensor)
        scales = self.tokens_per_scale
        return {
            key: QuantizedKV(self.format, key[1], shape, self.dtype, tokens_per_scale=scales, **parts)
            for key, parts in held.items()
        }
