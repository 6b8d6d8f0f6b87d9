"""The hallucination signal: how much the predicted clean latent moves over the last steps.

    var = mean over the foreground elements of the unbiased variance over the last n predictions     one scalar a sample

fp32 inside. The reference takes two passes (mean, then squared deviations); the kernel takes deviations from one of the
predictions instead, d_j = x_j - x_0 and (sum d^2 - (sum d)^2 / n) / (n - 1), which reads the history once. Either way a
large common offset costs no digits: x_0 is one of the values, so cancellation loses at most a factor n + 1. Elements
outside the foreground never count: NaN there does not come through, and the mean does not depend on the area. Two
launches, partial sums and their sum, in a fixed order. Bytes moved: the history's blocks that hold foreground, once.
`reduction="mean"` is the same of a history that was averaged over the foreground first.
Source: KV-Lock (arXiv 2603.09657), after the trajectory variance of Aithal et al. 2024.
"""

# To the checker `static_range` is no iterable: only the compiler walks it.
# pyright: reportGeneralTypeIssues=false

import math

import torch
from torch import Tensor

from kvlock_fast.kernels.language import require_package_name, tl, triton
from kvlock_fast.kernels.launch import launch, runs_triton
from kvlock_fast.kernels.tiles import SUM_BLOCK, alignment, dense, sum_partials

require_package_name(__name__)

# Not swept yet: 8 elements a thread; 3 predictions under way at once, so W = 10 takes three even turns (5 would spill).
BLOCK, NUM_WARPS, UNROLL = 1024, 4, 3
REDUCTIONS = ("elements", "mean")


def windowed_variance_reference(history: Tensor, foreground: Tensor) -> Tensor:
    """history [n, B, C, T, H, W], foreground [B or 1, T, H, W] bool, never empty; [B] fp32."""
    inside = foreground[:, None].expand(history.shape[1:])
    wide = torch.promote_types(history.dtype, torch.float32)
    masked = torch.where(inside, history.to(wide), 0.0)
    variance = masked.var(dim=0, unbiased=True)
    return (variance.flatten(1).sum(1) / inside.flatten(1).sum(1)).float()


