"""Attention behind the prologue: nothing is masked or blended in its loop.

    out = softmax(scale Q K^T) V        q [B, Sq, H, D]; k, v [B, S, H, D]; any Sq, any S >= 1, D <= 128

fp32 accumulation and softmax, P rounded to V's dtype for the second product. The loop is pipelined by hand: a block's
P V is issued together with the next block's Q K^T, and the next softmax runs beside it. With few queries the keys are
split over programs too, and a second kernel merges the parts by their log-sum-exp. From sm_90 on, tiles come by tensor
descriptors (TMA) where the strides are multiples of 16 bytes. Floating-point operations: 4 B H Sq S D.
Source: FlashAttention-2 (arXiv 2307.08691), the overlap of FlashAttention-3 (arXiv 2407.08608), Flash-Decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.kernels import attention_libraries
from kvlock_fast.kernels.language import TensorDescriptor, require_package_name, tl, triton
from kvlock_fast.kernels.launch import architecture, launch, processors, runs_triton
from kvlock_fast.kernels.tiles import dot, narrow

require_package_name(__name__)

LOG2_E = 1.4426950408889634
MOST_CHANNELS = 128
LEAST_BLOCKS_A_SPLIT, MOST_SPLITS = 4, 32


@dataclass(frozen=True)
class Tiles:
    """The tile sizes and launch options of one program."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int

    @property
    def meta(self) -> dict[str, int]:
        """Arguments and options of a kernel's launch."""
        return dict(BLOCK_M=self.queries, BLOCK_N=self.keys, num_warps=self.num_warps, num_stages=self.num_stages)


# By architecture and padded head dim, for 16-bit tensors. Chosen by the compiler's report: no spill, the matrix
# instructions of the architecture, and on sm_90 exponentials between the second product's HGMMA. Not swept on a GPU.
TILES = {
    80: {32: Tiles(128, 64, 4, 3), 64: Tiles(128, 64, 8, 3), 128: Tiles(128, 32, 8, 3)},
    89: {32: Tiles(128, 64, 4, 2), 64: Tiles(128, 64, 8, 2), 128: Tiles(128, 32, 8, 2)},
    90: {32: Tiles(128, 64, 8, 3), 64: Tiles(128, 64, 8, 3), 128: Tiles(128, 128, 8, 2)},
    100: {32: Tiles(128, 128, 8, 2), 64: Tiles(128, 128, 8, 2), 128: Tiles(128, 128, 8, 2)},
    120: {32: Tiles(128, 64, 4, 2), 64: Tiles(128, 32, 8, 2), 128: Tiles(128, 32, 8, 2)},
}
PADDED_TILES = Tiles(64, 32, 8, 2)  # before sm_90, masks along the channels cost registers
# fp32 operands: no matrix unit multiplies them exactly, and a thread holds whole rows of them.
IEEE_TILES = {32: Tiles(32, 32, 8, 1), 64: Tiles(32, 16, 8, 1), 128: Tiles(16, 16, 8, 1)}
INTERPRETER_TILES = Tiles(64, 64, 4, 1)
TMA_FROM = 90


def tiles_for(q: Tensor) -> Tiles:
    """The tiles for q [B, Sq, H, D] on its architecture."""
    arch = architecture(q)
    if arch == 0:
        return INTERPRETER_TILES
    if q.dtype == torch.float32:
        return IEEE_TILES[padded(q.shape[3], 32)]
    if arch < TMA_FROM and q.shape[3] not in TILES[80]:
        return PADDED_TILES
    nearest = max((a for a in TILES if a <= arch), default=min(TILES))
    return TILES[nearest][padded(q.shape[3], 32)]


def padded(dim: int, least: int = 16) -> int:
    """A head dim as a tile takes it."""
    return max(least, triton.next_power_of_2(dim))


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale Q K^T) V of q [B, Sq, H, D], k, v [B, S, H, D]; fp32 (fp64 stays fp64)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


