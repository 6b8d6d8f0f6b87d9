"""Packed keys and values: fewer bytes for the cache of the source's background tokens.

| format   | codes                           | scales                                                        |
| native   | x as it is                      | none                                                          |
| bf16     | bfloat16                        | none                                                          |
| fp8_e4m3 | float8_e4m3fn                   | amax / 448, fp32, per token and head                          |
| int8     | int8, symmetric, +-127          | amax / 127, fp32, per token and head                          |
| int4     | two 4-bit codes a byte, along D | step and minimum, bf16; k: per channel and 64 tokens,         |
|          |                                 | v: per token and 64 channels                                  |

Keys have a few channels of constantly large size, so int4 groups keys along the tokens and values along the channels
(KIVI, arXiv 2402.02750). Its minimum is rounded down and its step up, so that the rounding of the two to bf16 can
never push a value out of the codes' range. Layout [B, S, H, D]; arithmetic in fp32.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlock_fast.kernels.guard import require_package_name

require_package_name(__name__)

FORMATS = ("native", "bf16", "fp8_e4m3", "int8", "int4")
KINDS = ("k", "v")
INT4_GROUP = 64


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

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[B, S, H, D] in `dtype` (default: the dtype it was made of)."""
        values = _dequantize_op(self.codes, self.scales, self.format, self.kind, self.shape[3])
        return values.to(dtype or self.dtype)


def _scale_per_token(x: Tensor, largest_code: float) -> Tensor:
    amax = x.abs().amax(dim=-1, keepdim=True) if x.numel() else x.new_empty((*x.shape[:-1], 1))
    # The smallest normal keeps the division finite for denormal rows; a row of zeros needs no scale; NaN stays NaN.
    return torch.where(amax == 0, 1.0, (amax / largest_code).clamp_min(torch.finfo(x.dtype).tiny))


def _grouped(x: Tensor, kind: str) -> Tensor:
    """x [B, S, H, D] with its groups as dimension 2 (k: tokens) or 4 (v: channels), the last one filled up."""
    dim = 1 if kind == "k" else 3
    size = min(INT4_GROUP, x.shape[dim])
    short = -x.shape[dim] % size
    if short:  # repeats of the last entry change no group's range
        last = x.narrow(dim, x.shape[dim] - 1, 1)
        x = torch.cat([x, last.repeat_interleave(short, dim)], dim)
    return x.unflatten(dim, (-1, size))


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
    step = _round_to_bf16((high - minimum.float()) / 15, up=True)
    safe = torch.where(step > 0, step.float(), 1.0)
    codes = ((groups - minimum.float()) / safe).round().clamp(0, 15).nan_to_num(0).to(torch.uint8)
    codes = codes.flatten(dim - 1, dim)[: x.shape[0], : x.shape[1], :, : x.shape[3]]
    codes = F.pad(codes, (0, x.shape[3] % 2))
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.contiguous(), step.squeeze(dim), minimum.squeeze(dim)


def _dequantize_int4(codes: Tensor, step: Tensor, minimum: Tensor, kind: str, channels: int) -> Tensor:
    values = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[..., :channels].float()
    dim = 1 if kind == "k" else 3
    length = values.shape[dim]
    size = min(INT4_GROUP, length)
    step, minimum = (t.float().repeat_interleave(size, dim).narrow(dim, 0, length) for t in (step, minimum))
    return values * step + minimum


@torch.library.custom_op("kvlock_fast::quantize_kv", mutates_args=())
def _quantize_op(x: Tensor, format: str, kind: str) -> list[Tensor]:
    return [t.contiguous() for t in quantize_kv_reference(x, format, kind)]


@_quantize_op.register_fake
def _(x, format, kind):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in quantize_kv_reference(x, format, kind)]


@torch.library.custom_op("kvlock_fast::dequantize_kv", mutates_args=())
def _dequantize_op(codes: Tensor, scales: list[Tensor], format: str, kind: str, channels: int) -> Tensor:
    return dequantize_kv_reference(codes, scales, format, kind, channels).contiguous()


@_dequantize_op.register_fake
def _(codes, scales, format, kind, channels):
    dtype = codes.dtype if format == "native" else torch.float32
    return codes.new_empty((*codes.shape[:3], channels), dtype=dtype)


def quantize_kv_reference(x: Tensor, format: str, kind: str) -> tuple[Tensor, ...]:
    """Codes of x [B, S, H, D] and, where the format has them, scales: scale, or step and minimum."""
    if format == "native":
        return (x.clone(),)
    if x.numel() == 0:
        return (_empty_codes(x, format),)
    if format == "bf16":
        return (x.to(torch.bfloat16, copy=True),)
    x = x.float()
    if format == "fp8_e4m3":
        scale = _scale_per_token(x, 448.0)
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale
    if format == "int8":
        scale = _scale_per_token(x, 127.0)
        # A cast of NaN to an integer is undefined; the scale carries it.
        return (x / scale).round().clamp(-127, 127).nan_to_num(0).to(torch.int8), scale
    return _quantize_int4(x, kind)


def _empty_codes(x: Tensor, format: str) -> Tensor:
    dtypes = {"bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
    last = -(-x.shape[3] // 2) if format == "int4" else x.shape[3]
    return x.new_empty((*x.shape[:3], last), dtype=dtypes[format])


def dequantize_kv_reference(codes: Tensor, scales: list[Tensor], format: str, kind: str, channels: int) -> Tensor:
    """The values of codes and scales as `QuantizedKV` holds them: [B, S, H, channels], fp32 (native: as stored)."""
    if format == "native":
        return codes.clone()
    if codes.numel() == 0:
        return codes.new_empty((*codes.shape[:3], channels), dtype=torch.float32)
    if format == "int4":
        return _dequantize_int4(codes, *scales, kind, channels)
    values = codes.float()
    return values * scales[0] if scales else values


def launch_quantize_kv(x: Tensor, format: str = "fp8_e4m3", kind: str = "k") -> QuantizedKV:
    """Check the arguments, then quantise. Raises ValueError naming what was given."""
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: one of {', '.join(FORMATS)}")
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: 'k' or 'v'")
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor [B, S, H, D], got {x.dtype} {tuple(x.shape)}")
    return QuantizedKV(format, kind, x.shape, x.dtype, *_quantize_op(x, format, kind))
