"""Layout of cached keys and values in memory, and one verb to read them, for every format and plain tensors.

The scales' layouts are fixed (contiguous in a sample, see quantize.py): a tile needs the codes' strides and the sizes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.kernels.language import require_package_name, tl, triton
from kvlock_fast.kernels.tiles import from_fp8

require_package_name(__name__)

CODES = {"bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
# What one kernel variant packs or reads: format, kind and tokens a scale (the kind matters to int4 only).
PACKED = (("fp8_e4m3", "k", 1), ("fp8_e4m3", "k", 128), ("int8", "k", 1), ("int4", "k", 1), ("int4", "v", 1))
INT4_GROUP = 64
_GROUP = tl.constexpr(INT4_GROUP)
FP8_FROM = 89  # the compute capability whose instructions convert e4m3


@triton.jit
def load_packed(
    codes, scale, minimum,                        # `codes` at its sample and head already; scales at their sample
    i_h, o_n, o_d, mask,                          # head; rows [N, 1], channels [1, D] of the tile; rows to read [N, 1]
    H, D, stride_n, stride_d,                     # sizes; strides of `codes`
    FORMAT: tl.constexpr, KIND: tl.constexpr, PER_SCALE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """The tile's values, fp32; 0 in rows whose `mask` is False and in channels past D.

    Codes of fp8 come as uint8. int4: `o_d` counts from 0, as one load of a byte brings two channels.
    """
    n, d = o_n.to(tl.int64), o_d.to(tl.int64)
    inside = mask & (o_d < D)
    if FORMAT == "int4":
        return _load_int4(codes, scale, minimum, i_h, n, o_d, mask, H, D, stride_n, stride_d, KIND)
    code = tl.load(codes + n * stride_n + d * stride_d, mask=inside, other=0)
    if FORMAT == "fp8_e4m3" or FORMAT == "int8":
        by = tl.load(scale + (n // PER_SCALE) * H + i_h, mask=mask, other=0.0)  # once a row, not once an element
        value = from_fp8(code, FP8) if FORMAT == "fp8_e4m3" else code.to(tl.float32)
        return tl.where(inside, value * by, 0.0)
    return code.to(tl.float32)


@triton.jit
def _load_int4(codes, scale, minimum, i_h, n, o_d, mask, H, D, stride_n, stride_d, KIND: tl.constexpr):
    WIDTH: tl.constexpr = o_d.shape[1]
    o_byte = tl.arange(0, WIDTH // 2)[None, :]
    # D - D // 2 and not (D + 1) // 2: the compiler then sees how far it is aligned.
    byte = tl.load(codes + n * stride_n + o_byte.to(tl.int64) * stride_d, mask=mask & (o_byte < D - D // 2), other=0)
    code = tl.join(byte & 15, byte >> 4).reshape(byte.shape[0], WIDTH).to(tl.float32)
    if KIND == "k":
        at = ((n // _GROUP) * H + i_h) * D + o_d
        step, low = _load_pair(scale, minimum, at, mask & (o_d < D))
    else:
        GROUPS: tl.constexpr = (WIDTH + _GROUP - 1) // _GROUP
        o_g = tl.arange(0, GROUPS)[None, :]
        groups = tl.cdiv(D, _GROUP)
        step, low = _load_pair(scale, minimum, (n * H + i_h) * groups + o_g, mask & (o_g < groups))
        if GROUPS > 1:
            step, low = _repeated(step, WIDTH), _repeated(low, WIDTH)
    return tl.where(mask & (o_d < D), code * step + low, 0.0)


@triton.jit
def _load_pair(scale, minimum, at, mask):
    step = tl.load(scale + at, mask=mask, other=0.0)
    low = tl.load(minimum + at, mask=mask, other=0.0)
    return step.to(tl.float32), low.to(tl.float32)


@triton.jit
def _repeated(x, WIDTH: tl.constexpr):
    """[N, G] as [N, WIDTH], each column WIDTH / G times."""
    wide = x[:, :, None].broadcast_to(x.shape[0], x.shape[1], WIDTH // x.shape[1])
    return wide.reshape(x.shape[0], WIDTH)


@dataclass(frozen=True)
class PackedArguments:
    """Cached keys or values as `load_packed` takes them."""

    codes: Tensor | None  # None: there is nothing to read
    scale: Tensor | None
    minimum: Tensor | None
    strides: tuple[int, ...]  # of codes, along batch (0 if shared), tokens, heads, channels
    scale_stride: int  # of scale and minimum, along the batch (0 if shared)
    meta: dict[str, Any]  # FORMAT, KIND, PER_SCALE, FP8


def packed_arguments(
    codes: Tensor, scales: list[Tensor], format: str, kind: str, tokens_per_scale: int, architecture: int
) -> PackedArguments:
    """codes [B or 1, N, H, D or D/2], scales as `QuantizedKV` holds them; a plain tensor is format "native"."""
    shared = codes.shape[0] == 1
    scale, minimum = (*scales, None, None)[:2]
    if format == "fp8_e4m3":
        codes = codes.view(torch.uint8)
    if format not in ("fp8_e4m3", "int8", "int4"):
        format = "native"
    _, *inner = codes.stride()
    scale_stride = 0 if shared or scale is None else scale.stride(0)
    meta = dict(FORMAT=format, KIND=kind, PER_SCALE=tokens_per_scale, FP8=architecture >= FP8_FROM)
    return PackedArguments(codes, scale, minimum, (0 if shared else codes.stride(0), *inner), scale_stride, meta)


def packed_layout(
    shape: tuple[int, ...], format: str, kind: str, tokens_per_scale: int = 1
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the codes of [B, N, H, D] and of each scale, for the formats other than native."""
    batch, tokens, heads, dim = shape
    codes = (batch, tokens, heads, -(-dim // 2) if format == "int4" else dim), CODES[format]
    if format == "bf16":
        return [codes]
    if format != "int4":
        return [codes, ((batch, -(-tokens // tokens_per_scale), heads, 1), torch.float32)]
    rows, columns = (-(-tokens // INT4_GROUP), dim) if kind == "k" else (tokens, -(-dim // INT4_GROUP))
    scale = (batch, rows, heads, columns), torch.bfloat16
    return [codes, scale, scale]


def meta_codes(shape: tuple[int, ...], format: str, kind: str, tokens_per_scale: int = 1) -> list[Tensor]:
    """Codes and scales of [B, N, H, D] in a format on the `meta` device, for dry launches."""
    layout = packed_layout(shape, format, kind, tokens_per_scale)
    return [torch.empty(size, dtype=dtype, device="meta") for size, dtype in layout]
