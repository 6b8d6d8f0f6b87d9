"""Packed keys and values back to numbers.

    bf16 code      fp8, int8 code * scale      int4 code * step + minimum

Codes and scales as quantize.py describes them, values [B, N, H, D] contiguous. fp32 inside, one rounding to the dtype
of the result. Bytes moved: the codes and scales once, the values once. (The hot path never calls this: blend and
prologue read the codes themselves, by the same `load_packed`.)
"""

import torch
from torch import Tensor

from kvlock_fast.kernels.language import require_package_name, tl, triton
from kvlock_fast.kernels.launch import architecture, launch, runs_triton
from kvlock_fast.kernels.packed import INT4_GROUP, PACKED, load_packed, meta_codes, packed_arguments
from kvlock_fast.kernels.tiles import narrow, shifted

require_package_name(__name__)

# Not swept yet: 64 bytes of values a thread, which in 16-bit formats are 16 bytes of fp8 or int8 in each of two loads.
BYTES_PER_PROGRAM, NUM_WARPS = 8192, 4


def dequantize_kv_reference(
    codes: Tensor, scales: list[Tensor], format: str, kind: str, channels: int, tokens_per_scale: int = 1
) -> Tensor:
    """The values of codes and scales as `QuantizedKV` holds them: [B, S, H, channels], fp32 (native: as stored)."""
    if format == "native":
        return codes.clone()
    if codes.numel() == 0:
        return codes.new_empty((*codes.shape[:3], channels), dtype=torch.float32)
    if format == "int4":
        step, minimum = scales
        return _dequantize_int4(codes, step, minimum, kind, channels)
    values = codes.float()
    if not scales:
        return values
    return values * scales[0].repeat_interleave(tokens_per_scale, 1)[:, : codes.shape[1]]


def _dequantize_int4(codes: Tensor, step: Tensor, minimum: Tensor, kind: str, channels: int) -> Tensor:
    values = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[..., :channels].float()
    dim = 1 if kind == "k" else 3
    length = values.shape[dim]
    step, minimum = (t.float().repeat_interleave(INT4_GROUP, dim).narrow(dim, 0, length) for t in (step, minimum))
    return values * step + minimum


@triton.jit
def _dequantize_kernel(
    codes, scale, minimum, values,
    N, H, D: tl.constexpr,                                               # tokens, heads, channels
    c_b, c_n, c_h, c_d, s_b,                                             # strides of codes; of scales along the batch
    FORMAT: tl.constexpr, KIND: tl.constexpr, PER_SCALE: tl.constexpr, FP8: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (H, ceil(N / BLOCK_N), B): BLOCK_N tokens of one head."""
    i_h, i_b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_n = o_n < N
    b_x = load_packed(
        codes + i_b * c_b + i_h * c_h,
        shifted(scale, i_b * s_b), shifted(minimum, i_b * s_b),
        i_h, o_n, o_d, m_n, H, D, c_n, c_d, FORMAT, KIND, PER_SCALE, FP8,
    )  # fmt: skip
    at = ((i_b * N + o_n) * H + i_h) * D + o_d
    tl.store(values + at, narrow(b_x, values.dtype.element_ty), mask=m_n & (o_d < D))


def launch_dequantize_kv(
    codes: Tensor,
    scales: list[Tensor],
    format: str,
    kind: str,
    channels: int,
    tokens_per_scale: int,
    dtype: torch.dtype,
) -> Tensor:
    """[B, N, H, channels] in dtype of codes [B, N, H, D or D/2] of any strides and their contiguous scales."""
    batch, tokens, heads, _ = codes.shape
    values = torch.empty(batch, tokens, heads, channels, dtype=dtype, device=codes.device)
    packed = packed_arguments(codes, scales, format, kind, tokens_per_scale, architecture(codes))
    block_d = triton.next_power_of_2(max(channels, 2))
    block_n = max(1, BYTES_PER_PROGRAM // (block_d * dtype.itemsize))
    launch(
        _dequantize_kernel, (heads, triton.cdiv(tokens, block_n), batch),
        packed.codes, packed.scale, packed.minimum, values,
        tokens, heads, channels,
        *packed.strides, packed.scale_stride,
        **packed.meta, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=NUM_WARPS,
    )  # fmt: skip
    return values


@torch.library.custom_op("kvlock_fast::dequantize_kv", mutates_args=())
def dequantize_kv_op(
    codes: Tensor,
    scales: list[Tensor],
    format: str,
    kind: str,
    channels: int,
    tokens_per_scale: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    # The dtype counts as well: Triton writes it.
    skip = format == "native" or (backend == "auto" and codes.is_cpu)
    if not skip and runs_triton(backend, codes, codes.new_empty(0, dtype=dtype)):
        return launch_dequantize_kv(codes, scales, format, kind, channels, tokens_per_scale, dtype)
    values = dequantize_kv_reference(codes, scales, format, kind, channels, tokens_per_scale)
    return values.to(dtype).contiguous()


@dequantize_kv_op.register_fake
def _(codes, scales, format, kind, channels, tokens_per_scale, dtype, backend):
    return codes.new_empty((*codes.shape[:3], channels), dtype=dtype)


def launch_shipped(architecture: int) -> None:
    """A launch of every configuration that ships, for the compiler's report: Wan-1.3B, CogVideoX-2B and LTX."""
    for heads, dim in ((12, 128), (30, 64), (32, 64)):
        for format, kind, per_scale in (("bf16", "k", 1), *PACKED):
            codes, *scales = meta_codes((1, 26208, heads, dim), format, kind, per_scale)
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                launch_dequantize_kv(codes, scales, format, kind, dim, per_scale, dtype)