@triton.jit
def load_rows(x, i_b, i_h, n, N, D, x_b, x_n, x_h, BLOCK: tl.constexpr, D_PAD: tl.constexpr, TMA: tl.constexpr):
    """Rows n .. n + BLOCK of x[i_b, :, i_h], [BLOCK, D_PAD]; 0 past the ends. x: a tensor descriptor under TMA."""
    if TMA:
        b_x = x.load([i_b, n, i_h, 0]).reshape([BLOCK, D_PAD])
    else:
        o_n, o_d = n + tl.arange(0, BLOCK), tl.arange(0, D_PAD)
        p_x = x + i_b.to(tl.int64) * x_b + i_h.to(tl.int64) * x_h + o_n.to(tl.int64)[:, None] * x_n + o_d[None, :]
        b_x = tl.load(p_x, mask=(o_n[:, None] < N) & (o_d[None, :] < D), other=0.0)
    return b_x


@triton.jit
def _hold(x):
    """The bits of a tile that a loop carries to a dot.

    A float that comes straight from the loop's arguments counts as loaded, and would be sent through shared memory.
    """
    return x.to(tl.int16 if x.dtype.primitive_bitwidth == 16 else tl.int32, bitcast=True)


@triton.jit
def _softmax_step(b_s, b_acc, b_sum, b_max, scale, dtype: tl.constexpr):
    """Take an online-softmax step over scores b_s [M, N]: the probabilities' bits as `dtype`, the rescaled state."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    b_p = tl.exp2(b_s * scale - b_new[:, None])
    b_shrink = tl.exp2(b_max - b_new)
    return _hold(narrow(b_p, dtype)), b_acc * b_shrink[:, None], b_sum * b_shrink + tl.sum(b_p, 1), b_new


@triton.jit
def store_attended(
    b_acc, b_sum, b_max, o_m, out, partial, lse,
    Sq, H, D, o_b, o_n, o_h,
    SPLIT: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """The end of a program of grid (., B * H, splits): its queries' result, or its share with its log-sum-exp."""
    i_bh, i_split = tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_d = tl.arange(0, D_PAD)
    mask = (o_m[:, None] < Sq) & (o_d[None, :] < D)
    b_acc = b_acc / b_sum[:, None]
    if not SPLIT:
        p_out = out + i_b * o_b + i_h * o_h + o_m.to(tl.int64)[:, None] * o_n + o_d[None, :]
        tl.store(p_out, narrow(b_acc, out.dtype.element_ty), mask=mask)
    else:
        row = (i_split.to(tl.int64) * tl.num_programs(1) + i_bh) * Sq + o_m
        tl.store(partial + row[:, None] * D + o_d[None, :], b_acc, mask=mask)
        tl.store(lse + row, b_max + tl.log2(b_sum), mask=o_m < Sq)


