"""Packed keys and values: fewer bytes for the cache of the source's background tokens.

| format   | codes                           | scales                                                        |
| native   | x as it is                      | none                                                          |
| bf16     | bfloat16                        | none                                                          |
| fp8_e4m3 | float8_e4m3fn                   | amax / 448, fp32, per token and head (or 128 tokens and head) |
| int8     | int8, symmetric, +-127          | amax / 127, fp32, per token and head                          |
| int4     | two 4-bit codes a byte, along D | step and minimum, bf16; k: per channel and 64 tokens,         |
|          |                                 | v: per token and 64 channels                                  |

Keys have a few channels of constantly large size, so int4 groups keys along the tokens and values along the channels
(KIVI, arXiv 2402.02750). Its minimum is rounded down and its step up, so that the rounding of the two to bf16 can
never push a value out of the codes' range. Layout [B, S, H, D]; arithmetic in fp32, by the reciprocal of a scale, so
that reference and kernel give the same bits. (But for int8 and int4 a GPU fuses the product with the addition that
rounds it: a value within an fp32 rounding of the middle between two codes may take the other one.) Bytes moved: the
tokens asked for once, their codes and scales once; a scale's whole group is in one program's registers.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlock_fast.kernels.dequantize import dequantize_kv_op
from kvlock_fast.kernels.language import require_package_name, tl, triton
from kvlock_fast.kernels.launch import architecture, launch, runs_triton
from kvlock_fast.kernels.packed import CODES, FP8_FROM, INT4_GROUP, PACKED, packed_layout
from kvlock_fast.kernels.tiles import bf16_outwards, largest, narrow, nearest_int, smallest, to_fp8

require_package_name(__name__)

FORMATS = ("native", *CODES)
KINDS = ("k", "v")
TOKENS_PER_SCALE = (1, 128)
# Factors and not divisors: torch divides by a number exactly on the CPU, but multiplies by its reciprocal on the GPU.
PER_FP8, PER_INT8, PER_INT4 = 1 / 448, 1 / 127, 1 / 15
TINY = torch.finfo(torch.float32).tiny  # no scale is smaller: its reciprocal must be finite
_PER_FP8, _PER_INT8, _PER_INT4, _TINY = (tl.constexpr(c) for c in (PER_FP8, PER_INT8, PER_INT4, TINY))

# Not swept yet. By the compiler's report for sm_90: 32 elements a thread, and 64 where each thread also computes many
# scales (int4 keys, 64 x 64: 20 instructions an element with 2 warps, 32 with 4).
ELEMENTS_PER_PROGRAM, NUM_WARPS, NUM_WARPS_128, NUM_WARPS_INT4 = 4096, 4, 8, 2


@dataclass(frozen=True)
class QuantizedKV:
    """Keys or values in one of FORMATS.

    codes: [B, S, H, D] ([B, S, H, ceil(D / 2)] uint8 for int4); scale and minimum: None where the format has none;
    shape and dtype: those of the tensor it was made of; tokens_per_scale: 1, or 128 for fp8 in blocks.
    """

    format: str
    kind: str
    shape: torch.Size
    dtype: torch.dtype
    codes: Tensor
    scale: Tensor | None = None
    minimum: Tensor | None = None
    tokens_per_scale: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and padding."""
        return sum(t.nbytes for t in (self.codes, *self.scales))

    @property
    def scales(self) -> list[Tensor]:
        """scale and minimum, those that the format has."""
        return [t for t in (self.scale, self.minimum) if t is not None]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device | str) -> "QuantizedKV":
        """The same on another device."""
        moved = {n: t.to(device) for n in ("codes", "scale", "minimum") if (t := getattr(self, n)) is not None}
        return replace(self, **moved)

    def copy_(self, other: "QuantizedKV") -> "QuantizedKV":
        """Take over another's values; of the same format and shape."""
        for mine, its in zip((self.codes, *self.scales), (other.codes, *other.scales), strict=True):
            mine.copy_(its)
        return self

    def dequantize(self, dtype: torch.dtype | None = None, backend: str = "auto") -> Tensor:
        """[B, S, H, D] in `dtype` (default: the dtype it was made of)."""
        packed = (self.codes, self.scales, self.format, self.kind, self.shape[3], self.tokens_per_scale)
        return dequantize_kv_op(*packed, dtype or self.dtype, backend)


def codes_of(x: Tensor | QuantizedKV) -> tuple[Tensor, list[Tensor], str, str, int]:
    """Codes, scales, format, kind and tokens per scale, as operators take them; a plain tensor is "native"."""
    if isinstance(x, QuantizedKV):
        return x.codes, x.scales, x.format, x.kind, x.tokens_per_scale
    return x, [], "native", "k", 1


