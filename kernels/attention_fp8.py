"""Attention on fp8 operands, as the prologue's fp8 output hands them over.

    out = softmax(scale Q K^T) V        Q = q q_scale, K = k k_scale, V = v_t^T v_scale

q, k: e4m3 codes [B, S, H, D]; v_t: codes [B, H, D, S padded to 16 with zeros], because both factors of an fp8 product
must be contiguous along the sum. Scales fp32 [B, H, ceil(S / 128)], one per head and 128 tokens. Scores and the
softmax are fp32; P is rounded to e4m3 after a shift by 2^8 that the normalisation undoes. Each block's P V is added to
the accumulator in fp32 registers (two-level accumulation): inside the matrix unit fp8 sums keep 14 bits only. There
K's scale folds into the softmax's, V's into that addition. Pipelined as attention.py.
Source: SageAttention 2 (arXiv 2411.10958) and FlashAttention-3 (arXiv 2407.08608) for the scales and the accumulation.
"""

import torch
from torch import Tensor

from kvlock_fast.kernels import attention as plain
from kvlock_fast.kernels.attention import Tiles
from kvlock_fast.kernels.language import require_package_name, tl, triton
from kvlock_fast.kernels.launch import architecture, runs_triton
from kvlock_fast.kernels.tiles import INTERPRETED, from_fp8, to_fp8

require_package_name(__name__)

TOKENS_PER_SCALE = 128
FP8_MATRIX_FROM = 89
_PER_SCALE = tl.constexpr(TOKENS_PER_SCALE)
_SHIFT = tl.constexpr(8.0)

# By architecture and padded head dim; tiles divide 128, the tokens of a scale. By the compiler's report, not swept.
TILES = {
    89: {32: Tiles(128, 64, 8, 2), 64: Tiles(128, 64, 8, 2), 128: Tiles(128, 32, 8, 2)},
    90: {32: Tiles(128, 64, 8, 4), 64: Tiles(128, 64, 8, 4), 128: Tiles(128, 64, 8, 4)},
    100: {32: Tiles(128, 128, 8, 2), 64: Tiles(128, 128, 8, 2), 128: Tiles(128, 128, 8, 2)},
    120: {32: Tiles(128, 64, 8, 2), 64: Tiles(128, 64, 8, 2), 128: Tiles(128, 32, 8, 2)},
}


def tiles_for(q: Tensor) -> Tiles:
    """The tiles for codes q [B, Sq, H, D]. Raises ValueError where the GPU multiplies no fp8."""
    arch = architecture(q)
    if arch == 0:
        return plain.INTERPRETER_TILES
    if arch < FP8_MATRIX_FROM:
        raise ValueError(f"fp8 attention needs compute capability 8.9 or later, this is {arch / 10}")
    return TILES[max(a for a in TILES if a <= arch)][plain.padded(q.shape[3], 32)]


def attention_fp8_reference(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v_t: Tensor, v_scale: Tensor, scale: float
) -> Tensor:
    """Attention of the decoded operands, [B, Sq, H, D] fp32; P is not rounded."""
    tokens = k.shape[1]

    def spread(s: Tensor, length: int) -> Tensor:
        return s.repeat_interleave(TOKENS_PER_SCALE, dim=2)[:, :, :length].transpose(1, 2)[..., None]

    q = q.float() * spread(q_scale, q.shape[1])
    k = k.float() * spread(k_scale, tokens)
    v = v_t[..., :tokens].permute(0, 3, 1, 2).float() * spread(v_scale, tokens)
    return plain.attention_reference(q, k, v, scale)


@triton.jit
def _load_transposed(x, i_b, i_h, n, N, D, x_b, x_h, x_d, BLOCK: tl.constexpr, D_PAD: tl.constexpr, TMA: tl.constexpr):
    """Codes of tokens n .. n + BLOCK of [B, H, D, N], [D_PAD, BLOCK]; 0 past the ends."""
    if TMA:
        b_x = x.load([i_b, i_h, 0, n]).reshape([D_PAD, BLOCK])
    else:
        o_n, o_d = n + tl.arange(0, BLOCK), tl.arange(0, D_PAD)
        p_x = x + i_b.to(tl.int64) * x_b + i_h.to(tl.int64) * x_h + o_d.to(tl.int64)[:, None] * x_d + o_n[None, :]
        b_x = tl.load(p_x, mask=(o_d[:, None] < D) & (o_n[None, :] < N), other=0.0)
    return b_x


