"""Steps of a prologue program on its rows: load, normalise, blend, rotate, capture, store.

A tile is [R, BLOCK_D]: a row is one head of one token, its channels lie in *pair order*, positions 2i and 2i + 1 being
the two channels that RoPE rotates together. For interleaved pairs that is the order in memory; split halves are loaded
as two tiles and joined, which moves no register. Rows and channels outside are 0 all the way.
"""

# To the checker `static_range` is no iterable: only the compiler walks it.
# pyright: reportGeneralTypeIssues=false

import math

from kvlock_fast.kernels.language import require_package_name, tl, triton
from kvlock_fast.kernels.packed import load_packed
from kvlock_fast.kernels.prologue_reference import FP8_BLOCK
from kvlock_fast.kernels.quantize import _PER_FP8, _TINY, _scaled_codes
from kvlock_fast.kernels.tiles import largest, narrow, to_fp8

require_package_name(__name__)

_FP8_BLOCK, _SQRT_2 = tl.constexpr(FP8_BLOCK), tl.constexpr(math.sqrt(2))


@triton.jit
def load_rows(p, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """fp32 tile of the rows at `p` [R, 1]; `mask` [R, 1]."""
    if HALVES:
        o_d = tl.arange(0, BLOCK_D // 2)[None, :]
        inside = mask & (o_d < D // 2)
        first = tl.load(p + o_d, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(p + D // 2 + o_d, mask=inside, other=0.0).to(tl.float32)
        x = tl.join(first, second).reshape(first.shape[0], BLOCK_D)
    else:
        o_d = tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(p + o_d, mask=mask & (o_d < D), other=0.0).to(tl.float32)
    return x


@triton.jit
def store_rows(p, x, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """Store the tile `x`, of p's dtype, in the rows at `p` [R, 1]."""
    if HALVES:
        o_d = tl.arange(0, BLOCK_D // 2)[None, :]
        inside = mask & (o_d < D // 2)
        first, second = tl.split(x.reshape(x.shape[0], BLOCK_D // 2, 2))
        tl.store(p + o_d, first, mask=inside)
        tl.store(p + D // 2 + o_d, second, mask=inside)
    else:
        o_d = tl.arange(0, BLOCK_D)[None, :]
        tl.store(p + o_d, x, mask=mask & (o_d < D))


@triton.jit
def load_source(
    codes, scale, minimum,                                                    # at their sample
    i_h, o_n, mask,                                                           # [R, 1]: heads, rows, what to read
    H: tl.constexpr, stride_n, stride_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr,
    FORMAT: tl.constexpr, KIND: tl.constexpr, PER_SCALE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """fp32 tile of the source's cached rows."""
    codes += i_h.to(tl.int64) * stride_h
    o_d = tl.arange(0, BLOCK_D)[None, :]
    if HALVES and FORMAT != "int4":
        o_half = tl.arange(0, BLOCK_D // 2)[None, :]
        first = load_packed(
            codes, scale, minimum, i_h, o_n, o_half, mask, H, D // 2, stride_n, 1, FORMAT, KIND, PER_SCALE, FP8,
        )  # fmt: skip
        codes += D // 2
        second = load_packed(
            codes, scale, minimum, i_h, o_n, o_half, mask, H, D // 2, stride_n, 1, FORMAT, KIND, PER_SCALE, FP8,
        )  # fmt: skip
        x = tl.join(first, second).reshape(first.shape[0], BLOCK_D)
    else:
        x = load_packed(codes, scale, minimum, i_h, o_n, o_d, mask, H, D, stride_n, 1, FORMAT, KIND, PER_SCALE, FP8)
        if HALVES:  # a byte of int4 holds neighbours: put them in pair order only now
            from_channel = tl.where(o_d < D, o_d // 2 + (o_d % 2) * (D // 2), 0) + tl.zeros_like(i_h)
            x = tl.where(o_d < D, tl.gather(x, from_channel, 1), 0.0)
    return x


@triton.jit
def inverse_rms(xs, eps, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, HEADS: tl.constexpr):
    """1 / rms over all heads, spread over a tile; xs: the tiles of all heads, HEADS rows of a token in each."""
    squares = xs[0] * xs[0]
    for c in tl.static_range(1, CHUNKS):
        squares += xs[c] * xs[c]
    R: tl.constexpr = squares.shape[0]
    BLOCK_D: tl.constexpr = squares.shape[1]
    total = tl.sum(squares.reshape(R // HEADS, HEADS * BLOCK_D), axis=1, keep_dims=True)
    inverse = tl.rsqrt(total / WIDTH + eps)
    return inverse.broadcast_to(R // HEADS, HEADS * BLOCK_D).reshape(R, BLOCK_D)


@triton.jit
def normalise(x, inverse, weight, bias, eps, D: tl.constexpr, NORM: tl.constexpr):
    """The tile normalised; `inverse`: of `inverse_rms`; weight and bias are tiles, or None."""
    if NORM == "rms_across_heads":
        x *= inverse
    elif NORM == "rms":
        x *= tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)
    elif NORM == "layer":
        x = tl.where(tl.arange(0, x.shape[1])[None, :] < D, x - tl.sum(x, axis=1, keep_dims=True) / D, 0.0)
        x *= tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)
    if weight is not None:
        x *= weight
    if bias is not None:
        x += bias
    return x


@triton.jit
def source_weight(alpha, i_b, a_b, FIRST: tl.constexpr):
    """alpha of sample i_b: 1 where there is none, 0 for the samples before FIRST."""
    return 1.0 if alpha is None else tl.load(alpha + (i_b - FIRST) * a_b, mask=i_b >= FIRST, other=0.0)


@triton.jit
def rotate(x, cos, sin):
    """The tile's pairs rotated; cos, sin [R, BLOCK_D / 2]."""
    a, b = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
    return tl.join(a * cos - b * sin, a * sin + b * cos).reshape(x.shape[0], x.shape[1])


@triton.jit
def bound_codes(x, weight, bias, WIDTH: tl.constexpr, FP8: tl.constexpr):
    """fp8 codes and scales [R, 1] by the most that the norm can give: sqrt(WIDTH) max |weight| + sqrt(2) max |bias|."""
    # Two channels of a row of rms 1 are a vector of at most sqrt(WIDTH), however it is rotated.
    bound = tl.sqrt_rn(tl.full([x.shape[0], 1], WIDTH, tl.float32))
    if weight is not None:
        bound *= largest(tl.abs(weight), 1)
    if bias is not None:
        bound += largest(tl.abs(bias), 1) * _SQRT_2
    scale = bound * _PER_FP8
    scale = tl.where(bound == 0, 1.0, tl.where(scale < _TINY, _TINY, scale))
    return to_fp8(x * (1.0 / scale), FP8), scale


@triton.jit
def capture_rows(
    kept, kept_scale, x, row, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr,
    FORMAT: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Store the tile in a cache's format; row [R, 1]: which rows of `kept` it is."""
    p = kept + row * D
    if FORMAT == "fp8_e4m3" or FORMAT == "int8":
        codes, scale = _scaled_codes(x, FORMAT, 1, FP8)
        store_rows(p, codes, mask, D, BLOCK_D, HALVES)
        tl.store(kept_scale + row, scale, mask=mask)
    else:
        store_rows(p, narrow(x, kept.dtype.element_ty), mask, D, BLOCK_D, HALVES)


@triton.jit
def store_output(
    out, out_scale, x, weight, bias, i_h, o_t, mask, starts_block, S, PADDED,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr,
    OUT: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Store the tile as OUT says: native; bounded or amax (e4m3, a scale by bound or by amax); transposed (by amax).

    The scale by amax is that of the whole tile, 128 tokens of one head. starts_block: whether a block of 128 tokens
    starts among these.
    """
    p = out + (o_t.to(tl.int64) * H + i_h) * D
    p_scale = None if out_scale is None else out_scale + i_h * tl.cdiv(S, _FP8_BLOCK) + o_t // _FP8_BLOCK
    if OUT == "native":
        store_rows(p, narrow(x, out.dtype.element_ty), mask, D, BLOCK_D, HALVES)
    elif OUT == "bounded":
        codes, scale = bound_codes(x, weight, bias, WIDTH, FP8)
        store_rows(p, codes, mask, D, BLOCK_D, HALVES)
        if starts_block:  # few programs do
            tl.store(p_scale, scale, mask=mask & (o_t % _FP8_BLOCK == 0))
    else:
        codes, scale = _scaled_codes(x, "fp8_e4m3", _FP8_BLOCK, FP8)
        tl.store(p_scale, scale + tl.zeros([x.shape[0], 1], tl.float32), mask=mask & (o_t % _FP8_BLOCK == 0))
        if OUT == "amax":
            store_rows(p, codes, mask, D, BLOCK_D, HALVES)
        else:
            codes = tl.where(mask, codes, 0).to(tl.uint8)  # also where a NaN has made a NaN of the scale
            o_d = tl.arange(0, BLOCK_D)[:, None]
            o_t, i_h = tl.trans(o_t), tl.trans(i_h)
            p = out + (i_h.to(tl.int64) * D + o_d) * PADDED + o_t
            tl.store(p, tl.trans(codes), mask=(o_t < PADDED) & (o_d < D))
