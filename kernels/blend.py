"""Blend in place: the one operation that locking adds to an attention layer.

    x <- (1 - w) x + w ref        w = alpha (1 - m) per sample and token: 0 on the foreground, alpha on the background

Layout: `x` is any tensor with batch first and the tokens along `token_dim` ([B, S, H*D], [B, S, H, D], [B, H, S, D]).
Computed in fp32, stored in x's dtype. Exact at both ends: w = 0 leaves x as it is, bit for bit and whatever `ref`
holds; w = 1 copies `ref`, bit for bit and whatever x held. Bytes moved: 2 reads and 1 write of the blended tokens of
x (1 read where w = 1), nothing where w = 0. Source: KV-Lock (arXiv 2603.09657), the mix of new and cached keys and
values.
"""

import torch
from torch import Tensor

from kvlock_fast.kernels.dequantize import dequantize_kv_reference
from kvlock_fast.kernels.language import require_package_name, tl, triton
from kvlock_fast.kernels.launch import architecture, launch, runs_triton
from kvlock_fast.kernels.packed import PACKED, load_packed, meta_codes, packed_arguments
from kvlock_fast.kernels.quantize import QuantizedKV, codes_of
from kvlock_fast.kernels.tiles import narrow, shifted

require_package_name(__name__)

# Not swept yet: 32 bytes of x a thread. 64 make ptxas spill where plain 16-bit rows are indexed (sm_80 to sm_90).
BYTES_PER_PROGRAM, NUM_WARPS = 4096, 4
MOST_CHANNELS = 256


