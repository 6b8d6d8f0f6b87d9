"""The single-kernel path: cached keys and values are decoded and blended inside the attention's loop.

    out = softmax(scale Q K'^T) V'        K' = k + w (k_ref - k), V' likewise;  w = alpha (1 - m) per sample and token

Tokens lie in any order, m is a mask. Reads q, k, v and the cache once and writes no K', V': for short sequences and few
queries, where a launch and a round trip through memory cost more than the blend. With many queries the blend is done
again for every block of them, and the product's operands go through registers: a blend in front of attention.py
(locked_attention.py) is faster there. New K/V where w = 1 and the cache where w = 0 are not read. fp32 inside; K', V'
and P are rounded to q's dtype for the products. Source: KV-Lock (arXiv 2603.09657).
"""

import torch
from torch import Tensor

from kvlock_fast.kernels import attention as plain
from kvlock_fast.kernels.attention import Tiles
from kvlock_fast.kernels.language import require_package_name, tl, triton
from kvlock_fast.kernels.launch import architecture
from kvlock_fast.kernels.packed import PackedArguments, load_packed, meta_codes, packed_arguments
from kvlock_fast.kernels.tiles import dot, mix, narrow, shifted

require_package_name(__name__)

# By padded head dim, for 16-bit tensors; the second for sm_90 and sm_100. No spill in the compiler's report, not swept.
TILES = {32: Tiles(64, 32, 4, 2), 64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 8, 2)}
WARP_GROUP_TILES = {32: Tiles(64, 64, 4, 2), 64: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 4, 2)}

FULL_PRECISION_TILES = plain.IEEE_TILES | {128: Tiles(16, 16, 4, 1)}