def quantize_kv_reference(x: Tensor, format: str, kind: str, tokens_per_scale: int = 1) -> tuple[Tensor, ...]:
    """Codes of x [B, S, H, D] and, where the format has them, scales: scale, or step and minimum."""
    if format == "native":
        return (x.clone(memory_format=torch.contiguous_format),)
    if x.numel() == 0:
        return tuple(x.new_zeros(shape, dtype=t) for shape, t in packed_layout(x.shape, format, kind, tokens_per_scale))
    if format == "bf16":
        return (x.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format),)
    x = x.float()
    if format == "int4":
        return _quantize_int4(x, kind)
    scale = block_scales(x, PER_FP8 if format == "fp8_e4m3" else PER_INT8, tokens_per_scale)
    scaled = x * (1 / scale).repeat_interleave(tokens_per_scale, 1)[:, : x.shape[1]]
    if format == "fp8_e4m3":
        codes = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    else:  # a cast of NaN to an integer is undefined; the scale carries it
        codes = scaled.round().clamp(-127, 127).nan_to_num(0).to(torch.int8)
    return codes.contiguous(), scale


def block_scales(x: Tensor, per_code: float, tokens_per_scale: int) -> Tensor:
    """[B, ceil(S / tokens_per_scale), H, 1]: 1 for zeros, NaN where x has one."""
    blocks = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % tokens_per_scale)).unflatten(1, (-1, tokens_per_scale))
    amax = blocks.abs().amax((2, 4))[..., None]
    return scale_of(amax, per_code)


def scale_of(amax: Tensor, per_code: float) -> Tensor:
    """Scale of values up to amax: 1 for zeros, NaN where amax is."""
    return torch.where(amax == 0, 1.0, (amax * per_code).clamp_min(TINY))


def _grouped(x: Tensor, kind: str) -> Tensor:
    """x [B, S, H, D] with its groups as dimension 2 (k: tokens) or 4 (v: channels), the last one filled up."""
    dim = 1 if kind == "k" else 3
    short = -x.shape[dim] % INT4_GROUP
    if short:  # repeats of the last entry change no group's range
        last = x.narrow(dim, x.shape[dim] - 1, 1)
        x = torch.cat([x, last.repeat_interleave(short, dim)], dim)
    return x.unflatten(dim, (-1, INT4_GROUP))


def _round_to_bf16(x: Tensor, up: bool) -> Tensor:
    near = x.to(torch.bfloat16)
    wrong = near.float() < x if up else near.float() > x
    away = torch.nextafter(near, torch.full_like(near, float("inf") if up else float("-inf")))
    return torch.where(wrong, away, near)


