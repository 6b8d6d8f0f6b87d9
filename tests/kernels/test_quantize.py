"""Triton's quantise and dequantise (interpreted without a GPU) against the reference's bits and an fp64 oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kvlock_fast import ops
from kvlock_fast.kernels.dequantize import dequantize_kv_reference, launch_dequantize_kv
from kvlock_fast.kernels.language import HAS_TRITON
from kvlock_fast.kernels.launch import recorded_launches
from kvlock_fast.kernels.packed import packed_layout
from tests.support import oracles

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

EXAMPLES = settings().max_examples
NAN, INF = float("nan"), float("inf")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = {
    "bf16": ("bf16", "k", 1),
    "fp8": ("fp8_e4m3", "k", 1),
    "fp8-by-128": ("fp8_e4m3", "v", 128),
    "int8": ("int8", "v", 1),
    "int4-keys": ("int4", "k", 1),
    "int4-values": ("int4", "v", 1),
}
SQNR_DB = {"bf16": 48.0, "fp8_e4m3": 29.0, "int8": 36.0, "int4": 15.0}
formats = pytest.mark.parametrize(("format", "kind", "per_scale"), FORMATS.values(), ids=FORMATS)
lossy = pytest.mark.parametrize(("format", "kind", "per_scale"), list(FORMATS.values())[1:], ids=list(FORMATS)[1:])
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

SHAPES = {
    "aligned": (1, 128, 2, 64),
    "two-samples-prime": (2, 67, 3, 32),
    "block-plus-one": (1, 129, 1, 128),
    "one-token": (2, 1, 2, 64),
    "short": (1, 5, 3, 16),
    "dim-40": (1, 61, 2, 40),
    "dim-96": (1, 65, 1, 96),
    "odd-dim": (2, 33, 2, 33),
    "tiny-odd-dim": (1, 17, 1, 7),
    "dim-1": (1, 9, 2, 1),
    "dim-300": (1, 3, 2, 300),
    "no-tokens": (2, 0, 3, 40),
    "no-samples": (0, 5, 3, 40),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def quantize(x, format, kind, per_scale, backend="triton", tokens=None):
    return ops.quantize_kv(x, format, kind, tokens=tokens, tokens_per_scale=per_scale, backend=backend)


def bits(x):
    return x.contiguous().view(torch.uint8)


def nibbles(cache):
    codes = cache.codes.short()
    return torch.stack((codes & 15, codes >> 4), dim=-1) if cache.format == "int4" else codes


def check_same(got, want):
    """The same bits; on a GPU a code of an integer format may be the neighbour (see quantize.py)."""
    for a, b in zip((got.codes, *got.scales), (want.codes, *want.scales), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    for a, b in zip(got.scales, want.scales, strict=True):  # by value: the smaller of 0.0 and -0.0 is either
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if DEVICE == "cuda" and got.format in ("int8", "int4"):
        assert (nibbles(got) - nibbles(want)).abs().max() <= 1
    else:
        assert torch.equal(bits(got.codes), bits(want.codes))


# quantise


@formats
@dtypes
@shapes
def test_kernel_and_reference_give_the_same_bits(shape, dtype, format, kind, per_scale):
    x = normal(*shape, dtype=dtype)
    check_same(quantize(x, format, kind, per_scale), quantize(x, format, kind, per_scale, "reference"))


@formats
@pytest.mark.parametrize("shape", [(1, 131, 2, 32), (2, 70, 1, 33)], ids=["prime", "odd-dim"])
@pytest.mark.parametrize("chosen", ["permuted", "few", "repeated", "one", "none", "strided"])
def test_chosen_tokens_are_packed_in_the_same_pass(chosen, shape, format, kind, per_scale):
    x, count = normal(*shape, dtype=torch.bfloat16), shape[1]
    tokens = {
        "permuted": torch.randperm(count, generator=torch.Generator().manual_seed(1)),
        "few": torch.tensor([3, 1, 64, 5]),
        "repeated": torch.tensor([7] * 66 + [2]),
        "one": torch.tensor([count - 1]),
        "none": torch.tensor([], dtype=torch.int64),
        "strided": (torch.rand(count, generator=torch.Generator().manual_seed(2))[None] < 0.8).nonzero()[:, 1],
    }[chosen].to(DEVICE)
    left_out = torch.ones(count, dtype=torch.bool, device=DEVICE)
    left_out[tokens] = False
    x[:, left_out] = NAN
    with recorded_launches() as launches:
        got = quantize(x, format, kind, per_scale, tokens=tokens)
    assert len(launches) == (chosen != "none")
    assert got.shape == (shape[0], len(tokens), *shape[2:])
    check_same(got, quantize(x.index_select(1, tokens), format, kind, per_scale, "reference"))
    check_same(quantize(x, format, kind, per_scale, "reference", tokens), got)


LAYOUTS = {
    "heads-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice-of-fused-qkv": lambda x: torch.stack([x, torch.full_like(x, NAN)], 2)[:, :, 0],
    "gaps-between-channels": lambda x: torch.stack([x, torch.full_like(x, NAN)], -1)[..., 0],
    "every-second-token": lambda x: torch.stack([x, torch.full_like(x, NAN)], 2).flatten(1, 2)[:, ::2],
    "expanded-batch": lambda x: x[:1].expand_as(x),
}


@formats
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides_are_read_in_place(layout, format, kind, per_scale):
    x = normal(1, 37, 2, 40, dtype=torch.float16).repeat(2, 1, 1, 1)
    strided = layout(x)
    assert not strided.is_contiguous()
    check_same(quantize(strided, format, kind, per_scale), quantize(x, format, kind, per_scale, "reference"))


@st.composite
def inputs(draw):
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 140)), draw(st.integers(1, 2)), draw(st.integers(1, 70)))
    x = normal(*shape, seed=draw(st.integers(0, 99))) * draw(st.sampled_from([1e-42, 1e-30, 1e-3, 1.0, 300.0, 1e37]))
    x[torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE) < draw(st.sampled_from([0, 0.5]))] = 0
    if draw(st.booleans()):
        x += draw(st.sampled_from([1.0, -1e4]))
    return x.to(draw(st.sampled_from(FLOATS)))


@given(inputs(), st.sampled_from(list(FORMATS.values())))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_input_gives_the_references_bits(x, format):
    check_same(quantize(x, *format), quantize(x, *format, "reference"))


def largest_error(x, format, kind, per_scale):
    """What an element may be off by, fp64: half its code's step, with fp32's rounding of scale and quotient."""
    x = x.double()
    if format == "bf16":
        return x.abs() * 2**-8
    if format == "int4":
        dim, axis = (1, 2) if kind == "k" else (3, 4)
        low, high = (
            groups(f * x, dim, 64, -INF).amax(axis, keepdim=True).expand_as(groups(x, dim, 64, 0)).flatten(dim, dim + 1)
            for f in (-1, 1)
        )
        spread = (low + high).narrow(dim, 0, x.shape[dim])
        # Minimum and step are rounded outwards to 8 significant bits.
        return (spread + 2**-7 * low.abs().narrow(dim, 0, x.shape[dim])) / 15 * (1 + 2**-7) / 2 * (1 + 1e-5)
    amax = groups(x.abs(), 1, per_scale, 0).amax((2, 4), keepdim=True).expand(-1, -1, per_scale, -1, -1)
    amax = amax.flatten(1, 2)[:, : x.shape[1]]
    if format == "int8":
        return amax / 127 / 2 * (1 + 1e-5)
    return torch.maximum(x.abs() * 2**-4, amax / 448 * 2**-10) * (1 + 1e-5)


def groups(x, dim, size, fill):
    """`dim` split into groups of `size`, the last one filled up."""
    shape = list(x.shape)
    shape[dim] = -shape[dim] % size
    return torch.cat([x, x.new_full(shape, fill)], dim).unflatten(dim, (-1, size))


@formats
@two_dtypes
@pytest.mark.parametrize("shape", [(1, 131, 2, 64), (1, 70, 1, 96)], ids=["dim-64", "dim-96"])
def test_values_come_back_within_half_a_step_of_fp64(shape, dtype, format, kind, per_scale):
    x = normal(*shape, dtype=dtype)
    x[:, :, :, 5] *= 20
    cache = quantize(x, format, kind, per_scale)
    error = (cache.dequantize(torch.float32, backend="triton").double() - x.double()).abs()
    assert (error <= largest_error(x, format, kind, per_scale)).all()


@lossy
@dtypes
def test_normal_data_keeps_its_signal(dtype, format, kind, per_scale):
    x = normal(1, 128, 2, 64, seed=7, dtype=dtype)
    got = quantize(x, format, kind, per_scale).dequantize(torch.float32, backend="triton")
    assert oracles.sqnr_db(x, got) >= SQNR_DB[format]


@lossy
@two_dtypes
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_a_bad_value_stays_visible_and_in_its_group(bad, dtype, format, kind, per_scale):
    x = normal(1, 200, 2, 32, dtype=dtype)
    x[0, 131, 1, 5] = bad
    cache = quantize(x, format, kind, per_scale)
    values, want = (cache.dequantize(torch.float32, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)
    from_reference = quantize(x, format, kind, per_scale, "reference").dequantize(torch.float32, backend="reference")
    torch.testing.assert_close(values, from_reference, rtol=0, atol=0, equal_nan=True)
    tokens = slice(128, 192) if format == "int4" and kind == "k" else slice(128, 256) if per_scale > 1 else [131]
    channels = [5] if format == "int4" and kind == "k" else slice(None)
    outside = torch.ones_like(values, dtype=torch.bool)
    group = torch.zeros_like(outside[0, :, 1])
    group[tokens] = True
    chosen = torch.zeros_like(group)
    chosen[:, channels] = True
    outside[0, :, 1] = ~(group & chosen)
    assert not values[0, 131, 1, 5].isfinite()
    assert values[outside].isfinite().all()


@formats
@pytest.mark.parametrize("constant", [0.0, -0.0, 1.0, -0.03, 1e4, 1e-40, 3e38], ids=str)
def test_constants_have_finite_scales(constant, format, kind, per_scale):
    x = torch.full((1, 66, 2, 34), constant, device=DEVICE)
    cache = quantize(x, format, kind, per_scale)
    check_same(cache, quantize(x, format, kind, per_scale, "reference"))
    if constant < 1e38:
        torch.testing.assert_close(cache.dequantize(backend="triton"), x, rtol=1e-2, atol=1e-38)


@lossy
@pytest.mark.parametrize("shape", [(1, 128, 2, 32), (1, 509, 1, 33), (2, 200, 1, 128)], ids=str)
def test_nbytes_stay_under_their_share_of_bf16(shape, format, kind, per_scale):
    x = normal(*shape)
    share = {"fp8_e4m3": 0.60, "int8": 0.60, "int4": 0.42}[format]
    assert quantize(x, format, kind, per_scale).nbytes <= share * 2 * x.numel()


# dequantise


@formats
@dtypes
@pytest.mark.parametrize("shape", [(1, 131, 2, 32), (2, 9, 2, 33), (1, 65, 1, 128), (2, 0, 3, 40)], ids=str)
def test_values_have_the_references_bits(shape, dtype, format, kind, per_scale):
    cache = quantize(normal(*shape, dtype=dtype), format, kind, per_scale, "reference")
    with recorded_launches() as launches:
        got = cache.dequantize(dtype, backend="triton")
    assert len(launches) == (cache.codes.numel() > 0)
    want = cache.dequantize(dtype, backend="reference")
    assert got.dtype == dtype and got.stride() == want.stride()
    if DEVICE == "cpu":
        assert torch.equal(bits(got), bits(want))
    else:  # int4's product and sum are fused there
        torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=1e-6)


@formats
def test_strided_codes_are_read_in_place(format, kind, per_scale):
    cache = quantize(normal(2, 66, 2, 64), format, kind, per_scale)
    codes = cache.codes.transpose(1, 2).contiguous().transpose(1, 2)
    got = launch_dequantize_kv(codes, cache.scales, format, kind, 64, per_scale, torch.float32)
    assert torch.equal(got, cache.dequantize(torch.float32, backend="triton"))


@formats
def test_one_sample_of_a_batch_is_read_in_place(format, kind, per_scale):
    cache = quantize(normal(3, 130, 1, 32), format, kind, per_scale)
    scales = [s[1:2] for s in cache.scales]
    got = launch_dequantize_kv(cache.codes[1:2], scales, format, kind, 32, per_scale, torch.float32)
    assert torch.equal(got, cache.dequantize(torch.float32, backend="triton")[1:2])


# both: one launch, operators, errors


@formats
def test_one_launch_each_way(format, kind, per_scale):
    x = normal(1, 130, 2, 32)
    with recorded_launches() as launches:
        quantize(x, format, kind, per_scale).dequantize(torch.float16, backend="triton")
    assert [launch.name for launch in launches] == ["_quantize_kernel", "_dequantize_kernel"]


def test_native_is_a_copy_without_a_launch():
    x = normal(2, 9, 3, 5, dtype=torch.bfloat16)
    x[0, 0, 0, 0] = NAN
    tokens = torch.tensor([4, 0], device=DEVICE)
    with recorded_launches() as launches:
        cache, part = quantize(x, "native", "k", 1), quantize(x, "native", "k", 1, tokens=tokens)
        values = cache.dequantize(backend="triton")
    assert not launches and values.data_ptr() != cache.codes.data_ptr() != x.data_ptr()
    assert torch.equal(bits(values), bits(x)) and torch.equal(bits(part.codes), bits(x[:, tokens]))


ALL_FORMATS = {"native": ("native", "k", 1), **FORMATS}
all_formats = pytest.mark.parametrize(("format", "kind", "per_scale"), ALL_FORMATS.values(), ids=ALL_FORMATS)
backends = pytest.mark.parametrize("backend", ["reference", "triton"])


@all_formats
@backends
def test_operators_pass_opcheck(backend, format, kind, per_scale):
    x, tokens = normal(2, 33, 2, 34), torch.tensor([3, 1, 30], device=DEVICE)
    # The schema's check multiplies what it compares, which torch cannot do in fp8.
    checks = ("test_faketensor",) if format == "fp8_e4m3" else ("test_schema", "test_faketensor")
    for chosen in (None, tokens):
        arguments = (x, chosen, format, kind, per_scale, backend)
        torch.library.opcheck(torch.ops.kvlock_fast.quantize_kv.default, arguments, test_utils=checks)
    cache = quantize(x, format, kind, per_scale)
    arguments = (cache.codes, cache.scales, format, kind, 34, per_scale, torch.float16, backend)
    torch.library.opcheck(torch.ops.kvlock_fast.dequantize_kv.default, arguments, test_utils=checks)


@all_formats
@pytest.mark.parametrize("shape", [(1, 130, 2, 33), (0, 4, 3, 8), (2, 0, 3, 8)], ids=str)
@backends
def test_fake_tensors_predict_every_output(backend, shape, format, kind, per_scale):
    x = normal(*shape).transpose(1, 2).contiguous().transpose(1, 2)
    real = quantize(x, format, kind, per_scale, backend)
    with FakeTensorMode() as mode:
        fake = quantize(mode.from_tensor(x), format, kind, per_scale, backend)
    for a, b in zip((fake.codes, *fake.scales), (real.codes, *real.scales), strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
    if format != "native":
        assert [(t.shape, t.dtype) for t in (real.codes, *real.scales)] == packed_layout(shape, format, kind, per_scale)


@all_formats
def test_compiled_equals_eager(format, kind, per_scale):
    x, tokens = normal(1, 70, 2, 34), torch.arange(69, 1, -2, device=DEVICE)

    def doubled(x, tokens):
        return 2 * quantize(x, format, kind, per_scale, tokens=tokens).dequantize(torch.float32, backend="triton")

    torch.compiler.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, tokens), doubled(x, tokens))


ERRORS = {
    "tokens-rank": (dict(tokens=torch.zeros(2, 3, dtype=torch.int64)), r"tokens.*\(2, 3\)"),
    "tokens-dtype": (dict(tokens=torch.zeros(2, dtype=torch.int32)), "tokens.*int32"),
    "tokens-mask": (dict(tokens=torch.ones(9, dtype=torch.bool)), "tokens.*bool"),
    "per-scale": (dict(tokens_per_scale=64), "tokens_per_scale.*64"),
    "per-scale-int8": (dict(format="int8", tokens_per_scale=128), "fp8_e4m3 only.*'int8'"),
    "backend": (dict(backend="abacus"), "abacus"),
}


@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_arguments_are_quoted(options, message):
    with pytest.raises(ValueError, match=message):
        ops.quantize_kv(normal(1, 9, 2, 8), **options)


def test_double_precision_has_a_reference_only():
    x = normal(1, 9, 2, 8).double()
    assert ops.quantize_kv(x, "int8").dequantize().dtype == torch.float64
    with pytest.raises(ValueError, match="float64"):
        ops.quantize_kv(x, "int8", backend="triton")
    with pytest.raises(ValueError, match="float64"):
        ops.quantize_kv(x, "int8").dequantize(backend="triton")


@pytest.mark.large
@formats
@pytest.mark.parametrize("dim", [32, 64, 72, 128, 256])
@pytest.mark.parametrize("count", [127, 128, 1000])
def test_larger_shapes_give_the_references_bits(count, dim, format, kind, per_scale):
    x = normal(2, count, 4, dim, dtype=torch.bfloat16)
    cache = quantize(x, format, kind, per_scale)
    check_same(cache, quantize(x, format, kind, per_scale, "reference"))
    values = dequantize_kv_reference(cache.codes, cache.scales, format, kind, dim, per_scale)
    torch.testing.assert_close(cache.dequantize(torch.float32, backend="triton"), values, rtol=1e-6, atol=1e-6)
