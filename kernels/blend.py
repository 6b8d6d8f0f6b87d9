"""Blend in place: the one operation that locking adds to an attention layer.

    x <- (1 - w) x + w ref        w = alpha (1 - m) per sample and token: 0 on the foreground, alpha on the background

Layout: `x` is any tensor with batch first and the tokens along `token_dim` ([B, S, H*D], [B, S, H, D], [B, H, S, D]).
Computed in fp32, stored in x's dtype. Exact at both ends: w = 0 leaves x as it is, bit for bit and whatever `ref`
holds; w = 1 copies `ref`, bit for bit and whatever x held. Reads 2, writes 1 times the bytes of x.
Source: KV-Lock (arXiv 2603.09657), the mix of new and cached keys and values.
"""

import torch
from torch import Tensor

from kvlock_fast.kernels.guard import require_package_name

require_package_name(__name__)


def blend_reference(x: Tensor, ref: Tensor, weight: Tensor, token_dim: int = 1) -> Tensor:
    """Blend of `x` and `ref` (broadcast over the batch) by `weight` [B or 1, S] fp32; a new tensor in x's dtype."""
    shape = [1] * x.ndim
    shape[0], shape[token_dim] = weight.shape
    w = weight.reshape(shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    mixed = torch.lerp(x.to(wide), ref.to(wide).expand_as(x), w.to(wide))
    # lerp is exact at its ends for finite numbers only; NaN on the side that does not count must not come through.
    return torch.where(w == 0, x, torch.where(w == 1, ref.to(x.dtype), mixed.to(x.dtype)))


@torch.library.custom_op("kvlock_fast::blend_", mutates_args=("x",))
def _blend_op(x: Tensor, ref: Tensor, weight: Tensor, token_dim: int) -> None:
    x.copy_(blend_reference(x, ref, weight, token_dim))


@_blend_op.register_fake
def _(x: Tensor, ref: Tensor, weight: Tensor, token_dim: int) -> None:
    return None


def blend_(x: Tensor, ref: Tensor, weight: Tensor, token_dim: int = 1) -> Tensor:
    """Blend `ref` into `x` in place and return x.

    x: keys or values, batch first, S tokens along `token_dim`; ref: the same shape, or batch 1; weight: [B or 1, S]
    fp32 in [0, 1]. Raises ValueError on shapes that do not fit.
    """
    tokens = x.shape[token_dim]
    if ref.shape[1:] != x.shape[1:] or ref.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"ref must be {tuple(x.shape)} or have batch 1, got {tuple(ref.shape)}")
    if weight.ndim != 2 or weight.shape[0] not in (1, x.shape[0]) or weight.shape[1] != tokens:
        raise ValueError(f"weight must be [{x.shape[0]} or 1, {tokens}], got {tuple(weight.shape)}")
    _blend_op(x, ref, weight, token_dim)
    return x
