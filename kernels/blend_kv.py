"""Keys and values blended with the source's, out of place, in one launch: the step in front of an attention backend.

    K' = k + w (k_ref - k), V' likewise;  w = alpha (1 - m) per sample and token        [B, S, H, D], fp32 inside

Where w = 0 the new, where w = 1 the cached tokens come through bit for bit (decoded and rounded to k's dtype), and the
other side is not read. Bytes moved: 2 reads (a third for 0 < w < 1) and 2 writes of K and V. The prologue does the same
together with the norm and RoPE for tokens that lie foreground-first; here they lie in any order under a mask.
Source: KV-Lock (arXiv 2603.09657).
"""

import torch
from torch import Tensor

from kvlock_fast.kernels.attention import padded
from kvlock_fast.kernels.fused_attention import _load_blended, reference_meta
from kvlock_fast.kernels.guard import require_package_name
from kvlock_fast.kernels.language import tl, triton
from kvlock_fast.kernels.launch import launch
from kvlock_fast.kernels.packed import PackedArguments, meta_codes, packed_arguments

require_package_name(__name__)

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
    ks, km, vs, vm = k_scale, k_minimum, v_scale, v_minimum
    if k_scale is not None:
        ks += i_b * ks_b
    if k_minimum is not None:
        km += i_b * ks_b
    if v_scale is not None:
        vs += i_b * vs_b
    if v_minimum is not None:
        vm += i_b * vs_b
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
    """K', V' [B, S, H, D] contiguous, in k's dtype. Arguments as for `launch_fused_attention`."""
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


def launch_shipped(architecture: int) -> None:
    """A launch of every configuration that ships, for the compiler's report."""
    tokens, alpha = 32760, torch.empty(2, device="meta")
    foreground = torch.empty(1, tokens, dtype=torch.bool, device="meta")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim in (64, 128):
            k = torch.empty(2, tokens, 12, dim, dtype=dtype, device="meta")
            for format in ("native", "fp8_e4m3", "int8", "int4") if dtype == torch.bfloat16 else ("native",):
                refs = []
                for kind in ("k", "v"):
                    codes, *scales = [k[:1]] if format == "native" else meta_codes(1, tokens, 12, dim, format, kind)
                    refs.append(packed_arguments(codes, scales, format, kind, 1, architecture))
                launch_blend_kv(k, k, *refs, foreground, alpha)