def _quantize_int4(x: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    groups = _grouped(x, kind)
    dim = 2 if kind == "k" else 4
    low, high = groups.amin(dim, keepdim=True), groups.amax(dim, keepdim=True)
    minimum = _round_to_bf16(low, up=False)
    step = _round_to_bf16(((high - minimum.float()) * PER_INT4).clamp_min(TINY), up=True)
    codes = ((groups - minimum.float()) * (1 / step.float())).round().clamp(0, 15).nan_to_num(0).to(torch.uint8)
    codes = codes.flatten(dim - 1, dim)[: x.shape[0], : x.shape[1], :, : x.shape[3]]
    codes = F.pad(codes, (0, x.shape[3] % 2))
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.contiguous(), step.squeeze(dim).contiguous(), minimum.squeeze(dim).contiguous()


@triton.jit
def _quantize_kernel(
    x, index, codes, scale, minimum,
    N, H, D: tl.constexpr,                                               # tokens, heads, channels
    x_b, x_n, x_h, x_d, t_n,                                             # strides of x and index
    INDEXED: tl.constexpr, FORMAT: tl.constexpr, KIND: tl.constexpr, PER_SCALE: tl.constexpr, FP8: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (H * ceil(D / BLOCK_D), ceil(N / BLOCK_N), B): a tile of one head, with its scales' whole groups."""
    PARTS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i_h, i_d = tl.program_id(0).to(tl.int64) // PARTS, tl.program_id(0) % PARTS
    i_n, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end repeat the last one, which changes no group's range.
    token = tl.minimum(rows, N - 1)
    token = (tl.load(index + token.to(tl.int64) * t_n) if INDEXED else token).to(tl.int64)[:, None]
    o_n, o_d = rows[:, None], i_d * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    m_n, m_d = o_n < N, o_d < D
    b_x = tl.load(x + i_b * x_b + token * x_n + i_h * x_h + o_d.to(tl.int64) * x_d, mask=m_d, other=0.0).to(tl.float32)
    row = (i_b * N + o_n) * H + i_h

    if FORMAT == "int4":
        b_codes, b_step, b_low = _int4_codes(b_x, m_d, KIND)
        WIDTH: tl.constexpr = (D + 1) // 2
        o_byte = i_d * (BLOCK_D // 2) + tl.arange(0, BLOCK_D // 2)[None, :]
        tl.store(codes + row * WIDTH + o_byte, b_codes, mask=m_n & (o_byte < WIDTH))
        if KIND == "k":
            at, m_s = ((i_b * tl.num_programs(1) + i_n) * H + i_h) * D + o_d, m_d
        else:
            at, m_s = row * PARTS + i_d, m_n
        tl.store(scale + at, b_step, mask=m_s)
        tl.store(minimum + at, b_low, mask=m_s)
    elif FORMAT == "bf16":
        tl.store(codes + row * D + o_d, narrow(b_x, tl.bfloat16), mask=m_n & m_d)
    else:
        b_codes, b_scale = _scaled_codes(b_x, FORMAT, PER_SCALE, FP8)
        tl.store(codes + row * D + o_d, b_codes, mask=m_n & m_d)
        o_s = o_n if PER_SCALE == 1 else i_n + tl.arange(0, 1)[:, None]
        blocks = tl.cdiv(N, PER_SCALE)
        tl.store(scale + (i_b * blocks + o_s) * H + i_h, b_scale, mask=o_s < blocks)


@triton.jit
def _scaled_codes(b_x, FORMAT: tl.constexpr, PER_SCALE: tl.constexpr, FP8: tl.constexpr):
    """fp8 or int8 codes, and scales [BLOCK_N, 1], or [1, 1] where one is for the whole tile."""
    b_amax = largest(tl.abs(b_x), 1)
    if PER_SCALE > 1:
        b_amax = largest(b_amax, 0)
    b_scale = b_amax * (_PER_FP8 if FORMAT == "fp8_e4m3" else _PER_INT8)
    b_scale = tl.where(b_amax == 0, 1.0, tl.where(b_scale < _TINY, _TINY, b_scale))
    b_x *= tl.div_rn(1.0, b_scale)
    b_codes = to_fp8(b_x, FP8) if FORMAT == "fp8_e4m3" else _int8_codes(b_x)
    return b_codes, b_scale


@triton.jit
def _int8_codes(b_x):
    return nearest_int(tl.where(b_x == b_x, b_x, 0.0)).to(tl.int8)


@triton.jit
def _int4_codes(b_x, mask, KIND: tl.constexpr):
    """Bytes [BLOCK_N, BLOCK_D / 2], step and minimum in bf16 ([1, BLOCK_D] for keys, [BLOCK_N, 1] for values)."""
    b_high = largest(tl.where(mask, b_x, float("-inf")), 0 if KIND == "k" else 1)
    b_low = bf16_outwards(smallest(tl.where(mask, b_x, float("inf")), 0 if KIND == "k" else 1), False)
    b_step = (b_high - b_low.to(tl.float32)) * _PER_INT4
    b_step = bf16_outwards(tl.where(b_step < _TINY, _TINY, b_step), True)
    b_x = (b_x - b_low.to(tl.float32)) * tl.div_rn(1.0, b_step.to(tl.float32))
    b_code = nearest_int(tl.where(mask & (b_x > 0), b_x, 0.0))  # not so for NaN
    b_even, b_odd = tl.split(b_code.reshape(b_x.shape[0], b_x.shape[1] // 2, 2))
    return (b_even | (b_odd << 4)).to(tl.uint8), b_step, b_low


def _tile(dim: int, format: str, kind: str, tokens_per_scale: int) -> dict[str, int]:
    """A program's tile: groups of a scale are whole in it."""
    block_d = triton.next_power_of_2(max(dim, 2))
    if format == "int4":
        return dict(BLOCK_N=INT4_GROUP, BLOCK_D=min(block_d, INT4_GROUP), num_warps=NUM_WARPS_INT4)
    if tokens_per_scale > 1:
        return dict(BLOCK_N=tokens_per_scale, BLOCK_D=block_d, num_warps=NUM_WARPS_128)
    return dict(BLOCK_N=max(1, ELEMENTS_PER_PROGRAM // block_d), BLOCK_D=block_d, num_warps=NUM_WARPS)


def launch_quantize_kv(x: Tensor, tokens: Tensor | None, format: str, kind: str, tokens_per_scale: int) -> list[Tensor]:
    """Codes and scales of x [B, S, H, D] of any strides, or of its `tokens` [N]; any format but native."""
    batch, count, heads, dim = x.shape
    count = count if tokens is None else tokens.shape[0]
    layout = packed_layout((batch, count, heads, dim), format, kind, tokens_per_scale)
    packed = [torch.empty(shape, dtype=dtype, device=x.device) for shape, dtype in layout]
    (codes, *_), (scale, minimum) = packed, (*packed[1:], None, None)[:2]
    tile = _tile(dim, format, kind, tokens_per_scale)
    launch(
        _quantize_kernel,
        (heads * triton.cdiv(dim, tile["BLOCK_D"]), triton.cdiv(count, tile["BLOCK_N"]), batch),
        x, tokens, codes.view(torch.uint8) if format == "fp8_e4m3" else codes, scale, minimum,
        count, heads, dim,
        *x.stride(), 1 if tokens is None else tokens.stride(0),
        INDEXED=tokens is not None, FORMAT=format, KIND=kind, PER_SCALE=tokens_per_scale,
        FP8=architecture(x) >= FP8_FROM, **tile,
    )  # fmt: skip
    return packed


@torch.library.custom_op("kvlock_fast::quantize_kv", mutates_args=())
def _quantize_op(
    x: Tensor, tokens: Tensor | None, format: str, kind: str, tokens_per_scale: int, backend: str
) -> list[Tensor]:
    if runs_triton(backend, x) and format != "native" and x.numel():
        return launch_quantize_kv(x, tokens, format, kind, tokens_per_scale)
    if tokens is not None:
        x = x.index_select(1, tokens)
    return list(quantize_kv_reference(x, format, kind, tokens_per_scale))


@_quantize_op.register_fake
def _(x, tokens, format, kind, tokens_per_scale, backend):
    shape = x.shape if tokens is None else (x.shape[0], tokens.shape[0], *x.shape[2:])
    if format == "native":
        return [x.new_empty(shape)]
    return [x.new_empty(part, dtype=dtype) for part, dtype in packed_layout(shape, format, kind, tokens_per_scale)]


def quantize_kv(
    x: Tensor,
    format: str = "fp8_e4m3",
    kind: str = "k",
    *,
    tokens: Tensor | None = None,
    tokens_per_scale: int = 1,
    backend: str = "auto",
) -> QuantizedKV:
    """Pack keys or values in a format.

    Args:
        x: floating-point [B, S, H, D].
        format: "native", "bf16", "fp8_e4m3", "int8" or "int4".
        kind: "k" or "v"; int4 groups keys along the tokens, values along the channels.
        tokens: int64 [N] indices below S in any order (not checked on a GPU), to pack these tokens only, as
            [B, N, H, D], in the same pass.
        tokens_per_scale: 1, or 128 for fp8 with one scale per head and 128 tokens.
        backend: "auto", "reference" or "triton".

    Returns: the packed tensor, with `.dequantize(dtype)` and `.nbytes`.
    Raises ValueError on what does not fit, naming what was given.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: one of {', '.join(FORMATS)}")
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: 'k' or 'v'")
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor [B, S, H, D], got {x.dtype} {tuple(x.shape)}")
    if tokens is not None and (tokens.ndim != 1 or tokens.dtype != torch.int64):
        raise ValueError(f"tokens must be int64 indices [N], got {tokens.dtype} {tuple(tokens.shape)}")
    if tokens_per_scale not in TOKENS_PER_SCALE:
        raise ValueError(f"tokens_per_scale must be 1 or 128, got {tokens_per_scale!r}")
    if tokens_per_scale > 1 and format != "fp8_e4m3":
        raise ValueError(f"tokens_per_scale=128 is for fp8_e4m3 only, got format {format!r}")
    codes, *scales = _quantize_op(x, tokens, format, kind, tokens_per_scale, backend)
    count = x.shape[1] if tokens is None else tokens.shape[0]
    shape = torch.Size((x.shape[0], count, *x.shape[2:]))
    return QuantizedKV(format, kind, shape, x.dtype, codes, *scales, tokens_per_scale=tokens_per_scale)


def launch_shipped(architecture: int) -> None:
    """A launch of every configuration that ships, for the compiler's report: Wan-1.3B, CogVideoX-2B and LTX."""
    background = torch.empty(26208, dtype=torch.int64, device="meta")
    for heads, dim in ((12, 128), (30, 64), (32, 64)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.empty(1, 32760, heads, dim, dtype=dtype, device="meta")
            for format, kind, per_scale in (("bf16", "k", 1), *PACKED):
                launch_quantize_kv(x, background, format, kind, per_scale)
                if dtype == torch.bfloat16:
                    launch_quantize_kv(x, None, format, kind, per_scale)
