"""Locked attention: attention over keys and values whose background tokens are blended with the source's.

    K = m K_new + (1 - m) (alpha K_ref + (1 - alpha) K_new), the same for V;  out = softmax(scale Q K^T) V

Layout [B, S, H, D], fp32 inside, output in q's dtype. The blend comes once per token, in front of the attention, not
once per tile. Source: KV-Lock (arXiv 2603.09657).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlock_fast.kernels.blend import blend_reference
from kvlock_fast.kernels.guard import require_package_name

require_package_name(__name__)


def locked_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor, v_ref: Tensor, foreground: Tensor, alpha: Tensor, scale: float
) -> Tensor:
    """q [B, Sq, H, D]; k, v [B, S, H, D]; k_ref, v_ref [B or 1, S, H, D]; foreground [B or 1, S] bool; alpha [B]."""
    weight = torch.where(foreground, 0.0, alpha.float()[:, None])
    k = blend_reference(k, k_ref, weight)
    v = blend_reference(v, v_ref, weight)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2)


@torch.library.custom_op("kvlock_fast::locked_attention", mutates_args=())
def _locked_attention_op(
    q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor, v_ref: Tensor, foreground: Tensor, alpha: Tensor, scale: float
) -> Tensor:
    out = locked_attention_reference(q, k, v, k_ref, v_ref, foreground, alpha, scale)
    return out.to(q.dtype).contiguous()


@_locked_attention_op.register_fake
def _(q, k, v, k_ref, v_ref, foreground, alpha, scale):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _check(q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor, v_ref: Tensor, foreground: Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q and k must be [B, S, H, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    batch, tokens, heads, dim = k.shape
    if (q.shape[0], q.shape[2], q.shape[3]) != (batch, heads, dim):
        raise ValueError(f"q must be [{batch}, Sq, {heads}, {dim}] to fit k {tuple(k.shape)}, got {tuple(q.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if tokens == 0:
        raise ValueError(f"k holds no tokens: {tuple(k.shape)}")
    for name, ref in (("k_ref", k_ref), ("v_ref", v_ref)):
        if ref.shape[1:] != k.shape[1:] or ref.shape[0] not in (1, batch):
            raise ValueError(f"{name} must be {tuple(k.shape)} or have batch 1, got {tuple(ref.shape)}")
    for name, x in (("q", q), ("k", k), ("v", v), ("k_ref", k_ref), ("v_ref", v_ref)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if foreground.dtype != torch.bool:
        raise ValueError(f"foreground must be bool, got {foreground.dtype}")
    if foreground.ndim != 2 or foreground.shape[0] not in (1, batch) or foreground.shape[1] != tokens:
        raise ValueError(f"foreground must be [{batch} or 1, {tokens}], got {tuple(foreground.shape)}")


def launch_locked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    foreground: Tensor,
    alpha: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Check the shapes, then attend. Arguments as `locked_attention_reference`; scale defaults to D ** -0.5."""
    _check(q, k, v, k_ref, v_ref, foreground)
    if alpha.shape != (q.shape[0],):
        raise ValueError(f"alpha must be a number or [{q.shape[0]}], got {tuple(alpha.shape)}")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _locked_attention_op(q, k, v, k_ref, v_ref, foreground, alpha, float(scale))
