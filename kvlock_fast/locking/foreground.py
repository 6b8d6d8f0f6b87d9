"""Attention of the tokens that are computed, to themselves and to the source's background: for forwards without it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvlock_fast.errors import InputError
from kvlock_fast.kernels.attention import attention
from kvlock_fast.kernels.prologue_reference import rotated_pairs
from kvlock_fast.kernels.quantize import QuantizedKV
from kvlock_fast.locking.compatibility import hooks_of


@dataclass(frozen=True)
class View:
    """The other tokens, as a forward of some tokens sees them.

    foreground: how many of its tokens, from the first on, bring keys and values of their own; rows: which of the kept
    tokens are the background, indices [N], None for all; rope: cosine and sine of their positions, each [1, N, 1, D],
    None where keys are not rotated.
    """

    foreground: int
    rows: Tensor | None
    rope: tuple[Tensor, Tensor] | None


@contextmanager
def processors(attentions: Sequence[nn.Module], processor: Any) -> Iterator[None]:
    """Attentions of diffusers with this processor, and their own again afterwards."""
    for module in attentions:
        own = module.processor
        if not type(own).__module__.startswith("diffusers."):
            raise InputError(
                f"compute 'foreground' would leave out {type(own).__name__}, an attention processor that is not "
                "diffusers' own: use compute 'full'"
            )
    with swapped(attentions, [processor] * len(attentions)):
        yield


@contextmanager
def swapped(attentions: Sequence[nn.Module], ours: Sequence[Any]) -> Iterator[None]:
    """Attentions with these processors, one each, and their own again afterwards."""
    before = [module.processor for module in attentions]
    try:
        for module, processor in zip(attentions, ours, strict=True):
            module.processor = processor
        yield
    finally:
        for module, own in zip(attentions, before, strict=True):
            module.processor = own


BRINGING = ("group_offloading", "lazy_prefetch_group_offloading", "layerwise_casting")
"""diffusers' hooks around a forward that only bring the weights for it."""


@contextmanager
def whole_forward(transformer: nn.Module) -> Iterator[None]:
    """Run the hooks around a transformer's forward that bring its weights, while its parts are called.

    Raises InputError where something else has replaced the forward.
    """
    if not {"_hf_hook", "_diffusers_hook", "forward"} & vars(transformer).keys():
        yield
        return
    accelerates, diffusers = getattr(transformer, "_hf_hook", None), hooks_of(transformer)
    own = getattr(vars(transformer).get("forward"), "__func__", None) is type(transformer).forward
    replaced = "forward" in vars(transformer) and not own
    if set(diffusers) - set(BRINGING) or (replaced and accelerates is None and not diffusers):
        raise InputError(
            "compute 'foreground' calls the parts of the transformer, whose forward was replaced by more than what "
            "brings its weights: use compute 'full'"
        )
    hooks = [*([] if accelerates is None else [accelerates]), *diffusers.values()]
    for hook in reversed(hooks):
        hook.pre_forward(transformer)
    yield
    for hook in hooks:
        hook.post_forward(transformer, None)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: tuple[Tensor | QuantizedKV, Tensor | QuantizedKV],
    view: View,
    bias: float = 0.0,
) -> Tensor:
    """Attention of q [B, N, H, D] to the foreground's k and v (of [B, N, H, D]) and to those kept of the background.

    Args:
        q, k, v: queries and keys are rotated.
        kept: K after its norm, not rotated, and V, [1, M, H, D].
        view: which tokens are which.
        bias: added to the logits of the background's keys.
    """
    background_k, background_v = (_unpacked(x, q, view.rows) for x in kept)
    if view.rope is not None:
        background_k = rotate(background_k, *view.rope)
    rows = q.shape[0]
    k = torch.cat([k[:, : view.foreground], background_k.expand(rows, -1, -1, -1)], dim=1)
    v = torch.cat([v[:, : view.foreground], background_v.expand(rows, -1, -1, -1)], dim=1)
    if q.device.type == "cuda" and not bias:
        return attention(q, k, v)  # splits the keys, as the queries are few
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    added = None
    if bias:
        added = q.new_zeros(1, 1, 1, k.shape[2])
        added[..., view.foreground :] = bias
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=added).transpose(1, 2)


def _unpacked(x: Tensor | QuantizedKV, like: Tensor, rows: Tensor | None) -> Tensor:
    """[1, N, H, D] in like's dtype."""
    x = x.dequantize(like.dtype) if isinstance(x, QuantizedKV) else x.to(like.dtype)
    return x if rows is None else x.index_select(1, rows)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of neighbouring pairs of x [B, N, H, D], as diffusers' Wan and CogVideoX have it.

    cos, sin: [1, N, 1, D], angles twice.
    """
    return rotated_pairs(x, cos[..., 0::2], sin[..., 1::2]).type_as(x)
