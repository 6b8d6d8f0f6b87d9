"""The prologue by reference and by Triton (interpreted without a GPU) against an fp64 oracle."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlock_fast.kernels.language import HAS_TRITON
from kvlock_fast.kernels.launch import recorded_launches
from kvlock_fast.kernels.prologue import Capture, Lock, QKNorm, RoPE, prologue
from kvlock_fast.kernels.quantize import QuantizedKV, quantize_kv
from tests.support import oracles
from tests.support.prologue_cases import (
    DEVICE,
    Case,
    Oracle,
    cancellation,
    inputs,
    norm_of,
    normal,
    projections,
    rope_of,
    run,
)

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

EXAMPLES = settings().max_examples
NAN, INF = float("nan"), float("inf")
NORMS = ("none", "rms", "layer", "rms_across_heads")
LAYOUTS = (None, "interleaved", "split_half")
STAGES = ("raw", "normed", "rotated")
FORMATS = ("native", "bf16", "fp8_e4m3", "int8", "int4")
bad_values = pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
norms = pytest.mark.parametrize("norm", NORMS)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["no-rope", "interleaved", "split-half"])
stages = pytest.mark.parametrize("stage", STAGES)
formats = pytest.mark.parametrize("format", FORMATS)
backends = pytest.mark.parametrize("backend", ["reference", "triton"])


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check_exact(got, want, case):
    """fp32: within a few roundings of fp64, of the largest size there is, as far as the norm does not enlarge them."""
    tolerance = 2e-6 * max(1.0, abs(want).max(initial=0.0)) * cancellation(case)
    np.testing.assert_allclose(oracles.f64(got), want, rtol=0, atol=tolerance, err_msg=str(case))
    assert got.is_contiguous() and got.dtype == case.dtype


def check_case(case, backend="triton"):
    """All outputs against the oracle."""
    positional, named = inputs(case)
    got, want = prologue(*positional, **named, backend=backend), Oracle(positional, named)
    for name in ("q", "k", "v"):
        check_exact(getattr(got, name), getattr(want, name), case)
    return got


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def bits(x):
    return x.contiguous().view(torch.uint8)


# The formulas


@backends
@norms
@layouts
def test_every_norm_and_rotation(norm, layout, backend):
    check_case(Case(norm=norm, layout=layout), backend)


@backends
@norms
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=["interleaved", "split-half"])
def test_angles_that_differ_by_head(norm, layout, backend):
    check_case(Case(norm=norm, layout=layout, angles="heads"), backend)


@backends
@stages
@layouts
@norms
def test_every_stage_of_the_source(norm, layout, stage, backend):
    check_case(Case(norm=norm, layout=layout, source="native", stage=stage), backend)


@formats
@stages
@layouts
def test_every_format_of_the_source(layout, stage, format):
    check_case(Case(layout=layout, source=format, stage=stage, dim=12, tokens=9))


@norms
@layouts
@backends
def test_the_source_riding_in_the_batch(norm, layout, backend):
    check_case(Case(batch=3, norm=norm, layout=layout, source="in_batch"), backend)


SHAPES = {
    "one-token": dict(tokens=1, foreground=1),
    "one-token-of-background": dict(tokens=1, foreground=0),
    "two": dict(tokens=2, foreground=1),
    "no-foreground": dict(tokens=11, foreground=0),
    "all-foreground": dict(tokens=11, foreground=11),
    "prime": dict(tokens=37, foreground=17),
    "two-samples": dict(batch=2),
    "three-samples": dict(batch=3, tokens=5),
    "a-source-a-sample": dict(batch=3, tokens=5, source_batch=3),
    "one-head": dict(heads=1),
    "twelve-heads": dict(heads=12, dim=16, tokens=4, foreground=2),
    "dim-2": dict(dim=2),
    "dim-40": dict(dim=40, heads=5),
    "dim-72": dict(dim=72, tokens=4, foreground=2),
    "dim-96": dict(dim=96, tokens=4, foreground=2),
    "wan-1.3b-row": dict(heads=12, dim=128, tokens=3, foreground=1),
    "cogvideox-row": dict(heads=30, dim=64, tokens=3, foreground=1, norm="layer"),
    "ltx-row": dict(heads=32, dim=64, tokens=3, foreground=1, angles="heads"),
    "wan-14b-row": dict(heads=40, dim=128, tokens=2, foreground=1),
    "no-tokens": dict(tokens=0, foreground=0),
    "no-samples": dict(batch=0),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@shapes
def test_every_shape(shape):
    check_case(Case(source="fp8_e4m3").but(**shape))


@pytest.mark.parametrize("shape", [n for n in SHAPES if not n.endswith("row")])
def test_every_shape_in_split_halves(shape):
    check_case(Case(layout="split_half", source="int8").but(**SHAPES[shape]))


@pytest.mark.parametrize("shape", ["prime", "no-foreground", "dim-40", "wan-14b-row", "no-tokens"])
def test_every_shape_without_a_lock(shape):
    check_case(Case().but(**SHAPES[shape]))


@pytest.mark.parametrize("dim", [1, 5, 33])
@norms
def test_odd_channels_without_a_rotation(norm, dim):
    check_case(Case(norm=norm, layout=None, dim=dim, source="int8"))


@pytest.mark.parametrize("queries", [0, 1, 3, 5])
def test_fewer_queries_than_keys(queries):
    got = check_case(Case(queries=queries, source="native"))
    assert got.q.shape[1] == queries


@norms
def test_norms_without_weights(norm):
    positional, named = inputs(Case(norm=norm, source="native", stage="raw"))
    named["norm"] = QKNorm(norm)
    got = prologue(*positional, **named, backend="triton")
    size = Case().heads * Case().dim if norm == "rms_across_heads" else Case().dim
    ones = None if norm == "none" else torch.ones(size, device=DEVICE)
    want = prologue(*positional, **named | {"norm": QKNorm(norm, ones, ones)}, backend="reference")
    for name in ("q", "k", "v"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=3e-6)


@pytest.mark.parametrize("foreground", [3, None], ids=["some", "default"])
def test_without_a_lock_the_foreground_does_not_matter(foreground):
    positional, named = inputs(Case())
    got = prologue(*positional, **named | {"foreground": foreground}, backend="triton")
    want = prologue(*positional, **named | {"foreground": 7}, backend="triton")
    assert same_bits(got.k, want.k) and same_bits(got.v, want.v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@norms
@layouts
def test_half_precision_is_as_good_as_eager(layout, norm, dtype):
    case = Case(layout=layout, norm=norm, dtype=dtype, source="native", stage="raw", tokens=5)
    positional, named = inputs(case)
    want = Oracle(positional, named)
    for backend in ("reference", "triton"):
        got = prologue(*positional, **named, backend=backend)
        for name, eager in zip(("q", "k", "v"), eager_prologue(positional, named), strict=True):
            truth = getattr(want, name)
            error, allowed = abs(oracles.f64(getattr(got, name)) - truth), abs(oracles.f64(eager) - truth).max()
            rounding = torch.finfo(dtype).eps / 2 * abs(truth).max() + 1e-6
            assert error.max() <= allowed + rounding, (name, backend)


def eager_prologue(positional, named):
    """What a user would write: every step in the dtype of the projections, norms inside in fp32."""
    q, k, v, heads = positional
    norm, rope, lock, first = named["norm"], named["rope"], named["lock"], named["foreground"]

    def normed(x, weight, bias):
        x = x.unflatten(2, (heads, -1)) if x.ndim == 3 else x
        if norm.kind == "none":
            return x
        if norm.kind == "layer":
            return torch.nn.functional.layer_norm(x, x.shape[3:], weight, bias, norm.eps)
        rows = x.flatten(2) if norm.kind == "rms_across_heads" else x
        return torch.nn.functional.rms_norm(rows, rows.shape[-1:], weight, norm.eps).view_as(x)

    def rotated(x):
        if rope is None:
            return x
        a, b = x.unflatten(3, (-1, 2)).unbind(4) if rope.layout == "interleaved" else x.chunk(2, 3)
        cos, sin = rope.cos[: x.shape[1]].to(x.dtype), rope.sin[: x.shape[1]].to(x.dtype)
        pair = a * cos - b * sin, a * sin + b * cos
        return torch.stack(pair, 4).flatten(3) if rope.layout == "interleaved" else torch.cat(pair, 3)

    by_k = norm.k_weight, norm.k_bias
    k = normed(k, *by_k)
    k[:, first:] = lock.alpha * normed(lock.k, *by_k) + (1 - lock.alpha) * k[:, first:]
    v = v.unflatten(2, (heads, -1)).clone()
    v[:, first:] = lock.alpha * lock.v + (1 - lock.alpha) * v[:, first:]
    return rotated(normed(q, norm.q_weight, norm.q_bias)), rotated(k), v


# Exact ends: what has weight 0 does not count, whatever it holds


def spoilt(x, bad):
    """x with `bad` in every number of it."""
    if isinstance(x, QuantizedKV):
        return (
            replace(x, scale=torch.full_like(x.scale, bad))
            if x.scale is not None
            else replace(x, codes=torch.full_like(x.codes, bad))
        )
    return torch.full_like(x, bad)


ALPHA_0 = [*product(FORMATS, STAGES, ["triton"], [NAN]), *product(["native"], STAGES, ["reference", "triton"], [INF])]


@pytest.mark.parametrize(("format", "stage", "backend", "bad"), ALPHA_0)
def test_alpha_0_is_the_unlocked_result_whatever_the_cache_holds(format, stage, backend, bad):
    positional, named = inputs(Case(source=format, stage=stage, alpha=0.0))
    lock = named["lock"]
    named["lock"] = replace(lock, k=spoilt(lock.k, bad), v=spoilt(lock.v, bad))
    got = prologue(*positional, **named, backend=backend)
    want = prologue(*positional, **named | {"lock": None}, backend=backend)
    assert all(same_bits(getattr(got, name), getattr(want, name)) for name in ("q", "k", "v"))


@bad_values
@backends
@stages
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_alpha_1_is_the_source_whatever_the_new_background_holds(dtype, stage, backend, bad):
    case = Case(source="native", stage=stage, alpha=1.0, dtype=dtype)
    (q, k, v, heads), named = inputs(case)
    clean = prologue(q, k, v, heads, **named, backend=backend)
    k, v = k.clone(), v.clone()
    k[:, case.foreground :], v[:, case.foreground :] = bad, bad
    got = prologue(q, k, v, heads, **named, backend=backend)
    assert same_bits(got.k, clean.k) and same_bits(got.v, clean.v)
    assert all(same_bits(v, named["lock"].v[0]) for v in got.v[:, case.foreground :])
    if stage == "rotated":
        assert all(same_bits(k, named["lock"].k[0]) for k in got.k[:, case.foreground :])


@pytest.mark.parametrize(("output", "alpha", "bad"), [("native", 0.3, NAN), ("native", 1.0, INF), ("fp8", 0.3, NAN)])
@norms
def test_the_foreground_does_not_see_the_cache(norm, output, alpha, bad):
    case = Case(norm=norm, source="native", alpha=alpha, output=output, foreground=5, batch=1, heads=2)
    positional, named = inputs(case)
    lock, clean = named["lock"], run(case)
    named["lock"] = replace(lock, k=spoilt(lock.k, bad))
    got = prologue(*positional, **named, backend="triton")
    if output == "native" or norm != "none":  # else NaN is in the block's scale
        assert same_bits(got.k[:, :5], clean.k[:, :5])
    assert same_bits(got.v, clean.v) and same_bits(got.q, clean.q)
    if alpha == 1 and output == "native":
        assert not got.k[:, 5:].isfinite().any()


@backends
@stages
def test_alpha_is_per_sample(stage, backend):
    case = Case(batch=4, source="native", stage=stage)
    positional, named = inputs(case)
    named["lock"] = replace(named["lock"], alpha=torch.tensor([0.0, 1.0, 0.25, 1e-4], device=DEVICE))
    got, want = prologue(*positional, **named, backend=backend), Oracle(positional, named)
    check_exact(got.k, want.k, case)
    check_exact(got.v, want.v, case)


@backends
def test_rows_before_the_first_are_left_as_they_are(backend):
    positional, named = inputs(Case(batch=3, source="native"))
    lock = named["lock"]
    rows = torch.tensor([0.0, 0.6, 0.2], device=DEVICE)
    got, want = (
        prologue(*positional, **named | {"lock": replace(lock, alpha=alpha, first_row=first)}, backend=backend)
        for alpha, first in ((rows[1:], 1), (rows, 0))
    )
    assert same_bits(got.k, want.k) and same_bits(got.v, want.v)


@bad_values
@backends
@layouts
def test_in_the_batch_the_source_stays_and_alpha_1_copies_it(layout, backend, bad):
    case = Case(batch=3, layout=layout, source="in_batch")
    (q, k, v, heads), named = inputs(case)
    k, v = k.clone(), v.clone()
    k[1, case.foreground :], v[1, case.foreground :] = bad, bad  # alpha is 1 there
    named["lock"] = Lock(torch.tensor([1.0, 0.0], device=DEVICE))
    got = prologue(q, k, v, heads, **named, backend=backend)
    plain = prologue(q, k, v, heads, **named | {"lock": None}, backend=backend)
    for one, other in ((got.k, plain.k), (got.v, plain.v)):
        assert same_bits(one[0], other[0]) and same_bits(one[2], other[2])
        assert same_bits(one[1, case.foreground :], one[0, case.foreground :])


def test_an_unblended_row_never_reads_the_source():
    positional, named = inputs(Case(batch=3, source="in_batch"))
    (q, k, v, heads) = (x.clone() if isinstance(x, torch.Tensor) else x for x in positional)
    k[0, 3:], v[0, 3:] = NAN, NAN
    named["lock"] = Lock(torch.zeros(2, device=DEVICE))
    got = prologue(q, k, v, heads, **named, backend="triton")
    assert got.k[1:].isfinite().all() and got.v[1:].isfinite().all() and got.k[0, :3].isfinite().all()


# Foreground-only computation


@backends
@stages
@pytest.mark.parametrize(
    ("format", "foreground"), [("native", 0), ("native", 1), ("native", 7), ("fp8_e4m3", 5), ("int4", 4)]
)
def test_only_the_foreground_gives_what_alpha_1_gives(format, foreground, stage, backend):
    case = Case(source=format, stage=stage, foreground=foreground, alpha=1.0)
    few, all_tokens = run(case.but(foreground_only=True), backend), run(case, backend)
    assert same_bits(few.k, all_tokens.k) and same_bits(few.v, all_tokens.v)
    assert same_bits(few.q, all_tokens.q[:, :foreground].contiguous())


# Capture


@pytest.mark.parametrize("stage", STAGES[1:])
@formats
@layouts
def test_captures_the_new_background_of_row_0(layout, format, stage):
    case = Case(layout=layout, tokens=9, capture=Capture(format, stage))
    positional, named = inputs(case)
    got, oracle = run(case), Oracle(positional, named)
    want_k = np.array(oracle.normed) if stage == "normed" else oracle.k[0, case.foreground :]
    for kept, want, kind in ((got.captured_k, want_k, "k"), (got.captured_v, oracle.v[0, case.foreground :], "v")):
        want = torch.from_numpy(want[None]).float().to(DEVICE)
        packed = quantize_kv(want, format, kind, backend="reference")
        assert (kept.format, kept.kind, kept.shape, kept.dtype) == (format, kind, packed.shape, case.dtype)
        assert [t.shape for t in (kept.codes, *kept.scales)] == [t.shape for t in (packed.codes, *packed.scales)]
        # A value next to the middle between two codes may take either.
        step = {"native": 3e-6, "bf16": 2**-7, "fp8_e4m3": 2**-3, "int8": 2 / 127, "int4": 2 / 15}[format]
        error = (kept.dequantize(torch.float32) - packed.dequantize(torch.float32)).abs()
        assert error.max() <= step * want.abs().max() and (error > 3e-6 * want.abs().max()).sum() <= 2


@pytest.mark.parametrize(
    ("norm", "output"), [("layer", "native"), ("rms_across_heads", "native"), ("rms", "fp8"), ("none", "fp8")]
)
@formats
def test_captured_bits_are_the_references(format, norm, output):
    capture = Capture(format, "normed")
    case = Case(norm=norm, tokens=9, heads=2, output=output, capture=capture, dtype=torch.bfloat16)
    got, want = run(case), run(case, "reference")
    for a, b in ((got.captured_k, want.captured_k), (got.captured_v, want.captured_v)):
        difference = a.dequantize(torch.float32) - b.dequantize(torch.float32)
        assert (difference.abs() > 1e-6 * b.dequantize(torch.float32).abs().max()).float().mean() < 0.01
    if DEVICE == "cpu":  # a GPU fuses a product with the addition that rounds it: see quantize.py
        assert same_bits(got.captured_v.codes, want.captured_v.codes)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_what_was_captured_locks_to_the_same_keys(stage):
    case = Case(capture=Capture("native", stage))
    source = run(case)
    edit = case.but(seed=5, batch=3, capture=None)
    (q, k, v, heads), named = inputs(edit)
    named |= {"norm": norm_of(case), "rope": rope_of(case)}
    named["lock"] = Lock(1.0, source.captured_k, source.captured_v, stage)
    got = prologue(q, k, v, heads, **named, backend="triton")
    for edited in range(3):
        assert same_bits(got.k[edited, case.foreground :], source.k[0, case.foreground :])
        assert same_bits(got.v[edited, case.foreground :], source.v[0, case.foreground :])


def test_captures_beside_the_source_in_the_batch():
    case = Case(batch=3, source="in_batch", capture=Capture("native", "rotated"))
    got = check_case(case)
    assert same_bits(got.captured_k.codes[0], got.k[0, case.foreground :])
    assert same_bits(got.captured_v.codes[0], got.v[0, case.foreground :])


# fp8 output

FP8_SHAPES = {
    "two-samples": dict(tokens=9, batch=2),
    "block": dict(tokens=128, foreground=60),
    "block-and-one": dict(tokens=129, foreground=128, heads=1),
    "prime": dict(tokens=131, foreground=30, heads=1),
    "dim-40": dict(tokens=20, dim=40),
    "dim-128": dict(tokens=12, dim=128),
    "one-token": dict(tokens=1, foreground=0),
    "no-background": dict(tokens=16, foreground=16),
    "no-tokens": dict(tokens=0, foreground=0),
}


def decoded(codes, scale):
    """[B, S, H, D] of codes [B, S, H, D] and scales [B, H, ceil(S / 128)], in fp64."""
    by_token = np.repeat(oracles.f64(scale), 128, axis=2)[:, :, : codes.shape[1]]
    return oracles.f64(codes.float()) * by_token.transpose(0, 2, 1)[..., None]


FP8_CALLS = [
    *product(FP8_SHAPES, ["none", "rms_across_heads"], ["triton"]),
    *product(["prime"], ["rms", "layer"], ["triton"]),
    *product(["prime"], NORMS, ["reference"]),
    *product(["block", "no-background"], ["none"], ["reference"]),
]


@pytest.mark.parametrize(("shape", "norm", "backend"), FP8_CALLS)
def test_fp8_outputs_are_codes_and_scales(shape, norm, backend):
    case = Case(heads=2, norm=norm, output="fp8", source="native").but(**FP8_SHAPES[shape])
    positional, named = inputs(case)
    got, want = prologue(*positional, **named, backend=backend), Oracle(positional, named)
    tokens, blocks = case.tokens, -(-case.tokens // 128)
    padded = -(-tokens // 16) * 16
    assert got.q.shape == got.k.shape == (case.batch, tokens, case.heads, case.dim)
    assert got.v.shape == (case.batch, case.heads, case.dim, padded)
    assert {got.q.dtype, got.k.dtype, got.v.dtype} == {torch.float8_e4m3fn}
    assert {got.q_scale.shape, got.k_scale.shape, got.v_scale.shape} == {(case.batch, case.heads, blocks)}
    assert not bits(got.v)[..., tokens:].any() and got.v.is_contiguous()
    values = got.v.float()[..., :tokens].permute(0, 3, 1, 2).contiguous()
    for name, codes in (("q", got.q), ("k", got.k), ("v", values)):
        scale, truth = getattr(got, f"{name}_scale"), getattr(want, name)
        assert scale.dtype == torch.float32 and scale.isfinite().all() and (scale > 0).all()
        if truth.size:
            noise = np.square(decoded(codes, scale) - truth).sum()
            assert 10 * np.log10(np.square(truth).sum() / noise) >= 29, name
            error = abs(decoded(codes, scale) - truth) / abs(truth).max()
            assert error.max() <= 2**-4 + 1e-6, name


@norms
@pytest.mark.parametrize(
    ("source", "layout"), [(None, "split_half"), ("int8", "interleaved"), ("int8", None), ("in_batch", "split_half")]
)
def test_fp8_codes_are_the_references(source, layout, norm):
    batch = 2 if source == "in_batch" else 1
    case = Case(batch=batch, heads=2, norm=norm, layout=layout, output="fp8", source=source, dtype=torch.bfloat16)
    got, want = run(case), run(case, "reference")
    for name in ("q", "k", "v"):
        difference = bits(getattr(got, name)).int() - bits(getattr(want, name)).int()
        assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 0.01
        torch.testing.assert_close(getattr(got, f"{name}_scale"), getattr(want, f"{name}_scale"), rtol=3e-7, atol=0)


@pytest.mark.parametrize("case", [Case(norm="none"), Case(norm="rms", tokens=300, heads=1)])
def test_values_take_the_amax_of_128_tokens(case):
    got = run(case.but(output="fp8"))
    v = oracles.f64(projections(case)[2]).reshape(case.batch, case.tokens, case.heads, case.dim)
    for block in range(got.v_scale.shape[2]):
        amax = abs(v[:, 128 * block : 128 * (block + 1)]).max(axis=(1, 3))
        np.testing.assert_allclose(oracles.f64(got.v_scale)[:, :, block], amax / 448, rtol=1e-6)


def test_a_channel_can_reach_the_bound_and_does_not_saturate():
    heads, dim = 2, 8
    x = torch.zeros(1, 4, heads * dim, device=DEVICE)
    x[..., 3] = 1e4  # all the row's size in one channel
    got = prologue(x, x, x, heads, norm=QKNorm("rms_across_heads"), output="fp8", backend="triton")
    np.testing.assert_allclose(decoded(got.q, got.q_scale)[0, :, 0, 3], (heads * dim) ** 0.5, rtol=1e-5)


@backends
def test_a_rotated_pair_with_biases_does_not_saturate(backend):
    """The largest there can be: one channel has all the size, and its partner's bias turns into it."""
    x = torch.zeros(1, 2, 8, device=DEVICE)
    x[..., 2] = 1e4
    bias = torch.full((8,), 5.0, device=DEVICE)
    angle = torch.full((2, 1, 4), -torch.pi / 4, device=DEVICE)
    norm, rope = QKNorm("layer", None, None, bias, bias), RoPE(angle.cos(), angle.sin())
    got = prologue(x, x, x, 1, norm=norm, rope=rope, output="fp8", backend=backend)
    exact = oracles.f64(prologue(x, x, x, 1, norm=norm, rope=rope, backend=backend).k)
    np.testing.assert_allclose(decoded(got.k, got.k_scale), exact, rtol=2**-4, atol=1e-5)


