"""Locked attention: attention over keys and values whose background tokens are blended with the source's.

    K = m K_new + (1 - m) (alpha K_ref + (1 - alpha) K_new), the same for V;  out = softmax(scale Q K^T) V

Layout [B, S, H, D], fp32 inside, output in q's dtype. Two routes lead there: one kernel that blends inside its loop
(fused_attention.py), or a blend once per token in front of an attention: ours (attention.py), cuDNN's or
flash-attn's. `choose_route` says which one a shape takes. Source: KV-Lock (arXiv 2603.09657).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlock_fast.kernels import attention_libraries
from kvlock_fast.kernels.attention import MOST_CHANNELS, check_qkv, check_route, choose_attention, padded, run_attention
from kvlock_fast.kernels.blend import blend_reference
from kvlock_fast.kernels.dequantize import dequantize_kv_reference
from kvlock_fast.kernels.fused_attention import (
    _load_blended,
    launch_fused_attention,
    reference_meta,
    shipped_reference,
)
from kvlock_fast.kernels.guidance import per_sample
from kvlock_fast.kernels.language import require_package_name, tl, triton
from kvlock_fast.kernels.launch import architecture, launch, runs_triton
from kvlock_fast.kernels.packed import PackedArguments, packed_arguments
from kvlock_fast.kernels.quantize import QuantizedKV, codes_of
from kvlock_fast.kernels.tiles import shifted

require_package_name(__name__)

ROUTES = ("auto", "fused", "triton", *attention_libraries.BACKENDS)
# The fused kernel blends K/V again for every block of queries, so it stays with few blocks or few keys. By arithmetic,
# not measured: one launch (some 5 us) against the blend's own time.
FUSED_QUERIES, FUSED_TOKENS = 128, 1024
# Not swept yet: 16 bytes a thread and load at D = 128.
TOKENS_PER_PROGRAM, NUM_WARPS = 16, 4


@triton.jit
def _blend_kv_kernel(
    k, v, k_codes, k_scale, k_minimum, v_codes, v_scale, v_minimum, foreground, alpha, k_out, v_out,
    S, H, D,
    k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d,
    kr_b, kr_n, kr_h, kr_d, ks_b, vr_b, vr_n, vr_h, vr_d, vs_b, f_b, f_n, o_b, o_n, o_h,
    K_FORMAT: tl.constexpr, K_KIND: tl.constexpr, K_PER: tl.constexpr,
    V_FORMAT: tl.constexpr, V_KIND: tl.constexpr, V_PER: tl.constexpr, FP8: tl.constexpr,
    D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(S / BLOCK_N), H, B): the keys and values of a block of tokens of one head."""
    i_b, i_h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_t, o_d = t[:, None], tl.arange(0, D_PAD)[None, :]
    b_fg = tl.load(foreground + i_b * f_b + t.to(tl.int64) * f_n, mask=t < S, other=1)
    b_w = tl.where(b_fg != 0, 0.0, tl.load(alpha + i_b))[:, None]
    mask = o_t < S
    p_out = i_b * o_b + i_h * o_h + o_t.to(tl.int64) * o_n + o_d
    ks, km = shifted(k_scale, i_b * ks_b), shifted(k_minimum, i_b * ks_b)
    vs, vm = shifted(v_scale, i_b * vs_b), shifted(v_minimum, i_b * vs_b)
    b_k = _load_blended(
        k + i_b * k_b + i_h * k_h, k_codes + i_b * kr_b + i_h * kr_h, ks, km, i_h, o_t, o_d, b_w, mask,
        H, D, k_n, k_d, kr_n, kr_d, K_FORMAT, K_KIND, K_PER, FP8,
    )  # fmt: skip
    tl.store(k_out + p_out, b_k, mask=mask & (o_d < D))
    b_v = _load_blended(
        v + i_b * v_b + i_h * v_h, v_codes + i_b * vr_b + i_h * vr_h, vs, vm, i_h, o_t, o_d, b_w, mask,
        H, D, v_n, v_d, vr_n, vr_d, V_FORMAT, V_KIND, V_PER, FP8,
    )  # fmt: skip
    tl.store(v_out + p_out, b_v, mask=mask & (o_d < D))