@triton.jit
def _attention_kernel(
    q, k, v, out, partial, lse,
    Sq, S, H, D: tl.constexpr, scale, share,             # scale: with log2(e); share: keys a split, whole blocks
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h,
    SPLIT: tl.constexpr, D_PAD: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(Sq / BLOCK_M), B * H, splits): a block of queries of one head against its share of the keys."""
    i_bh, i_split = tl.program_id(1), tl.program_id(2)
    i_b, i_h = i_bh // H, i_bh % H
    i_m = tl.program_id(0) * BLOCK_M
    b_q = load_rows(q, i_b, i_h, i_m, Sq, D, q_b, q_n, q_h, BLOCK_M, D_PAD, TMA)

    first = i_split * share
    last = tl.minimum(first + share, tl.cdiv(S, BLOCK_N) * BLOCK_N) - BLOCK_N
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    # From the last block, the only one that can be short, down to the first: the loop then needs no mask.
    b_k = load_rows(k, i_b, i_h, last, S, D, k_b, k_n, k_h, BLOCK_N, D_PAD, TMA)
    b_s = tl.where(last + tl.arange(0, BLOCK_N)[None, :] < S, dot(b_q, tl.trans(b_k), zeros), float("-inf"))
    b_p, b_acc, b_sum, b_max = _softmax_step(b_s, b_acc, b_sum, b_max, scale, b_q.dtype)
    for i_n in range(last, first, -BLOCK_N):
        # Both products are issued before the next softmax, which waits for the first and runs beside the second.
        b_k = load_rows(k, i_b, i_h, i_n - BLOCK_N, S, D, k_b, k_n, k_h, BLOCK_N, D_PAD, TMA)
        b_s = dot(b_q, tl.trans(b_k), zeros)
        b_v = load_rows(v, i_b, i_h, i_n, S, D, v_b, v_n, v_h, BLOCK_N, D_PAD, TMA)
        b_acc = dot(b_p.to(b_v.dtype, bitcast=True), b_v, b_acc)
        b_p, b_acc, b_sum, b_max = _softmax_step(b_s, b_acc, b_sum, b_max, scale, b_q.dtype)
    b_v = load_rows(v, i_b, i_h, first, S, D, v_b, v_n, v_h, BLOCK_N, D_PAD, TMA)
    b_acc = dot(b_p.to(b_v.dtype, bitcast=True), b_v, b_acc)

    o_m = i_m + tl.arange(0, BLOCK_M)
    store_attended(b_acc, b_sum, b_max, o_m, out, partial, lse, Sq, H, D, o_b, o_n, o_h, SPLIT, D_PAD)


@triton.jit
def _merge_kernel(
    partial, lse, out,
    Sq, H, D: tl.constexpr, splits,
    o_b, o_n, o_h,
    D_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(Sq / BLOCK_M), B * H): the splits' outputs, weighted by 2^lse."""
    i_bh = tl.program_id(1)
    o_m, o_d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D_PAD)
    m_m = o_m < Sq
    mask = m_m[:, None] & (o_d[None, :] < D)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for i in range(splits):
        row = (i * tl.num_programs(1) + i_bh).to(tl.int64) * Sq + o_m
        b_lse = tl.load(lse + row, mask=m_m, other=0.0)
        b_new = tl.maximum(b_max, b_lse)
        b_shrink, b_weight = tl.exp2(b_max - b_new), tl.exp2(b_lse - b_new)
        b_part = tl.load(partial + row[:, None] * D + o_d[None, :], mask=mask, other=0.0)
        b_acc = b_acc * b_shrink[:, None] + b_part * b_weight[:, None]
        b_sum, b_max = b_sum * b_shrink + b_weight, b_new
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_out = out + i_b * o_b + i_h * o_h + o_m.to(tl.int64)[:, None] * o_n + o_d[None, :]
    tl.store(p_out, narrow(b_acc / b_sum[:, None], out.dtype.element_ty), mask=mask)