@pytest.mark.parametrize("outlier", [1.0, 30.0], ids=["even-weights", "an-outlier"])
@pytest.mark.parametrize("width", [(12, 128), (40, 128)], ids=["wan-1.3b", "wan-14b"])
def test_the_bound_costs_no_accuracy(width, outlier):
    heads, dim = width
    q = normal(1, 8, heads * dim, dtype=torch.bfloat16)
    weight = torch.ones(heads * dim, device=DEVICE)
    weight[::dim] = outlier
    norm = QKNorm("rms_across_heads", weight, weight)
    got = prologue(q, q, q, heads, norm=norm, output="fp8", backend="reference")
    truth = oracles.f64(prologue(q, q, q, heads, norm=norm, backend="reference").q.float())
    exact = oracles.f64(prologue(q.double(), q.double(), q.double(), heads, norm=norm).q)
    others = np.s_[..., 1:]  # the outlier itself would hide the others' noise
    noise = decoded(got.q, got.q_scale)[others] - exact[others]
    assert abs(truth - exact).max() < 1
    assert 10 * np.log10(np.square(exact[others]).sum() / np.square(noise).sum()) >= 29


# Memory


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=["interleaved", "split-half"])
@pytest.mark.parametrize("kind", ["batch-expanded", "every-other-token", "offset", "batch-inside"])
def test_strided_projections(kind, layout):
    case = Case(batch=2, layout=layout, source="fp8_e4m3", tokens=9)
    positional, named = inputs(case)
    made = {
        "batch-expanded": lambda x: x[:1].expand(2, -1, -1),
        "every-other-token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "offset": lambda x: torch.cat((x[:, :1], x), 1)[:, 1:],
        "batch-inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    }[kind]
    strided = [made(x) for x in positional[:3]]
    got = prologue(*strided, case.heads, **named, backend="triton")
    want = prologue(*(x.contiguous() for x in strided), case.heads, **named, backend="triton")
    assert all(same_bits(getattr(got, name), getattr(want, name)) for name in ("q", "k", "v"))


@stages
def test_a_source_that_is_a_view(stage):
    """The rows [foreground:] of the source's own K and V, as [B, R, H*D] slices of a fused projection."""
    case = Case(source="native", stage=stage)
    positional, named = inputs(case)
    _, k, v = projections(case.but(seed=7))
    views = k[:1, case.foreground :], v[:1, case.foreground :]
    copies = (x.unflatten(2, (case.heads, -1)).contiguous() for x in views)
    got = prologue(*positional, **named | {"lock": Lock(0.4, *views, stage)}, backend="triton")
    want = prologue(*positional, **named | {"lock": Lock(0.4, *copies, stage)}, backend="triton")
    assert same_bits(got.k, want.k) and same_bits(got.v, want.v)


def test_inputs_stay_as_they_are():
    positional, named = inputs(Case(batch=2, source="in_batch"))
    before = [x.clone() for x in positional[:3]]
    prologue(*positional, **named, backend="triton")
    assert all(map(torch.equal, before, positional[:3]))


@backends
def test_outputs_never_share_memory_with_inputs(backend):
    positional, named = inputs(Case(norm="none", layout=None))
    got = prologue(*positional, **named, backend=backend)
    owners = {x.untyped_storage().data_ptr() for x in positional[:3]}
    assert not owners & {x.untyped_storage().data_ptr() for x in (got.q, got.k, got.v)}


# Launches, operators, compilation

LAUNCHES = {
    "native": (Case(source="fp8_e4m3"), 1),
    "native-capturing": (Case(capture=Capture("int8")), 1),
    "fp8": (Case(output="fp8", source="int8"), 2),
    "fp8-capturing": (Case(output="fp8", capture=Capture("fp8_e4m3")), 2),
    "fp8-without-a-norm": (Case(output="fp8", norm="none"), 1),
    "int4-takes-two-more": (Case(capture=Capture("int4")), 3),
    "nothing-to-do": (Case(batch=0), 0),
}


@pytest.mark.parametrize(("case", "count"), LAUNCHES.values(), ids=LAUNCHES)
def test_launches(case, count):
    with recorded_launches() as launches:
        run(case)
    assert len(launches) == count


OPERATOR_CASES = {
    "plain": Case(layout=None, norm="none"),
    "locked": Case(
        batch=2, source="int8", norm="layer"
    ),  # of e4m3 inputs torch's own check of the schema knows too little
    "in-batch": Case(batch=2, source="in_batch"),
    "foreground-only": Case(source="int4", foreground_only=True),
    "fp8": Case(heads=2, output="fp8", source="native", dtype=torch.bfloat16),
    "capturing": Case(capture=Capture("fp8_e4m3")),
    "capturing-fp8": Case(heads=2, output="fp8", norm="none", capture=Capture("bf16")),
}
operator_cases = pytest.mark.parametrize("case", OPERATOR_CASES.values(), ids=OPERATOR_CASES)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@operator_cases
def test_the_operator_keeps_its_promises(case, backend, monkeypatch):
    calls = []
    operator = torch.ops.kvlock_fast.prologue.default
    monkeypatch.setattr(
        "kvlock_fast.kernels.prologue._prologue_op", lambda *arguments: calls.append(arguments) or operator(*arguments)
    )
    run(case, backend)
    torch.library.opcheck(operator, calls[0], test_utils=("test_schema", "test_faketensor"))


@operator_cases
def test_compiles_in_one_graph(case, backend="triton"):
    positional, named = inputs(case)

    def step(q, k, v):
        out = prologue(q, k, v, case.heads, **named, backend=backend)
        return out.q, out.k, out.v, *(x.codes for x in (out.captured_k, out.captured_v) if x is not None)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    want = step(*positional[:3])
    for one, other in zip(compiled(*positional[:3]), want, strict=True):
        assert same_bits(one, other)


def test_auto_takes_the_reference_for_what_the_kernels_do_not_know():
    case = Case(dtype=torch.float64, source="native")
    with recorded_launches() as launches:
        check_case(case, "auto")
    assert not launches


# Bad arguments

BAD = {
    "heads-do-not-divide": (dict(heads=5), r"q must be a float \[B, S, 5 \* D\]"),
    "k-of-another-length": (dict(k=normal(2, 6, 24)), "must agree"),
    "v-of-another-dtype": (dict(v=normal(2, 7, 24, dtype=torch.float16)), "one dtype"),
    "q-longer-than-k": (dict(q=normal(2, 8, 24)), "at most k's 7 tokens, got 8"),
    "q-of-four-dimensions": (dict(q=normal(2, 7, 3, 8)), "q must be a float"),
    "channels-not-contiguous": (dict(q=normal(2, 24, 7).mT), "contiguous"),
    "foreground": (dict(foreground=8), "foreground must be a number of tokens from 0 to 7, got 8"),
    "output": (dict(output="fp4"), "unknown output 'fp4'"),
    "backend": (dict(backend="cuda"), "unknown backend 'cuda'"),
    "norm": (dict(norm=QKNorm("batch")), "unknown norm 'batch'"),
    "weight-shape": (dict(norm=QKNorm("rms", normal(24))), r"q_weight must be contiguous \[8\]"),
    "weight-without-a-norm": (dict(norm=QKNorm("none", normal(8))), "has no q_weight"),
    "bias-with-rms": (dict(norm=QKNorm("rms", k_bias=normal(8))), "has no k_bias"),
    "rope-layout": (dict(rope=RoPE(normal(7, 1, 4), normal(7, 1, 4), "complex")), "unknown RoPE layout 'complex'"),
    "rope-rows": (dict(rope=RoPE(normal(6, 1, 4), normal(6, 1, 4))), r"cos must be fp32 \[7, 1 or 3, 4\]"),
    "rope-dtype": (dict(rope=RoPE(*[normal(7, 1, 4, dtype=torch.float16)] * 2)), "cos must be fp32"),
    "lock-stage": (dict(lock=Lock(1.0, *[normal(1, 4, 3, 8)] * 2, "cooked")), "unknown lock stage 'cooked'"),
    "lock-shape": (dict(lock=Lock(1.0, *[normal(1, 5, 3, 8)] * 2)), r"lock's k must be \[1 or 2, 4, 3, 8\]"),
    "lock-batch": (dict(lock=Lock(1.0, *[normal(3, 4, 3, 8)] * 2)), r"got \(3, 4, 3, 8\)"),
    "lock-half": (dict(lock=Lock(1.0, normal(1, 4, 3, 8))), "both k and v or neither"),
    "lock-kinds": (dict(lock=Lock(1.0, *[quantize_kv(normal(1, 4, 3, 8), "int8", "v")] * 2)), "quantised as 'v'"),
    "alpha-range": (dict(lock=Lock(1.5, *[normal(1, 4, 3, 8)] * 2)), "between 0 and 1 or a tensor, got 1.5"),
    "alpha-shape": (dict(lock=Lock(torch.ones(2))), r"alpha must be fp32 \[1\]"),
    "capture-format": (dict(capture=Capture("int3")), "unknown capture format 'int3'"),
    "capture-stage": (dict(capture=Capture("int8", "raw")), "unknown capture stage 'raw'"),
    "capture-locked": (dict(capture=Capture("int8"), lock=Lock(1.0, *[normal(1, 4, 3, 8)] * 2)), "may not be locked"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(changes, sentence):
    positional, named = inputs(Case(batch=2, norm="none"))
    arguments = dict(zip(("q", "k", "v", "heads"), positional, strict=True)) | named | changes
    with pytest.raises(ValueError, match=sentence):
        prologue(**arguments)


# Anything


@st.composite
def cases(draw):
    tokens, dim = draw(st.integers(0, 9)), draw(st.sampled_from([1, 2, 4, 6, 10, 16, 24]))
    layout = draw(st.sampled_from(LAYOUTS)) if dim % 2 == 0 else None
    source = draw(st.sampled_from([None, "in_batch", *FORMATS]))
    batch = draw(st.integers(1, 3))
    return Case(
        batch=batch, tokens=tokens, heads=draw(st.integers(1, 5)), dim=dim,
        foreground=draw(st.integers(0, tokens)), norm=draw(st.sampled_from(NORMS)), layout=layout,
        angles=draw(st.sampled_from(["shared", "heads"])), source=source,
        source_batch=draw(st.sampled_from([1, batch])), stage=draw(st.sampled_from(STAGES)),
        alpha=draw(st.sampled_from([0.0, 0.25, 1.0])), seed=draw(st.integers(0, 99)),
        foreground_only=source in FORMATS and draw(st.booleans()),
    )  # fmt: skip


@given(cases())
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_case(case):
    check_case(case)


@pytest.mark.large
@pytest.mark.parametrize(("norm", "layout", "stage", "format"), product(NORMS, LAYOUTS, STAGES, FORMATS))
@pytest.mark.parametrize("shape", [dict(tokens=131, foreground=50), dict(heads=12, dim=64, tokens=5)])
def test_all_combinations(shape, norm, layout, stage, format):
    check_case(Case(norm=norm, layout=layout, stage=stage, source=format).but(**shape))
