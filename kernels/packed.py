"""How a kernel reads cached keys and values: one verb for every format of `QuantizedKV` and for plain tensors.

The scales' layouts are fixed (contiguous, see quantize.py), so a tile needs the codes' strides and the sizes only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlock_fast.kernels.guard import require_package_name
from kvlock_fast.kernels.language import tl, triton
from kvlock_fast.kernels.tiles import from_fp8

require_package_name(__name__)

INT4_GROUP = 64
_GROUP = tl.constexpr(INT4_GROUP)
FP8_FROM = 89  # the compute capability whose instructions convert e4m3


@triton.jit
def load_packed(
    # fmt: off
    codes, scale, minimum,                        # `codes` at its sample and head already; scales at their sample
    i_h, o_n, o_d, mask,                          # head; rows [N, 1] and channels [1, D] of the tile; what to read
    H, D, stride_n, stride_d,                     # sizes; strides of `codes`
    FORMAT: tl.constexpr, KIND: tl.constexpr, PER_SCALE: tl.constexpr, FP8: tl.constexpr,
    # fmt: on
):
    """The tile's values, fp32; 0 where `mask` is False. Codes of fp8 come as uint8."""
    n, d = o_n.to(tl.int64), o_d.to(tl.int64)
    if FORMAT == "int4":
        byte = tl.load(codes + n * stride_n + (d // 2) * stride_d, mask=mask, other=0)
        code = ((byte >> ((o_d % 2) * 4).to(tl.uint8)) & 15).to(tl.float32)
        if KIND == "k":
            at = ((n // _GROUP) * H + i_h) * D + d
        else:
            at = (n * H + i_h) * tl.cdiv(D, _GROUP) + d // _GROUP
        step = tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)
        low = tl.load(minimum + at, mask=mask, other=0.0).to(tl.float32)
        return tl.where(mask, code * step + low, 0.0)
    code = tl.load(codes + n * stride_n + d * stride_d, mask=mask, other=0)
    if FORMAT == "fp8_e4m3" or FORMAT == "int8":
        by = tl.load(scale + (n // PER_SCALE) * H + i_h, mask=mask & (d >= 0), other=0.0)
        value = from_fp8(code, FP8) if FORMAT == "fp8_e4m3" else code.to(tl.float32)
        return tl.where(mask, value * by, 0.0)
    return code.to(tl.float32)


@dataclass(frozen=True)
class PackedArguments:
    """Cached keys or values as `load_packed` takes them."""

    codes: Tensor
    scale: Tensor | None
    minimum: Tensor | None
    strides: tuple[int, int, int, int]  # of codes, along batch (0 if shared), tokens, heads, channels
    scale_stride: int  # of scale and minimum, along the batch (0 if shared)
    meta: dict[str, object]  # FORMAT, KIND, PER_SCALE, FP8


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
    strides = (0 if shared else codes.stride(0), *codes.stride()[1:])
    scale_stride = 0 if shared or scale is None else scale.stride(0)
    meta = dict(FORMAT=format, KIND=kind, PER_SCALE=tokens_per_scale, FP8=architecture >= FP8_FROM)
    return PackedArguments(codes, scale, minimum, strides, scale_stride, meta)