def plan_splits(q: Tensor, queries: int, keys: int, tokens: int, wanted: int | None) -> tuple[int, int]:
    """(splits, keys a split): enough to give every multiprocessor a program, each with some blocks to work on."""
    blocks = triton.cdiv(tokens, keys)
    programs = max(1, triton.cdiv(q.shape[1], queries) * q.shape[0] * q.shape[2])
    if wanted is None:
        wanted = min(processors(q) // programs, blocks // LEAST_BLOCKS_A_SPLIT, MOST_SPLITS)
    share = triton.cdiv(blocks, max(1, min(wanted, blocks)))
    return triton.cdiv(blocks, share), share * keys


def descriptor(x: Tensor, block: list[int]) -> Any:
    """A tensor descriptor of x [., ., ., channels] for tiles of `block`."""
    # The stride of a dimension of one entry means nothing, and may be one that descriptors refuse.
    strides = [x.stride(i) if x.shape[i] > 1 else 16 for i in range(3)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block)


def fits_tma(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can be made: channels contiguous, all else in (true) steps of 16 bytes."""
    return all(
        x.stride(3) == 1
        and x.data_ptr() % 16 == 0
        and all(x.shape[i] <= 1 or (x.stride(i) > 0 and x.stride(i) * x.element_size() % 16 == 0) for i in range(3))
        for x in tensors
    )


def launch_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, splits: int | None = None, tma: bool | None = None
) -> Tensor:
    """softmax(scale Q K^T) V in q's dtype, [B, Sq, H, D] contiguous. Channels of q, k, v must be contiguous.

    splits: over how many programs the keys are split (None: by the grid's size); tma: None where the GPU has it.
    """
    _, queries, heads, dim = q.shape
    tokens, tiles, dim_pad = k.shape[1], tiles_for(q), padded(dim)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if tma is None:
        tma = architecture(q) >= TMA_FROM and q.dtype != torch.float32 and fits_tma(q, k, v)
    rows = ((q, tiles.queries), (k, tiles.keys), (v, tiles.keys))
    operands = [descriptor(x, [1, n, 1, dim_pad]) if tma else x for x, n in rows]
    strides = [n for x in (q, k, v, out) for n in x.stride()[:3]]
    sizes = (queries, tokens, heads, dim, scale * LOG2_E)
    launch_splits(_attention_kernel, tiles, tokens, splits, operands, out, sizes, strides, D_PAD=dim_pad, TMA=tma)
    return out


def launch_splits(
    kernel: Any, tiles: Tiles, tokens: int, splits: int | None, operands: Sequence[Any], out: Tensor,
    sizes: Sequence[float], strides: Sequence[int], **meta: Any,
) -> None:  # fmt: skip
    """Launch an attention's kernel over `splits` of its tokens' keys, and merge what they give into out [B, Sq, H, D].

    The kernel takes operands, out, the splits' outputs and lse, sizes, keys a split, strides, meta.
    """
    batch, queries, heads, dim = out.shape
    splits, share = plan_splits(out, tiles.queries, tiles.keys, tokens, splits)
    partial = lse = None
    if splits > 1:
        partial = torch.empty(splits, batch * heads, queries, dim, dtype=torch.float32, device=out.device)
        lse = torch.empty(splits, batch * heads, queries, dtype=torch.float32, device=out.device)
    launch(
        kernel, (triton.cdiv(queries, tiles.queries), batch * heads, splits),
        *operands, out, partial, lse, *sizes, share, *strides, SPLIT=splits > 1, **meta, **tiles.meta,
    )  # fmt: skip
    if partial is not None and lse is not None:
        launch_merge(partial, lse, out)


def launch_merge(partial: Tensor, lse: Tensor, out: Tensor) -> None:
    """Merge partial outputs [splits, B*H, Sq, D] with lse [splits, B*H, Sq] (base 2) into out [B, Sq, H, D]."""
    batch, queries, heads, dim = out.shape
    rows = 16
    launch(
        _merge_kernel, (triton.cdiv(queries, rows), batch * heads),
        partial, lse, out, queries, heads, dim, partial.shape[0], *out.stride()[:3],
        D_PAD=padded(dim), BLOCK_M=rows, num_warps=4,
    )  # fmt: skip


def choose_attention(q: Tensor, only_ours: bool) -> str:
    """Choose the attention for q [B, Sq, H, D]: "triton", "cudnn" or "sdpa"; `only_ours`: Triton's or none.

    On sm_90 cuDNN, whose speed there is published (620 TFLOP/s at D = 128 on an H200), until ours is measured beside
    it. Raises ValueError where only ours may serve and cannot.
    """
    if q.shape[3] > MOST_CHANNELS:
        if only_ours:
            raise ValueError(f"backend='triton' takes head dims up to {MOST_CHANNELS}, got {q.shape[3]}")
        return "sdpa"
    if not only_ours and architecture(q) // 10 == 9 and attention_libraries.available("cudnn", q) is None:
        return "cudnn"
    return "triton"


def run_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, route: str) -> Tensor:
    """Attention by "triton" or one of attention_libraries.BACKENDS, [B, Sq, H, D] contiguous in q's dtype.

    Tensors with strided channels are copied for ours.
    """
    if route != "triton":
        return attention_libraries.BACKENDS[route](q, k, v, scale).contiguous()
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    return launch_attention(q, k, v, scale)


@torch.library.custom_op("kvlock_fast::attention", mutates_args=())
def _attention_op(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, route: str) -> Tensor:
    if not runs_triton(backend, q, k, v):
        return attention_reference(q, k, v, scale).to(q.dtype).contiguous()
    if route in ("auto", "library"):
        chosen = choose_attention(q, only_ours=backend == "triton")
        route = "sdpa" if route == "library" and chosen == "triton" else chosen
    return run_attention(q, k, v, scale, route)


_attention_op.register_fake(lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format))


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q [B, Sq, H, D], k, v [B, S, H, D] fit, S >= 1."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q and k must be [B, S, H, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    batch, tokens, heads, dim = k.shape
    if (q.shape[0], q.shape[2], q.shape[3]) != (batch, heads, dim):
        raise ValueError(f"q must be [{batch}, Sq, {heads}, {dim}] to fit k {tuple(k.shape)}, got {tuple(q.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if tokens == 0:
        raise ValueError(f"k holds no tokens: {tuple(k.shape)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


def check_route(route: str, routes: tuple[str, ...], backend: str, q: Tensor) -> None:
    """Raise ValueError unless `route` is one of `routes` and can serve q."""
    if route not in routes:
        raise ValueError(f"unknown attention {route!r}: one of {', '.join(routes)}")
    if route in ("fused", "triton") and q.shape[3] > MOST_CHANNELS:
        raise ValueError(f"attention={route!r} takes head dims up to {MOST_CHANNELS}, got {q.shape[3]}")
    if route in attention_libraries.BACKENDS and backend != "reference":
        reason = attention_libraries.available(route, q)
        if reason is not None:
            raise ValueError(f"attention={route!r} cannot be used: {reason}")


ROUTES = ("auto", "library", "triton", *attention_libraries.BACKENDS)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, backend: str = "auto", attention: str = "auto"
) -> Tensor:
    """Attend: softmax(scale Q K^T) V.

    Args:
        q: queries [B, Sq, H, D].
        k, v: keys and values [B, S, H, D], of q's dtype.
        scale: factor on the scores; None: D ** -0.5.
        backend: "auto", "reference" or "triton".
        attention: "triton" (ours), "cudnn", "flash", "sdpa" (as torch chooses), "auto", or "library": what "auto"
            takes, but "sdpa" in place of ours.

    Returns: [B, Sq, H, D] in q's dtype.
    Raises ValueError on shapes, dtypes or names that do not fit.
    """
    check_qkv(q, k, v)
    check_route(attention, ROUTES, backend, q)
    return _attention_op(q, k, v, q.shape[3] ** -0.5 if scale is None else float(scale), backend, attention)


def launch_shipped(architecture: int) -> None:
    """A launch of every configuration that ships, for the compiler's report."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim in (32, 64, 128):
            q = torch.empty(2, 32760, 12, dim, dtype=dtype, device="meta")
            few = q[:, :985]
            launch_attention(q, q, q, dim**-0.5)
            launch_attention(few, q, q, dim**-0.5, splits=4)
            if architecture >= TMA_FROM and dtype != torch.float32:
                launch_attention(q, q, q, dim**-0.5, tma=False)
    odd = torch.empty(2, 17776, 24, 72, dtype=torch.bfloat16, device="meta")
    launch_attention(odd, odd, odd, 72**-0.5)
