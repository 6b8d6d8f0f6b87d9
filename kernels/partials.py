"""Sums in a fixed order: programs write their share as partial sums, the next launch adds these up.

No atomics: the same bits every run. The helpers here say how tensors are seen by such kernels: [B, C, V], the volume V
contiguous.
"""

import math

from torch import Tensor

from kvlock_fast.kernels.guard import require_package_name
from kvlock_fast.kernels.language import tl, triton

require_package_name(__name__)

# Most elements a load of 16 bytes can have to be aligned to.
ALIGNMENT = 16
# Not swept yet: the partial sums of one sample, 4 a thread and turn.
SUM_BLOCK = 512


@triton.jit
def sum_partials(partials, count, BLOCK: tl.constexpr):
    """The sum of `count` contiguous fp32 numbers."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        o = first + tl.arange(0, BLOCK)
        total += tl.load(partials + o, mask=o < count, other=0.0)
    return tl.sum(total)


def volumes(x: Tensor) -> Tensor:
    """A view [B, C, V] of x [B, C, ...] whose trailing dimensions are contiguous."""
    return x.view(*x.shape[:2], -1) if x.numel() else x.new_empty((*x.shape[:2], 0))


def samples(x: Tensor) -> Tensor:
    """A view [B, 1, V] of x [B, ...] whose samples are contiguous."""
    return volumes(x.unsqueeze(1))


def dense(x: Tensor, leading: int) -> Tensor:
    """x itself where everything behind its `leading` dimensions is contiguous, else a contiguous copy."""
    rest = x[(slice(0, 1),) * leading]
    return x if rest.is_contiguous() else x.contiguous()


def alignment(*sizes: int) -> int:
    """What all of these offsets in elements are multiples of: 1, 2, 4, 8 or 16."""
    return math.gcd(ALIGNMENT, *sizes)