def blend_reference(x: Tensor, ref: Tensor, weight: Tensor, token_dim: int = 1) -> Tensor:
    """Blend of `x` and `ref` (broadcast over the batch) by `weight` [B or 1, S] fp32; a new tensor in x's dtype."""
    shape = [1] * x.ndim
    shape[0], shape[token_dim] = weight.shape
    w = weight.reshape(shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    mixed = torch.lerp(x.to(wide), ref.to(wide).expand_as(x), w.to(wide))
    # lerp is exact at its ends for finite numbers only; NaN on the side that does not count must not come through.
    return torch.where(w == 0, x, torch.where(w == 1, ref.to(x.dtype), mixed.to(x.dtype)))


@triton.jit
def _blend_kernel(
    x, codes, scale, minimum, weight, index,
    N, H, D: tl.constexpr,                                        # rows of ref; heads; channels a head
    x_b, x_n, x_h, x_d, r_b, r_n, r_h, r_d, s_b, w_b, w_n, i_n,   # strides
    INDEXED: tl.constexpr, FORMAT: tl.constexpr, KIND: tl.constexpr, PER_SCALE: tl.constexpr, FP8: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (H * ceil(D / BLOCK_D), ceil(N / BLOCK_N), B): a tile [BLOCK_N, BLOCK_D] of one head each."""
    PARTS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i_b, i_h = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64) // PARTS
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = (tl.program_id(0) % PARTS) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    m_n = o_n < N
    token = (tl.load(index + o_n.to(tl.int64) * i_n, mask=m_n, other=0) if INDEXED else o_n).to(tl.int64)
    w = tl.load(weight + i_b * w_b + token * w_n, mask=m_n, other=0.0)[:, None]

    p_x = x + i_b * x_b + token[:, None] * x_n + i_h * x_h + o_d.to(tl.int64) * x_d
    b_x = tl.load(p_x, mask=(w != 0) & (w != 1) & (o_d < D), other=0.0).to(tl.float32)
    b_ref = load_packed(
        codes + i_b * r_b + i_h * r_h,
        shifted(scale, i_b * s_b), shifted(minimum, i_b * s_b),
        i_h, o_n[:, None], o_d, w != 0, H, D, r_n, r_d, FORMAT, KIND, PER_SCALE, FP8,
    )  # fmt: skip
    b_x = tl.where(w == 1, b_ref, b_x + w * (b_ref - b_x))
    tl.store(p_x, narrow(b_x, x.dtype.element_ty), mask=(w != 0) & (o_d < D))


def launch_blend_(
    x: Tensor,
    codes: Tensor,
    scales: list[Tensor],
    weight: Tensor,
    index: Tensor | None,
    format: str = "native",
    kind: str = "k",
    tokens_per_scale: int = 1,
) -> None:
    """x [B, S, H, D] of any strides; codes [B or 1, N, H, D or D/2]; weight [B or 1, S]; index [N] or None."""
    batch, _, heads, dim = x.shape
    rows = codes.shape[1]
    ref = packed_arguments(codes, scales, format, kind, tokens_per_scale, architecture(x))
    block_d = triton.next_power_of_2(max(dim, 2))
    if ref.meta["FORMAT"] == "native":  # the others have scales for a head's whole row
        block_d = min(block_d, MOST_CHANNELS)
    block_n = max(1, BYTES_PER_PROGRAM // (block_d * x.element_size()))
    launch(
        _blend_kernel, (heads * triton.cdiv(dim, block_d), triton.cdiv(rows, block_n), batch),
        x, ref.codes, ref.scale, ref.minimum, weight, index,
        rows, heads, dim,
        *x.stride(), *ref.strides, ref.scale_stride,
        weight.stride(0) if weight.shape[0] > 1 else 0, weight.stride(1), 1 if index is None else index.stride(0),
        INDEXED=index is not None, **ref.meta, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=NUM_WARPS,
    )  # fmt: skip


def as_heads(x: Tensor, token_dim: int, heads: int) -> Tensor:
    """A view [B, S, H, D] of x, whose tokens lie along token_dim; channels without heads are split into `heads`."""
    x = x.movedim(token_dim, 1)
    return x if x.ndim == 4 else x.unflatten(2, (heads, -1))


@torch.library.custom_op("kvlock_fast::blend_", mutates_args=("x",))
def _blend_op(
    x: Tensor,
    codes: Tensor,
    scales: list[Tensor],
    weight: Tensor,
    index: Tensor | None,
    token_dim: int,
    format: str,
    kind: str,
    tokens_per_scale: int,
    backend: str,
) -> None:
    if not (backend == "auto" and x.is_cpu) and runs_triton(backend, x, codes, weight):
        if format == "native":
            codes = as_heads(codes, token_dim, 1)
        rows = as_heads(x, token_dim, codes.shape[2])
        launch_blend_(rows, codes, scales, weight, index, format, kind, tokens_per_scale)
        return
    ref = codes
    if format != "native":
        channels = as_heads(x, token_dim, codes.shape[2]).shape[3]
        ref = dequantize_kv_reference(codes, scales, format, kind, channels, tokens_per_scale)
        ref = (ref.flatten(2) if x.ndim == 3 else ref).movedim(1, token_dim)
    if index is None:
        x.copy_(blend_reference(x, ref, weight, token_dim))
        return
    part = blend_reference(x.index_select(token_dim, index), ref, weight.index_select(1, index), token_dim)
    x.index_copy_(token_dim, index, part)


_blend_op.register_fake(lambda *_: None)


def blend_(
    x: Tensor,
    ref: Tensor | QuantizedKV,
    weight: Tensor,
    token_dim: int = 1,
    index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Blend `ref` into `x` in place and return x.

    x: keys or values [B, S, H*D], [B, S, H, D], [B, H, S, D] (tokens along `token_dim`); weight: [B or 1, S] fp32 in
    [0, 1]. ref: as x or with batch 1, or a QuantizedKV; with `index` (int64 [N], no token twice) it holds these tokens
    only, and others stay as they are. Raises ValueError on shapes that do not fit.
    """
    _check(x, ref, weight, token_dim, index)
    if isinstance(ref, QuantizedKV) and ref.format == "native":
        ref = (ref.codes.flatten(2) if x.ndim == 3 else ref.codes).movedim(1, token_dim)
    codes, scales, *layout = (ref, [], "native", "k", 1) if isinstance(ref, Tensor) else codes_of(ref)
    _blend_op(x, codes, scales, weight, index, token_dim, *layout, backend)
    return x


def _check(x: Tensor, ref: Tensor | QuantizedKV, weight: Tensor, token_dim: int, index: Tensor | None) -> None:
    if x.ndim not in (3, 4) or not 1 <= token_dim < x.ndim - 1:
        raise ValueError(f"x must be [B, S, H*D], [B, S, H, D] or [B, H, S, D], got {tuple(x.shape)}, {token_dim=}")
    if weight.ndim != 2 or weight.shape[0] not in (1, x.shape[0]) or weight.shape[1] != x.shape[token_dim]:
        raise ValueError(f"weight must be [{x.shape[0]} or 1, {x.shape[token_dim]}], got {tuple(weight.shape)}")
    want, got = list(x.shape), list(ref.shape)
    if index is not None:
        if index.ndim != 1 or index.dtype != torch.int64:
            raise ValueError(f"index must be int64 [N], got {index.dtype} {tuple(index.shape)}")
        want[token_dim] = index.shape[0]
    if isinstance(ref, QuantizedKV):  # [B, N, H, D] whatever x is
        want.insert(1, want.pop(token_dim))
        got[x.ndim - 1 :] = [torch.Size(got[x.ndim - 1 :]).numel()]
    if got[1:] != want[1:] or got[0] not in (1, x.shape[0]):
        raise ValueError(f"ref must be {tuple(want)} or have batch 1, got {tuple(ref.shape)}")


def launch_shipped(architecture: int) -> None:
    """A launch of every configuration that ships, for the compiler's report: keys of Wan-1.3B, CogVideoX-2B and LTX."""
    tokens, background = 32760, 26208
    weight = torch.empty(2, tokens, device="meta")
    index = torch.empty(background, dtype=torch.int64, device="meta")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for heads, dim in ((12, 128), (30, 64), (32, 64)):
            x = torch.empty(2, tokens, heads, dim, dtype=dtype, device="meta")
            launch_blend_(x, x[:1], [], weight, None)
            launch_blend_(x, x[:1, :background], [], weight, index)
            flat = x.flatten(2)[:, :, None]
            launch_blend_(flat, flat[:1], [], weight, None)
            for format, kind, per_scale in PACKED:
                codes, *scales = meta_codes((1, background, heads, dim), format, kind, per_scale)
                launch_blend_(x, codes, scales, weight, index, format, kind, per_scale)
