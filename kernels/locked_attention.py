"""Locked attention: attention over keys and values whose background tokens are blended with the source's.

    K = m K_new + (1 - m) (alpha K_ref + (1 - alpha) K_new), the same for V;  out = softmax(scale Q K^T) V

Layout [B, S, H, D], fp32 inside, output in q's dtype. Two routes lead there: one kernel that blends inside its loop
(fused_attention.py), or a blend once per token (blend_kv.py) in front of an attention: ours (attention.py), cuDNN's or
flash-attn's. `choose_route` says which one a shape takes. Source: KV-Lock (arXiv 2603.09657).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlock_fast.kernels import attention_backends
from kvlock_fast.kernels.attention import MOST_CHANNELS, check_qkv, check_route, choose_attention, run_attention
from kvlock_fast.kernels.blend import blend_reference
from kvlock_fast.kernels.blend_kv import launch_blend_kv
from kvlock_fast.kernels.dequantize import dequantize_kv_reference
from kvlock_fast.kernels.fused_attention import launch_fused_attention
from kvlock_fast.kernels.guard import require_package_name
from kvlock_fast.kernels.launch import architecture, runs_triton
from kvlock_fast.kernels.packed import packed_arguments
from kvlock_fast.kernels.quantize import QuantizedKV

require_package_name(__name__)

ROUTES = ("auto", "fused", "triton", *attention_backends.BACKENDS)
# The fused kernel blends K/V again for every block of queries, so it stays with few blocks or few keys. By arithmetic,
# not measured: one launch (some 5 us) against the blend's own time.
FUSED_QUERIES, FUSED_TOKENS = 128, 1024


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


def choose_route(q: Tensor, k: Tensor, only_ours: bool) -> str:
    """The route for q [B, Sq, H, D], k [B, S, H, D]; `only_ours`: among Triton's.

    Raises ValueError where only Triton may serve and cannot.
    """
    if q.shape[3] <= MOST_CHANNELS and (q.shape[1] <= FUSED_QUERIES or k.shape[1] <= FUSED_TOKENS):
        return "fused"
    return choose_attention(q, only_ours)


@torch.library.custom_op("kvlock_fast::locked_attention", mutates_args=())
def _locked_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    k_scales: list[Tensor],
    k_format: str,
    k_kind: str,
    k_per_scale: int,
    v_codes: Tensor,
    v_scales: list[Tensor],
    v_format: str,
    v_kind: str,
    v_per_scale: int,
    foreground: Tensor,
    alpha: Tensor,
    scale: float,
    backend: str,
    route: str,
) -> Tensor:
    packed = ((k_codes, k_scales, k_format, k_kind, k_per_scale), (v_codes, v_scales, v_format, v_kind, v_per_scale))
    if not runs_triton(backend, q, k_codes, v_codes, foreground, alpha):
        k_ref, v_ref = (dequantize_kv_reference(*ref[:4], q.shape[3], ref[4]) for ref in packed)
        out = locked_attention_reference(q, k, v, k_ref, v_ref, foreground, alpha, scale)
        return out.to(q.dtype).contiguous()
    refs = [packed_arguments(*ref, architecture(q)) for ref in packed]
    if route == "auto":
        route = choose_route(q, k, only_ours=backend == "triton")
    if route == "fused":
        return launch_fused_attention(q, k, v, *refs, foreground, alpha, scale)
    k, v = launch_blend_kv(k, v, *refs, foreground, alpha)
    return run_attention(q, k, v, scale, route)


@_locked_attention_op.register_fake
def _(q, k, v, k_codes, k_scales, k_format, k_kind, k_per_scale, v_codes, v_scales, v_format, v_kind, v_per_scale,
      foreground, alpha, scale, backend, route):  # fmt: skip
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _check(
    q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor | QuantizedKV, v_ref: Tensor | QuantizedKV, foreground: Tensor
) -> None:
    check_qkv(q, k, v)
    batch, tokens = k.shape[:2]
    for name, ref in (("k_ref", k_ref), ("v_ref", v_ref)):
        if ref.shape[1:] != k.shape[1:] or ref.shape[0] not in (1, batch):
            raise ValueError(f"{name} must be {tuple(k.shape)} or have batch 1, got {tuple(ref.shape)}")
        if not ref.dtype.is_floating_point:
            raise ValueError(f"{name} must be a floating-point tensor, got {ref.dtype}")
    if foreground.dtype != torch.bool:
        raise ValueError(f"foreground must be bool, got {foreground.dtype}")
    if foreground.ndim != 2 or foreground.shape[0] not in (1, batch) or foreground.shape[1] != tokens:
        raise ValueError(f"foreground must be [{batch} or 1, {tokens}], got {tuple(foreground.shape)}")


def locked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor | QuantizedKV,
    v_ref: Tensor | QuantizedKV,
    foreground: Tensor,
    alpha: Tensor,
    scale: float | None = None,
    backend: str = "auto",
    attention: str = "auto",
) -> Tensor:
    """Check the arguments, then attend; as `kvlock_fast.ops.locked_attention`, with alpha [B] fp32."""
    _check(q, k, v, k_ref, v_ref, foreground)
    check_route(attention, ROUTES, backend, q)
    if alpha.shape != (q.shape[0],):
        raise ValueError(f"alpha must be a number or [{q.shape[0]}], got {tuple(alpha.shape)}")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be a positive finite number, got {scale!r}")
    packed = []
    for ref in (k_ref, v_ref):
        if isinstance(ref, QuantizedKV):
            packed += [ref.codes, ref.scales, ref.format, ref.kind, ref.tokens_per_scale]
        else:
            packed += [ref, [], "native", "k", 1]
    return _locked_attention_op(q, k, v, *packed, foreground, alpha, float(scale), backend, attention)
