"""Context parallelism: each process has a part of the tokens in a transformer's layers, and so of what a lock sees.

diffusers (`enable_parallelism`) splits the sequence in contiguous parts, in the order of the processes, and gathers the
prediction. What is blended or kept is of the process's own part; all else is whole, and the same everywhere.
"""

import re
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.errors import InputError
from kvlock_fast.locking.compatibility import hooks_of

TEXT_MASK = "encoder_attention_mask"


@dataclass(frozen=True)
class Shard:
    """A process's part of the tokens. uneven: parts may differ by a token (`ulysses_anything`, `ring_anything`)."""

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
        """The part's own of indices [N], counted from the part's first token; reads them on the host."""
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
    """The number that the heads must be a multiple of."""
    config = transformer._parallel_config.context_parallel_config
    return 1 if config.ulysses_anything else config.ulysses_degree


def splits_text_mask(transformer: Any) -> bool:
    """Whether each process is given a part of the text's mask only, as by diffusers' own plans for LTX.

    diffusers 0.42's Ulysses fails on that, and its ring puts every process's own part on all parts of the text.
    """
    plans = (getattr(hook, "metadata", None) for hook in hooks_of(transformer).values())
    return any(isinstance(plan, dict) and TEXT_MASK in plan for plan in plans)


def share_video(transformer: Any, config: Any, text_attention: str = r".*\.attn2") -> None:
    """Context parallelism that leaves the text whole in every process, in the place of `enable_parallelism`.

    For transformers that see the text in cross-attentions of its own (LTX), whose mask diffusers cannot split. config:
    diffusers' `ContextParallelConfig`; text_attention: a regular expression that the names of the cross-attentions
    match whole.

    Raises InputError for a transformer that has none, or that diffusers has no plan for.
    """
    attentions = [module for name, module in transformer.named_modules() if re.fullmatch(text_attention, name)]
    plan = getattr(transformer, "_cp_plan", None)
    if not attentions or plan is None:
        raise InputError(
            f"{type(transformer).__name__} cannot share the video alone: it has no cross-attention or plan"
        )
    video = {name: split for name, split in plan.get("", {}).items() if not str(name).startswith("encoder_")}
    transformer.enable_parallelism(config=config, cp_plan={**plan, "": video})
    for attention in attentions:
        # A processor may be one for all attentions; self-attentions have to go on sharing.
        attention.processor = copy(attention.processor)
        attention.processor._parallel_config = None
