"""The norms of queries and keys that the prologue knows, as modules have them."""

from typing import Any

import torch
from torch import Tensor, nn

from kvlock_fast.kernels.prologue import QKNorm


def why_no_norms(norm_q: nn.Module | None, norm_k: nn.Module | None, heads: int, dim: int) -> str | None:
    """The reason why the prologue cannot take over the norms, None if it can; dim: channels a head."""
    why = _why_no_norm(norm_q, heads, dim) or _why_no_norm(norm_k, heads, dim)
    if why is not None:
        return why
    one, other = ((norm_kind(norm, heads, heads * dim), getattr(norm, "eps", None)) for norm in (norm_q, norm_k))
    return None if one == other else "its queries and keys are not normed alike"


def _why_no_norm(norm: nn.Module | None, heads: int, dim: int) -> str | None:
    if norm is None:
        return None
    kind = _kind(norm)
    if kind is None or _size(norm) not in ((dim, heads * dim) if kind == "rms" else (dim,)):
        return f"{type(norm).__name__.removeprefix('Locked')} is a norm that the prologue does not know"
    if "forward" in vars(norm) or norm._forward_hooks or norm._forward_pre_hooks:
        return "hooks on its norms (as by offloading) would be left out"
    return None


def qk_norm(norm_q: Any, norm_k: Any, heads: int, like: Tensor) -> QKNorm:
    """The two norms, which are alike, of queries and keys [B, S, H*D] `like` these."""
    if norm_k is None:
        return QKNorm()
    parts = (getattr(norm, part, None) for part in ("weight", "bias") for norm in (norm_q, norm_k))
    eps = torch.finfo(like.dtype).eps if norm_k.eps is None else norm_k.eps
    return QKNorm(norm_kind(norm_k, heads, like.shape[2]), *parts, eps=eps)


def norm_kind(norm: nn.Module | None, heads: int, width: int) -> str:
    """`QKNorm.kind` of a norm that `why_no_norms` finds nothing against; width: channels of all heads."""
    kind = None if norm is None else _kind(norm)
    if norm is None or kind is None:
        return "none"
    return "rms_across_heads" if kind == "rms" and _size(norm) == width and heads > 1 else kind


def _kind(norm: nn.Module) -> str | None:
    """The norm's kind, "rms" or "layer"; None for another norm, or one with another forward."""
    from diffusers.models.normalization import FP32LayerNorm, RMSNorm

    for known, kind in ((nn.RMSNorm, "rms"), (RMSNorm, "rms"), (nn.LayerNorm, "layer"), (FP32LayerNorm, "layer")):
        if isinstance(norm, known) and type(norm).forward is known.forward:
            biased = kind == "rms" and getattr(norm, "bias", None) is not None
            return None if biased or len(_shape(norm)) != 1 else kind
    return None


def _shape(norm: Any) -> tuple[int, ...]:
    """Extent that a norm of torch's, or of diffusers', is taken over."""
    return tuple(norm.normalized_shape if hasattr(norm, "normalized_shape") else norm.dim)


def _size(norm: nn.Module) -> int:
    return _shape(norm)[0]