def averaged(history: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce predictions to their mean over the foreground, [n, B, 1, 1, 1, 1], and it to whether there is any.

    history, foreground: as `windowed_variance_reference` takes them.
    """
    inside = foreground[:, None].expand(history.shape[1:])
    wide = torch.promote_types(history.dtype, torch.float32)
    sums = torch.where(inside, history.to(wide), 0.0).flatten(2).sum(2)
    means = sums / inside.flatten(1).sum(1)
    return means[..., None, None, None, None], foreground.flatten(1).any(1)[:, None, None, None]


@triton.jit
def unbiased_variance(pivot, ring, inside, newest, n, R, stride, UNROLL: tl.constexpr):
    """The variance of each element over `pivot` and the n - 1 entries before entry `newest` of a ring of R entries.

    ring: pointers to the elements in entry 0; stride: from entry to entry; n >= 2.
    """
    total, squares = tl.zeros_like(pivot), tl.zeros_like(pivot)
    for first in range(1, n, UNROLL):
        for i in tl.static_range(UNROLL):
            age = first + i
            entry = ((newest - age + R) % R).to(tl.int64)
            x = tl.load(ring + entry * stride, mask=inside & (age < n), other=0.0).to(tl.float32)
            d = tl.where(age < n, x - pivot, 0.0)
            total += d
            squares += d * d
    variance = (squares - total * total / n) / (n - 1)
    # Rounding can leave it just below 0; NaN stays NaN.
    return tl.where(variance < 0, 0.0, variance)


@triton.jit
def _variance_partials_kernel(
    history, foreground, partials,
    n, B, V,                                                    # predictions; samples; elements a channel
    h_n, h_b, h_c, m_b,                                         # strides
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(V / BLOCK), C, B): a block of one channel each. partials [2, B, C * ceil(V / BLOCK)]: sum, count."""
    i_c, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    inside = o < tl.multiple_of(V - first, ALIGN)
    counts = tl.load(foreground + tl.multiple_of(i_b * m_b + first, ALIGN) + o, mask=inside, other=0).to(tl.int1)
    count = tl.sum(counts.to(tl.int32))
    total = 0.0
    if count > 0:
        ring = history + tl.multiple_of(i_b * h_b + i_c * h_c + first, ALIGN) + o
        pivot = tl.load(ring, mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(tl.where(counts, unbiased_variance(pivot, ring, inside, 0, n, n, h_n, UNROLL), 0.0))
    programs = tl.num_programs(0) * tl.num_programs(1)
    at = partials + i_b * programs + i_c * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, total)
    tl.store(at + B * programs, count.to(tl.float32))


@triton.jit
def _variance_kernel(partials, variance, B, count, SUM_BLOCK: tl.constexpr):
    """Grid (B,). partials [2, B, count]: sums, then how many elements they count."""
    i_b = tl.program_id(0).to(tl.int64)
    total = sum_partials(partials + i_b * count, count, SUM_BLOCK)
    tl.store(variance + i_b, total / sum_partials(partials + (B + i_b) * count, count, SUM_BLOCK))


def launch_windowed_variance(history: Tensor, foreground: Tensor) -> Tensor:
    """var [B] fp32; history as the reference's with T, H, W contiguous, n >= 2; foreground contiguous, never empty."""
    n, batch, channels = history.shape[:3]
    strides = (*history.stride()[:3], 0 if foreground.shape[0] == 1 else foreground.stride(0))
    volume = math.prod(history.shape[3:])
    blocks = triton.cdiv(volume, BLOCK)
    partials = torch.empty((2, batch, channels * blocks), device=history.device)
    variance = torch.empty(batch, device=history.device)
    launch(
        _variance_partials_kernel, (blocks, channels, batch),
        history, foreground, partials, n, batch, volume, *strides,
        ALIGN=alignment(volume, *strides), BLOCK=BLOCK, UNROLL=UNROLL, num_warps=NUM_WARPS,
    )  # fmt: skip
    launch(_variance_kernel, (batch,), partials, variance, batch, channels * blocks, SUM_BLOCK=SUM_BLOCK)
    return variance


@torch.library.custom_op("kvlock_fast::windowed_variance", mutates_args=())
def _variance_op(history: Tensor, foreground: Tensor, backend: str) -> Tensor:
    if not foreground.flatten(1).any(dim=1).all():  # the one host read; a loop checks its mask once instead
        raise ValueError(f"foreground is empty for a sample: {tuple(foreground.shape)} holds one without True")
    if runs_triton(backend, history, foreground):
        return launch_windowed_variance(dense(history, 3), foreground.contiguous())
    return windowed_variance_reference(history, foreground)


_variance_op.register_fake(lambda history, *_: history.new_empty(history.shape[1], dtype=torch.float32))


def windowed_variance(
    history: Tensor, foreground: Tensor, *, reduction: str = "elements", backend: str = "auto"
) -> Tensor:
    """Measure the hallucination signal: the variance over the last n predictions on the foreground.

    Triton first copies a history whose T, H, W are not contiguous, and a mask that is not.

    Args:
        history: predicted clean latents [n, B, C, T, H, W], n >= 2.
        foreground: bool [B or 1, T, H, W], some True in each sample.
        reduction: "elements" averages the variances of the foreground's elements; "mean" takes the variance of the n
            means over the foreground.
        backend: "auto", "reference" or "triton".

    Returns the unbiased variance [B] fp32. Raises ValueError on what does not fit.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if history.ndim != 6 or not history.is_floating_point():
        raise ValueError(
            f"history must be floating-point [n, B, C, T, H, W], got {history.dtype} {tuple(history.shape)}"
        )
    if history.shape[0] < 2:
        raise ValueError(f"a variance needs at least 2 predictions, got history {tuple(history.shape)}")
    batch, volume = history.shape[1], tuple(history.shape[3:])
    if foreground.dtype != torch.bool:
        raise ValueError(f"foreground must be bool, got {foreground.dtype}")
    if foreground.ndim != 4 or foreground.shape[0] not in (1, batch) or tuple(foreground.shape[1:]) != volume:
        raise ValueError(f"foreground must be [{batch} or 1, {volume}], got {tuple(foreground.shape)}")
    if reduction == "mean":
        history, foreground = averaged(history, foreground)
    return _variance_op(history, foreground, backend)


def launch_shipped(architecture: int) -> None:
    """A launch of every configuration that ships, for the compiler's report: latents of Wan 480p and CogVideoX."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for volume in ((21, 60, 104), (13, 60, 90)):
            history = torch.empty(10, 2, 16, *volume, dtype=dtype, device="meta")
            launch_windowed_variance(history, torch.empty(1, *volume, dtype=torch.bool, device="meta"))