def launch_blend_kv(
    k: Tensor, v: Tensor, k_ref: PackedArguments, v_ref: PackedArguments, foreground: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """K', V' [B, S, H, D] contiguous, in k's dtype. Arguments as for `launch_fused_attention`.

        K' = k + w (k_ref - k), V' likewise;  w = alpha (1 - m) per sample and token

    Where w = 0 the new, where w = 1 the cached tokens come through bit for bit (decoded and rounded to k's dtype), and
    the other side is not read. Bytes moved: each of K and V is read once (for 0 < w < 1 twice: new and cached), and
    written once. The prologue does the same together with the norm and RoPE for tokens that lie foreground-first; here
    they lie in any order under a mask.
    """
    batch, tokens, heads, dim = k.shape
    k_out, v_out = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    launch(
        _blend_kv_kernel, (triton.cdiv(tokens, TOKENS_PER_PROGRAM), heads, batch),
        k, v, k_ref.codes, k_ref.scale, k_ref.minimum, v_ref.codes, v_ref.scale, v_ref.minimum,
        foreground.view(torch.uint8), alpha, k_out, v_out, tokens, heads, dim,
        *k.stride(), *v.stride(), *k_ref.strides, k_ref.scale_stride, *v_ref.strides, v_ref.scale_stride,
        foreground.stride(0) if foreground.shape[0] > 1 else 0, foreground.stride(1), *k_out.stride()[:3],
        **reference_meta(k_ref, v_ref),
        D_PAD=padded(dim), BLOCK_N=TOKENS_PER_PROGRAM, num_warps=NUM_WARPS,
    )  # fmt: skip
    return k_out, v_out


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
    if not runs_triton(backend, q, k_codes, v_codes, foreground, alpha):
        k_plain = dequantize_kv_reference(k_codes, k_scales, k_format, k_kind, q.shape[3], k_per_scale)
        v_plain = dequantize_kv_reference(v_codes, v_scales, v_format, v_kind, q.shape[3], v_per_scale)
        out = locked_attention_reference(q, k, v, k_plain, v_plain, foreground, alpha, scale)
        return out.to(q.dtype).contiguous()
    k_ref = packed_arguments(k_codes, k_scales, k_format, k_kind, k_per_scale, architecture(q))
    v_ref = packed_arguments(v_codes, v_scales, v_format, v_kind, v_per_scale, architecture(q))
    if route == "auto":
        route = choose_route(q, k, only_ours=backend == "triton")
    if route == "fused":
        return launch_fused_attention(q, k, v, k_ref, v_ref, foreground, alpha, scale)
    k, v = launch_blend_kv(k, v, k_ref, v_ref, foreground, alpha)
    return run_attention(q, k, v, scale, route)


_locked_attention_op.register_fake(lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format))


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
    alpha: float | Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
    attention: str = "auto",
) -> Tensor:
    """Attend to keys and values whose background is blended with the source's by alpha.

    K = m K + (1 - m) (alpha K_ref + (1 - alpha) K), V likewise (KV-Lock, arXiv 2603.09657).

    Args:
        q: queries [B, Sq, H, D].
        k, v: keys and values [B, S, H, D], of q's dtype.
        k_ref, v_ref: the source's [B or 1, S, H, D], tensors or QuantizedKV.
        foreground: bool [B or 1, S], m in the formula.
        alpha: a number in [0, 1], or [B]. A tensor's range is not checked: that would wait for the device.
        scale: factor on the scores; None: D ** -0.5.
        backend: "auto", "reference" or "triton".
        attention: where Triton serves: "fused" (one kernel), or a blend in front of "triton", "cudnn", "flash" or
            "sdpa"; "auto" goes by the shape.

    Returns: [B, Sq, H, D] in q's dtype.
    Raises ValueError on shapes, dtypes or names that do not fit.
    """
    if not isinstance(alpha, Tensor) and not (isinstance(alpha, (int, float)) and 0.0 <= alpha <= 1.0):
        raise ValueError(f"alpha must be a number between 0 and 1 or a tensor, got {alpha!r}")
    _check(q, k, v, k_ref, v_ref, foreground)
    check_route(attention, ROUTES, backend, q)
    alpha = per_sample("alpha", alpha, q)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < factor < math.inf:
        raise ValueError(f"scale must be a positive finite number, got {scale!r}")
    refs = *codes_of(k_ref), *codes_of(v_ref)
    return _locked_attention_op(q, k, v, *refs, foreground, alpha, float(factor), backend, attention)


def launch_shipped(architecture: int) -> None:
    """A launch of every configuration that ships, for the compiler's report."""
    tokens, alpha = 32760, torch.empty(2, device="meta")
    foreground = torch.empty(1, tokens, dtype=torch.bool, device="meta")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim in (64, 128):
            k = torch.empty(2, tokens, 12, dim, dtype=dtype, device="meta")
            for format in ("native", "fp8_e4m3", "int8", "int4") if dtype == torch.bfloat16 else ("native",):
                k_ref, v_ref = (shipped_reference(k, format, kind, architecture) for kind in ("k", "v"))
                launch_blend_kv(k, k, k_ref, v_ref, foreground, alpha)