@triton.jit
def _dot_fp8(a, b):
    """a @ b of e4m3 codes, fp32. `a` may be held as bits; the interpreter takes bits for both."""
    if INTERPRETED:
        b_out = tl.dot(from_fp8(a, False), from_fp8(b, False), input_precision="ieee")
    else:
        b_out = tl.dot(a.to(tl.float8e4nv, bitcast=True), b)
    return b_out


@triton.jit
def _softmax_step(b_s, b_max, scale):
    """Take an online-softmax step: P's codes, its row sums (both shifted), the older sums' factor, the maximum."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    b_p = tl.exp2(b_s * scale - (b_new - _SHIFT)[:, None])
    return to_fp8(b_p, True), tl.sum(b_p, 1), tl.exp2(b_max - b_new), b_new


@triton.jit
def _attention_fp8_kernel(
    q, k, v_t, q_scale, k_scale, v_scale, out, partial, lse,
    Sq, S, Sv, H, D: tl.constexpr, scale, share,         # scale: with log2(e); share: keys a split, whole blocks
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_h, v_d, o_b, o_n, o_h,
    SPLIT: tl.constexpr, D_PAD: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(Sq / BLOCK_M), B * H, splits), as `_attention_kernel`."""
    i_bh, i_split = tl.program_id(1), tl.program_id(2)
    i_b, i_h = i_bh // H, i_bh % H
    i_m = tl.program_id(0) * BLOCK_M
    b_q = plain.load_rows(q, i_b, i_h, i_m, Sq, D, q_b, q_n, q_h, BLOCK_M, D_PAD, TMA)
    scale *= tl.load(q_scale + i_bh.to(tl.int64) * tl.cdiv(Sq, _PER_SCALE) + i_m // _PER_SCALE)
    scales = i_bh.to(tl.int64) * tl.cdiv(S, _PER_SCALE)

    first = i_split * share
    last = tl.minimum(first + share, tl.cdiv(S, BLOCK_N) * BLOCK_N) - BLOCK_N
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)

    b_k = plain.load_rows(k, i_b, i_h, last, S, D, k_b, k_n, k_h, BLOCK_N, D_PAD, TMA)
    b_s = tl.where(last + tl.arange(0, BLOCK_N)[None, :] < S, _dot_fp8(b_q, tl.trans(b_k)), float("-inf"))
    b_p, b_sum, b_shrink, b_max = _softmax_step(b_s, b_max, scale * tl.load(k_scale + scales + last // _PER_SCALE))
    for i_n in range(last, first, -BLOCK_N):
        b_k = plain.load_rows(k, i_b, i_h, i_n - BLOCK_N, S, D, k_b, k_n, k_h, BLOCK_N, D_PAD, TMA)
        b_s = _dot_fp8(b_q, tl.trans(b_k))
        b_v = _load_transposed(v_t, i_b, i_h, i_n, Sv, D, v_b, v_h, v_d, BLOCK_N, D_PAD, TMA)
        b_pv = _dot_fp8(b_p, tl.trans(b_v))
        k_by = scale * tl.load(k_scale + scales + (i_n - BLOCK_N) // _PER_SCALE)
        b_p, b_row, b_shrink, b_max = _softmax_step(b_s, b_max, k_by)
        b_sum = b_sum * b_shrink + b_row
        b_acc = (b_acc + b_pv * tl.load(v_scale + scales + i_n // _PER_SCALE)) * b_shrink[:, None]
    b_v = _load_transposed(v_t, i_b, i_h, first, Sv, D, v_b, v_h, v_d, BLOCK_N, D_PAD, TMA)
    b_acc += _dot_fp8(b_p, tl.trans(b_v)) * tl.load(v_scale + scales + first // _PER_SCALE)

    o_m = i_m + tl.arange(0, BLOCK_M)
    plain.store_attended(b_acc, b_sum, b_max - _SHIFT, o_m, out, partial, lse, Sq, H, D, o_b, o_n, o_h, SPLIT, D_PAD)


def launch_attention_fp8(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v_t: Tensor,
    v_scale: Tensor,
    scale: float,
    dtype: torch.dtype,
    splits: int | None = None,
    tma: bool | None = None,
) -> Tensor:
    """Attention of codes and scales as described above, [B, Sq, H, D] in `dtype`. Scales must be contiguous.

    splits, tma: as for `launch_attention`.
    """
    _, queries, heads, dim = q.shape
    tokens, tiles, dim_pad = k.shape[1], tiles_for(q), plain.padded(dim, 32)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    if out.numel() == 0:
        return out
    if architecture(q) == 0:
        q, k, v_t = (x.view(torch.uint8) for x in (q, k, v_t))
    if tma is None:
        tma = architecture(q) >= plain.TMA_FROM and plain.fits_tma(q, k, v_t)
    blocks = ((q, [1, tiles.queries, 1, dim_pad]), (k, [1, tiles.keys, 1, dim_pad]), (v_t, [1, 1, dim_pad, tiles.keys]))
    operands = [*(plain.descriptor(x, block) if tma else x for x, block in blocks), q_scale, k_scale, v_scale]
    strides = [n for x in (q, k, v_t, out) for n in x.stride()[:3]]
    sizes = (queries, tokens, v_t.shape[3], heads, dim, scale * plain.LOG2_E)
    plain.launch_splits(
        _attention_fp8_kernel, tiles, tokens, splits, operands, out, sizes, strides, D_PAD=dim_pad, TMA=tma
    )
    return out


@torch.library.custom_op("kvlock_fast::attention_fp8", mutates_args=())
def _attention_fp8_op(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v_t: Tensor,
    v_scale: Tensor,
    scale: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    operands = (q, q_scale, k, k_scale, v_t, v_scale)
    # A GPU that multiplies no fp8 decodes it: right, and no faster than 16 bits.
    if not runs_triton(backend, *operands) or 0 < architecture(q) < FP8_MATRIX_FROM:
        return attention_fp8_reference(*operands, scale).to(dtype).contiguous()
    return launch_attention_fp8(*operands, scale, dtype)


@_attention_fp8_op.register_fake
def _(q, q_scale, k, k_scale, v_t, v_scale, scale, dtype, backend):
    return torch.empty(q.shape, dtype=dtype, device=q.device)


def attention_fp8(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v_t: Tensor,
    v_scale: Tensor,
    scale: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> Tensor:
    """Attend with e4m3 operands, as `prologue` gives them with output="fp8": softmax(scale Q K^T) V.

    Args:
        q, k, v_t: codes, float8_e4m3fn, of the queries [B, Sq, H, D], the keys [B, S, H, D], and the transposed values
            [B, H, D, S padded to 16]; D up to 128.
        q_scale, k_scale, v_scale: fp32, [B, H, ceil(Sq / 128)] for q and [B, H, ceil(S / 128)] for k and v.
        scale: factor on the scores; None: D ** -0.5.
        dtype: that of the result.
        backend: "auto", "reference" or "triton".

    Returns: [B, Sq, H, D] in `dtype`.
    Raises ValueError on shapes, dtypes or layouts that do not fit.
    """
    if q.ndim != 4 or k.ndim != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]) or k.shape[1] == 0:
        raise ValueError(f"q and k must be [B, Sq or S, H, D], S >= 1, got {tuple(q.shape)} and {tuple(k.shape)}")
    batch, tokens, heads, dim = k.shape
    if dim > plain.MOST_CHANNELS:
        raise ValueError(f"attention_fp8 takes head dims up to {plain.MOST_CHANNELS}, got {dim}")
    if v_t.ndim != 4 or v_t.shape[:3] != (batch, heads, dim) or v_t.shape[3] < tokens or v_t.shape[3] % 16:
        raise ValueError(f"v_t must be [{batch}, {heads}, {dim}, {tokens} padded to 16], got {tuple(v_t.shape)}")
    for name, x in (("q", q), ("k", k), ("v_t", v_t)):
        if x.dtype != torch.float8_e4m3fn or x.stride(3) != 1:
            raise ValueError(f"{name} must be float8_e4m3fn with a contiguous last dimension, got {x.dtype}")
    for name, x, length in (
        ("q_scale", q_scale, q.shape[1]),
        ("k_scale", k_scale, tokens),
        ("v_scale", v_scale, tokens),
    ):
        want = (batch, heads, -(-length // TOKENS_PER_SCALE))
        if x.shape != want or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous fp32 {want}, got {x.dtype} {tuple(x.shape)}")
    scale = dim**-0.5 if scale is None else float(scale)
    return _attention_fp8_op(q, q_scale, k, k_scale, v_t, v_scale, scale, dtype, backend)


def launch_shipped(architecture: int) -> None:
    """A launch of every configuration that ships, for the compiler's report."""
    if architecture < FP8_MATRIX_FROM:
        return
    for dim in (32, 64, 128):
        shapes = ((2, 32760, 12, dim), (2, 12, dim, 32768))
        q, v_t = (torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta") for shape in shapes)
        scales = torch.empty(2, 12, 256, device="meta")
        launch_attention_fp8(q, scales, q, scales, v_t, scales, 1.0, torch.bfloat16)
        launch_attention_fp8(q, scales, q, scales, v_t, scales, 1.0, torch.bfloat16, tma=False)
        launch_attention_fp8(q[:, :985], scales[..., :8], q, scales, v_t, scales, 1.0, torch.bfloat16, splits=4)
