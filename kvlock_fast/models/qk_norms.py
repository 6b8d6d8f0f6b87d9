"""The norms of queries and keys that the prologue knows, as modules have them."""

import torch
from torch import Tensor, nn

from kvlock_fast.kernels.prologue import QKNorm


def why_no_norm(norm: nn.Module | None, heads: int, dim: int) -> str | None:
    """What about a norm keeps the prologue from doing its work, None if nothing; dim: channels a head."""
    if norm is None:
        return None
    kind = _kind(norm)
    if kind is None or _size(norm) not in ((dim, heads * dim) if kind == "rms" else (dim,)):
        return f"{type(norm).__name__.removeprefix('Locked')} is a norm that the prologue does not know"
    if "forward" in vars(norm) or norm._forward_hooks or norm._forward_pre_hooks:
        return "hooks on its norms (as by offloading) would be left out"
    return None


def qk_norm(norm_q: nn.Module | None, norm_k: nn.Module | None, heads: int, like: Tensor) -> QKNorm:
    """Both norms, of queries and keys [B, S, H*D] `like` these. Raises ValueError where they are of two kinds."""
    if norm_q is None and norm_k is None:
        return QKNorm()
    width, dtype = like.shape[2], like.dtype
    (kind, eps), other = ((norm_kind(norm, heads, width), _eps(norm, dtype)) for norm in (norm_q, norm_k))
    if other != (kind, eps):
        raise ValueError(f"queries and keys must be normed alike, got {kind} {eps} and {other[0]} {other[1]}")
    parts = (getattr(norm, part, None) for part in ("weight", "bias") for norm in (norm_q, norm_k))
    return QKNorm(kind, *parts, eps=eps)


def norm_kind(norm: nn.Module | None, heads: int, width: int) -> str:
    """As `QKNorm.kind`, of a norm that `why_no_norm` finds nothing against; width: channels of all heads."""
    if norm is None:
        return "none"
    kind = _kind(norm)
    return "rms_across_heads" if kind == "rms" and _size(norm) == width and heads > 1 else kind


def _eps(norm: nn.Module | None, dtype: torch.dtype) -> float:
    if norm is None:
        return 0.0
    return torch.finfo(dtype).eps if norm.eps is None else norm.eps


def _kind(norm: nn.Module) -> str | None:
    """ "rms" or "layer", None for one that is neither, or that has been given another forward."""
    from diffusers.models.normalization import FP32LayerNorm, RMSNorm

    for known, kind in ((nn.RMSNorm, "rms"), (RMSNorm, "rms"), (nn.LayerNorm, "layer"), (FP32LayerNorm, "layer")):
        if isinstance(norm, known) and type(norm).forward is known.forward:
            biased = kind == "rms" and getattr(norm, "bias", None) is not None
            return None if biased or len(_shape(norm)) != 1 else kind
    return None


def _shape(norm: nn.Module) -> tuple[int, ...]:
    return tuple(norm.normalized_shape if hasattr(norm, "normalized_shape") else norm.dim)


def _size(norm: nn.Module) -> int:
    return _shape(norm)[0]
