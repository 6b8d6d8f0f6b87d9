"""Verbs on tiles that several kernels share: rounding, maxima that keep NaN, fp8 by bits, dot, sums in a fixed order.

Triton's interpreter gets four things wrong that the GPU gets right: casts from fp32 to bf16 drop the low bits, casts
to fp8 lose the mantissa's carry, fp8's NaN decodes to 480, and dots of bf16 multiply the bit patterns. The verbs here
do the same arithmetic on both.

For a sum, programs write their share as partial sums, and the next launch adds these up (`sum_partials`). No atomics:
the same bits every run. `volumes`, `samples` and `dense` give tensors as such kernels see them: [B, C, V], the volume V
contiguous.
"""

import math

from torch import Tensor

from kvlock_fast.kernels import language
from kvlock_fast.kernels.language import require_package_name, tl, triton

require_package_name(__name__)

INTERPRETED = tl.constexpr(language.INTERPRETED)
# Most elements a load of 16 bytes can have to be aligned to.
ALIGNMENT = 16
# Not swept yet: the partial sums of one sample, 4 a thread and turn.
SUM_BLOCK = 512


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 `x` rounded to nearest even as `dtype` (a 16-bit or 32-bit float)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The carry would run over a NaN's mantissa.
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def bf16_outwards(x, up: tl.constexpr):
    """fp32 `x` as bfloat16, never below x (`up`) or never above it; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    # Cutting bits off rounds towards zero; where that is the wrong way, any bit lost carries into the last one kept.
    negative = bits >> 31
    grows = ~negative if up else negative
    outwards = (bits + (grows & 0xFFFF)) >> 16
    return tl.where(x != x, 0x7FC0, outwards).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def nearest_int(x):
    """fp32 `x`, within +-2^22, rounded to nearest even as int32: the adder rounds it into the mantissa's end."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, axis: tl.constexpr):
    """The maximum of fp32 `x` along `axis`, which stays with length 1; NaN where any is NaN."""
    if INTERPRETED:  # whose reductions by a function of one's own take a Python call an element
        number = tl.max(tl.where(x != x, float("-inf"), x), axis, keep_dims=True)
        return tl.where(tl.max((x != x).to(tl.int32), axis, keep_dims=True) != 0, float("nan"), number)
    return tl.reduce(x, axis, _larger, keep_dims=True)


@triton.jit
def smallest(x, axis: tl.constexpr):
    """The minimum, as `largest`."""
    if INTERPRETED:
        return -largest(-x, axis)
    return tl.reduce(x, axis, _smaller, keep_dims=True)


@triton.jit
def to_fp8(x, native: tl.constexpr):
    """fp32 `x` as the bits (uint8) of float8_e4m3fn, saturating at +-448; NaN stays NaN. `native`: sm_89 and later."""
    if native and not INTERPRETED:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers: keep three mantissa bits, the rest rounds half to even; the exponent's bias goes from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 the step is 2^-9: adding 2^14 leaves exactly these bits at the mantissa's end, rounded by the adder.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, tl.minimum(normal, 0x7E))
    code = tl.where(x != x, 0x7F, code)
    return (sign | code).to(tl.uint8)


@triton.jit
def from_fp8(code, native: tl.constexpr):
    """The fp32 values of float8_e4m3fn's bits (uint8). `native`: sm_89 and later."""
    if native and not INTERPRETED:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    wide = code.to(tl.uint16)
    # In fp16's exponent field the value is 2^8 too small: the biases are 7 and 15. Subnormals come out right too.
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    value = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with fp32 accumulation; fp32 operands multiply in IEEE fp32, not TF32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def mix(x, ref, w):
    """(1 - w) x + w ref, exact at both ends whatever the other side holds: the formula would lose inf and -0.0."""
    mixed = x + w * (ref - x)
    return tl.where(w == 0, x, tl.where(w == 1, ref, mixed))


@triton.jit
def shifted(pointer, by):
    """The pointer moved on; None where there is none."""
    return pointer + by if pointer is not None else None


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
    """Largest common divisor of these offsets in elements, of 1, 2, 4, 8 and 16."""
    return math.gcd(ALIGNMENT, *sizes)
