"""Context parallelism: each process has a part of the tokens in a transformer's layers, and so of what a lock sees.

diffusers (`enable_parallelism`) splits the sequence in contiguous parts, in the order of the processes, and gathers the
prediction. What is blended or kept is of the process's own part; all else is whole, and the same everywhere.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """One process's part. uneven: whether parts may differ by a token (`ulysses_anything`, `ring_anything`)."""

    rank: int
    count: int
    uneven: bool = False

    def divides(self, tokens: int) -> bool:
        """Whether diffusers can split so many."""
        return tokens >= self.count if self.uneven else tokens % self.count == 0

    def bounds(self, tokens: int) -> tuple[int, int]:
        """The first of its tokens, and the one after the last. The first parts are the longer ones, as diffusers'."""
        size, longer = divmod(tokens, self.count)
        first = self.rank * size + min(self.rank, longer)
        return first, first + size + (self.rank < longer)

    def indices(self, indices: Tensor, tokens: int) -> Tensor:
        """Those of its own part [n] of indices [N], counted from where it begins; reads them on the host."""
        first, end = self.bounds(tokens)
        return indices[(indices >= first) & (indices < end)] - first


def shard_of(transformer: Any) -> Shard | None:
    """This process's part; None where the transformer has all tokens."""
    config = getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)
    if config is None:
        return None
    mesh = config._flattened_mesh
    rank = torch.distributed.get_rank(mesh.get_group())
    return Shard(rank, mesh.size(), config.ulysses_anything or config.ring_anything)


def ulysses_heads(transformer: Any) -> int:
    """What the number of heads must be a multiple of."""
    config = transformer._parallel_config.context_parallel_config
    return 1 if config.ulysses_anything else config.ulysses_degree
