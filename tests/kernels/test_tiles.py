"""The shared tile verbs, in the interpreter or on a GPU, against torch's casts and fp64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlock_fast.kernels import tiles
from kvlock_fast.kernels.language import HAS_TRITON, tl, triton

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

NAN, INF = float("nan"), float("inf")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NATIVE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
by_instruction = pytest.param(True, marks=pytest.mark.skipif(DEVICE == "cuda" and not NATIVE, reason="below sm_89"))
natives = pytest.mark.parametrize("native", [False, by_instruction], ids=["by-bits", "by-instruction"])
BLOCK = 1024


@triton.jit
def _narrow_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tiles.narrow(tl.load(x + at), out.dtype.element_ty))


@triton.jit
def _bf16_outwards_kernel(x, out, UP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tiles.bf16_outwards(tl.load(x + at), UP))


@triton.jit
def _nearest_int_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tiles.nearest_int(tl.load(x + at)))


@triton.jit
def _to_fp8_kernel(x, out, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tiles.to_fp8(tl.load(x + at), NATIVE))


@triton.jit
def _from_fp8_kernel(x, out, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tiles.from_fp8(tl.load(x + at), NATIVE))


@triton.jit
def _extremes_kernel(x, largest, smallest, AXIS: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    b_x = tl.load(x + tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :])
    at = tl.arange(0, M)[None, :] if AXIS == 0 else tl.arange(0, N)[:, None]
    tl.store(largest + at, tiles.largest(b_x, AXIS))
    tl.store(smallest + at, tiles.smallest(b_x, AXIS))


@triton.jit
def _dot_kernel(a, b, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    o_m, o_k, o_n = tl.arange(0, M)[:, None], tl.arange(0, K), tl.arange(0, N)[None, :]
    b_a, b_b = tl.load(a + o_m * K + o_k[None, :]), tl.load(b + o_k[:, None] * N + o_n)
    tl.store(out + o_m * N + o_n, tiles.dot(b_a, b_b, tl.load(out + o_m * N + o_n)))


def elementwise(kernel, x, dtype, **meta):
    """`kernel` over fp32 or uint8 x of any length."""
    padded = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).to(DEVICE)
    out = torch.empty_like(padded, dtype=dtype)
    kernel[(len(padded) // BLOCK,)](padded, out, **meta, BLOCK=BLOCK)
    return out[: len(x)].cpu()


def from_bits(bits):
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def awkward_numbers():
    """fp32: every exponent with mantissas at the halves of bf16's, fp16's and e4m3's last places, and random bits."""
    ends = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x7FFFF, 0x80000, 0x80001, 0x100000]
    exponents = np.arange(256, dtype=np.int64)[:, None, None] << 23
    mantissas = np.concatenate([ends, 0x7FFFFF - np.array(ends)])[None, :, None]
    signs = np.array([0, 1 << 31], dtype=np.int64)[None, None, :]
    systematic = (exponents | mantissas | signs).ravel()
    random = np.random.default_rng(0).integers(0, 1 << 32, 20_000)
    return from_bits(np.concatenate([systematic, random]).astype(np.uint32).view(np.int32))


def check_equal(got, want):
    """The same numbers to the bit, and NaN where NaN."""
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    assert torch.equal(got.view(integer)[~nan], want.view(integer)[~nan])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
def test_narrow_rounds_as_torch_does(dtype):
    x = awkward_numbers()
    check_equal(elementwise(_narrow_kernel, x, dtype), x.to(dtype))


@natives
def test_to_fp8_rounds_as_torch_does_and_saturates(native):
    x = awkward_numbers()
    check_equal(
        elementwise(_to_fp8_kernel, x, torch.uint8, NATIVE=native).view(torch.float8_e4m3fn),
        x.clamp(-448, 448).to(torch.float8_e4m3fn),
    )


@natives
def test_to_fp8_rounds_halves_to_even_between_all_neighbours(native):
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middle, middle.nextafter(torch.tensor(INF)), middle.nextafter(torch.tensor(-INF))])
    x = torch.cat([x, -x])
    got = elementwise(_to_fp8_kernel, x, torch.uint8, NATIVE=native)
    check_equal(got.view(torch.float8_e4m3fn), x.to(torch.float8_e4m3fn))


@natives
def test_every_fp8_code_decodes_to_its_value(native):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    check_equal(
        elementwise(_from_fp8_kernel, codes, torch.float32, NATIVE=native), codes.view(torch.float8_e4m3fn).float()
    )


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_bf16_outwards_is_the_nearest_on_its_side(up):
    x = awkward_numbers()
    got = elementwise(_bf16_outwards_kernel, x, torch.bfloat16, UP=up)
    assert torch.equal(got.isnan(), x.isnan())
    x, got = x[~x.isnan()], got[~x.isnan()]
    sign = 1 if up else -1
    assert (sign * got.double() >= sign * x.double()).all()
    inside = got.nextafter(torch.tensor(-sign * INF, dtype=torch.bfloat16))
    exact = got.float() == x
    assert (sign * inside.double() < sign * x.double())[~exact].all()
    representable = x.bfloat16().float() == x
    assert torch.equal(got[representable].float(), x[representable])


@given(st.lists(st.floats(-(2.0**21), 2.0**21, width=32), min_size=1, max_size=50))
def test_nearest_int_rounds_halves_to_even(numbers):
    halves = torch.arange(-9, 9) + 0.5
    x = torch.cat([torch.tensor(numbers), halves])
    got = elementwise(_nearest_int_kernel, x, torch.int32)
    assert torch.equal(got, x.double().round().int())


@pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])
@pytest.mark.parametrize("special", [None, NAN, -NAN, INF, -INF, -0.0], ids=str)
@pytest.mark.parametrize("everywhere", [False, True], ids=["one", "all"])
def test_extremes_keep_nan(everywhere, special, axis):
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) - 3
    if special is not None:
        x[5, 9] = special
        if everywhere:
            x[5], x[:, 9] = special, special
    x = x.to(DEVICE)
    largest, smallest = (torch.empty(64 if axis == 0 else 32, device=DEVICE) for _ in range(2))
    _extremes_kernel[(1,)](x, largest, smallest, axis, 32, 64)
    torch.testing.assert_close(largest, x.amax(axis), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(smallest, x.amin(axis), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_dot_accumulates_in_fp32(dtype):
    generator = torch.Generator().manual_seed(1)
    a, b, start = (torch.randn(*s, generator=generator) for s in ((16, 64), (64, 32), (16, 32)))
    a, b = a.to(dtype), b.to(dtype)
    out = start.clone().to(DEVICE)
    _dot_kernel[(1,)](a.to(DEVICE), b.to(DEVICE), out, 16, 64, 32)
    torch.testing.assert_close(out.cpu().double(), start.double() + a.double() @ b.double(), rtol=0, atol=2e-5)