def tiles_for(q: Tensor) -> Tiles:
    """The tiles for q [B, Sq, H, D]."""
    arch = architecture(q)
    if arch == 0:
        return plain.INTERPRETER_TILES
    if q.dtype == torch.float32:
        return FULL_PRECISION_TILES[plain.padded(q.shape[3], 32)]
    return (WARP_GROUP_TILES if arch // 10 in (9, 10) else TILES)[plain.padded(q.shape[3], 32)]


@triton.jit
def _load_blended(
    new, codes, scale, minimum, i_h, o_n, o_d, b_w, mask,    # pointers at their sample and head; mask: rows [N, 1]
    H, D, new_n, new_d, ref_n, ref_d,
    FORMAT: tl.constexpr, KIND: tl.constexpr, PER_SCALE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Keys or values [N, D] of one head, new and cached mixed by b_w [N, 1], as new's dtype; 0 in masked rows."""
    p_new = new + o_n.to(tl.int64) * new_n + o_d.to(tl.int64) * new_d
    b_new = tl.load(p_new, mask=mask & (b_w != 1) & (o_d < D), other=0.0).to(tl.float32)
    b_ref = load_packed(
        codes, scale, minimum, i_h, o_n, o_d, mask & (b_w != 0), H, D, ref_n, ref_d, FORMAT, KIND, PER_SCALE, FP8
    )
    return narrow(mix(b_new, b_ref, b_w), new.dtype.element_ty)


@triton.jit
def _fused_attention_kernel(
    q, k, v, k_codes, k_scale, k_minimum, v_codes, v_scale, v_minimum, foreground, alpha, out, partial, lse,
    Sq, S, H, D, scale, share,                               # scale: with log2(e); share: keys a split, whole blocks
    q_b, q_n, q_h, q_d, k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d,
    kr_b, kr_n, kr_h, kr_d, ks_b, vr_b, vr_n, vr_h, vr_d, vs_b, f_b, f_n, o_b, o_t, o_h,
    K_FORMAT: tl.constexpr, K_KIND: tl.constexpr, K_PER: tl.constexpr,
    V_FORMAT: tl.constexpr, V_KIND: tl.constexpr, V_PER: tl.constexpr, FP8: tl.constexpr,
    SPLIT: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(Sq / BLOCK_M), B * H, splits): a block of queries of one head against its share of the keys."""
    i_bh, i_split = tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, D_PAD)[None, :]
    m_q = (o_m[:, None] < Sq) & (o_d < D)
    p_q = q + i_b * q_b + i_h * q_h + o_m.to(tl.int64)[:, None] * q_n + o_d.to(tl.int64) * q_d
    b_q = tl.load(p_q, mask=m_q, other=0.0)
    b_alpha = tl.load(alpha + i_b)
    # Scales lie per sample; a format without them has none.
    ks, km = shifted(k_scale, i_b * ks_b), shifted(k_minimum, i_b * ks_b)
    vs, vm = shifted(v_scale, i_b * vs_b), shifted(v_minimum, i_b * vs_b)

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    first = i_split * share
    for i_n in range(first, tl.minimum(first + share, S), BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_fg = tl.load(foreground + i_b * f_b + o_n.to(tl.int64) * f_n, mask=o_n < S, other=1)
        b_w = tl.where(b_fg != 0, 0.0, b_alpha)[:, None]
        mask = o_n[:, None] < S
        b_k = _load_blended(
            k + i_b * k_b + i_h * k_h, k_codes + i_b * kr_b + i_h * kr_h, ks, km, i_h, o_n[:, None], o_d, b_w, mask,
            H, D, k_n, k_d, kr_n, kr_d, K_FORMAT, K_KIND, K_PER, FP8,
        )  # fmt: skip
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        b_s = tl.where(o_n[None, :] < S, b_s * scale, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_shrink = tl.exp2(b_max - b_new)
        b_v = _load_blended(
            v + i_b * v_b + i_h * v_h, v_codes + i_b * vr_b + i_h * vr_h, vs, vm, i_h, o_n[:, None], o_d, b_w, mask,
            H, D, v_n, v_d, vr_n, vr_d, V_FORMAT, V_KIND, V_PER, FP8,
        )  # fmt: skip
        b_acc = dot(narrow(b_p, b_v.dtype), b_v, b_acc * b_shrink[:, None])
        b_sum, b_max = b_sum * b_shrink + tl.sum(b_p, 1), b_new

    plain.store_attended(b_acc, b_sum, b_max, o_m, out, partial, lse, Sq, H, D, o_b, o_t, o_h, SPLIT, D_PAD)


def reference_meta(k_ref: PackedArguments, v_ref: PackedArguments) -> dict[str, object]:
    """Formats of the cached keys and values, as the kernels take them."""
    meta = {f"{x}_{name}": ref.meta[name] for x, ref in (("K", k_ref), ("V", v_ref)) for name in ("FORMAT", "KIND")}
    return meta | dict(K_PER=k_ref.meta["PER_SCALE"], V_PER=v_ref.meta["PER_SCALE"], FP8=k_ref.meta["FP8"])


def launch_fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: PackedArguments,
    v_ref: PackedArguments,
    foreground: Tensor,
    alpha: Tensor,
    scale: float,
    splits: int | None = None,
) -> Tensor:
    """Locked attention in q's dtype, [B, Sq, H, D] contiguous.

    q [B, Sq, H, D]; k, v [B, S, H, D] of any strides; k_ref, v_ref as `packed_arguments` makes them, S rows each;
    foreground bool [B or 1, S]; alpha [B] fp32; splits: as for `launch_attention`.
    """
    _, queries, heads, dim = q.shape
    tokens, tiles = k.shape[1], tiles_for(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    cached = [k_ref.codes, k_ref.scale, k_ref.minimum, v_ref.codes, v_ref.scale, v_ref.minimum]
    strides = [n for x in (q, k, v) for n in x.stride()]
    strides += [*k_ref.strides, k_ref.scale_stride, *v_ref.strides, v_ref.scale_stride]
    strides += [foreground.stride(0) if foreground.shape[0] > 1 else 0, foreground.stride(1), *out.stride()[:3]]
    plain.launch_splits(
        _fused_attention_kernel, tiles, tokens, splits, [q, k, v, *cached, foreground.view(torch.uint8), alpha], out,
        (queries, tokens, heads, dim, scale * plain.LOG2_E), strides, **reference_meta(k_ref, v_ref),
        D_PAD=plain.padded(dim),
    )  # fmt: skip
    return out


def launch_shipped(architecture: int) -> None:
    """A launch of every configuration that ships, for the compiler's report."""
    tokens, alpha = 1560, torch.empty(2, device="meta")
    foreground = torch.empty(1, tokens, dtype=torch.bool, device="meta")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim in (64, 128):
            q = torch.empty(2, tokens, 12, dim, dtype=dtype, device="meta")
            for format in ("native", "fp8_e4m3", "int8", "int4") if dtype == torch.bfloat16 else ("native",):
                k_ref, v_ref = (shipped_reference(q, format, kind, architecture) for kind in ("k", "v"))
                launch_fused_attention(q, q, q, k_ref, v_ref, foreground, alpha, 1.0)
                launch_fused_attention(q[:, :16], q, q, k_ref, v_ref, foreground, alpha, 1.0, splits=4)


def shipped_reference(q: Tensor, format: str, kind: str, architecture: int) -> PackedArguments:
    """Cached keys or values for q's tokens on the `meta` device."""
    codes, *scales = [q[:1]] if format == "native" else meta_codes((1, *q.shape[1:]), format, kind)
    return packed_arguments(codes, scales, format, kind, 1, architecture)
