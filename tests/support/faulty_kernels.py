"""Kernels that may not ship, one fault each, for the tests of the check. They are compiled offline only."""

import torch

from kvlock_fast.kernels.language import tl, triton
from kvlock_fast.kernels.launch import launch


@triton.jit
def _spilling_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_x = tl.load(x + at)
    tl.store(out + at, b_x / tl.sum(b_x))  # one warp holds it all across the reduction


@triton.jit
def _product_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_x = tl.load(x + at)
    tl.store(out + at, tl.dot(b_x, b_x).to(tl.float16))


@triton.jit
def _greedy_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_sum = tl.zeros([N, N], tl.float32)
    for i in range(64):
        b_sum = tl.dot(tl.load(x + i * N * N + at), tl.load(out + i * N * N + at), b_sum)
    tl.store(out + at, b_sum.to(tl.float16))


@triton.jit
def _halved(x):
    return x.no_such_method()


@triton.jit
def _broken_kernel(x, out, N: tl.constexpr):
    tl.store(out, _halved(tl.load(x)))


@triton.jit
def _sound_kernel(x, out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.load(x + tl.arange(0, N)))


def launch_shipped(architecture: int) -> None:
    """A launch of each; for sm_80 the launcher itself fails."""
    if architecture == 80:
        raise ValueError("no tiles for sm_80")
    half = torch.empty(256, 256, dtype=torch.float16, device="meta")
    launch(_spilling_kernel, (1,), half.float(), half.float(), N=128, num_warps=1)
    launch(_product_kernel, (1,), half, half, N=64, num_warps=2)  # no warp group, so no HGMMA
    launch(_greedy_kernel, (1,), half, half, N=128, num_warps=8, num_stages=9)  # 8 times two operands of 32 KiB
    launch(_broken_kernel, (1,), half, half, N=16)
    for _ in range(2):
        launch(_sound_kernel, (1,), half, half, N=128)
    launch(_sound_kernel, (1,), half.flatten()[1:], half, N=128)  # the same but for its alignment
