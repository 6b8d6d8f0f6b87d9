"""Triton kernels of guidance and variance (interpreted without a GPU) against fp64 oracles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlock_fast import ops
from kvlock_fast.kernels import guidance, variance
from kvlock_fast.kernels.language import HAS_TRITON
from kvlock_fast.kernels.launch import recorded_launches
from tests.support import oracles

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

EXAMPLES = settings().max_examples
NAN, INF = float("nan"), float("inf")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
bad_values = pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def pair(shape, dtype=torch.float32, seed=0):
    return normal(*shape, seed=seed, dtype=dtype), normal(*shape, seed=seed + 1, dtype=dtype)


SHAPES = {
    "rank-2": (3, 5),
    "rank-3": (2, 7, 4),
    "video": (2, 4, 3, 8, 6),
    "one-sample": (1, 16, 2, 5, 7),
    "one-element": (4, 1),
    "rank-7": (2, 1, 2, 1, 2, 1, 3),
    "block": (2, 2048),
    "just-over-a-block": (2, 2049),
    "prime": (1, 40_009),
    "no-elements": (2, 0),
    "no-samples": (0, 3, 4),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


# cfg_projection


def check_projection(got, cond, uncond, eps=1e-8):
    """Rounding errors scale with |c| |u| / (|u|^2 + eps), whatever cancels in the dot product."""
    assert got.dtype == torch.float32 and got.shape == cond.shape[:1]
    absolute = oracles.cfg_projection(cond.abs(), uncond.abs(), eps)
    assert (abs(oracles.f64(got) - oracles.cfg_projection(cond, uncond, eps)) <= 3e-6 * absolute + 1e-30).all()


@dtypes
@shapes
def test_projection_matches_fp64(shape, dtype):
    cond, uncond = pair(shape, dtype)
    check_projection(ops.cfg_projection(cond, uncond, backend="triton"), cond, uncond)


@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=5),
    st.integers(0, 99),
    st.sampled_from([0.0, 1e-8, 1.0]),
    st.sampled_from([1e-6, 1.0, 1e3]),
    st.sampled_from(FLOATS),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_projection_matches_fp64_on_any_shape(shape, seed, eps, magnitude, dtype):
    cond, uncond = pair(shape, seed=seed)
    cond, uncond = cond.to(dtype), (uncond * magnitude).to(dtype)
    if eps or (uncond != 0).flatten(1).any(1).all():
        check_projection(ops.cfg_projection(cond, uncond, eps=eps, backend="triton"), cond, uncond, eps)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_projection_sums_in_fp32(dtype):
    """1e5 products of 100 overflow fp16, and 1e5 ones stall a bf16 sum at 256."""
    x = torch.full((2, 100_000), 10.0, dtype=dtype, device=DEVICE)
    got = ops.cfg_projection(x, x, backend="triton")
    torch.testing.assert_close(got, torch.ones(2, device=DEVICE), rtol=1e-5, atol=0)


def test_projection_onto_zero_is_zero():
    cond, uncond = pair((2, 4, 5))
    uncond[1] = 0
    got = ops.cfg_projection(cond, uncond, backend="triton")
    assert got[1] == 0 and got[0] != 0


@dtypes
@pytest.mark.parametrize("shared", [True, False], ids=["shared-mask", "own-masks"])
@pytest.mark.parametrize("shape", [(2, 3, 2, 3, 5), (1, 2, 1, 19, 113), (3, 1, 2, 4, 8)], ids=str)
def test_projection_of_the_foreground_never_reads_the_rest(shape, shared, dtype):
    cond, uncond = pair(shape, dtype)
    mask = random_mask(1 if shared else shape[0], *shape[2:])
    zeroed = [x.masked_fill(~mask[:, None], 0) for x in (cond, uncond)]
    cond, uncond = (x.masked_fill(~mask[:, None], NAN).flatten(2) for x in (cond, uncond))
    partials = guidance.launch_projection_partials(cond, uncond, mask.flatten(1))
    dot, square = partials.sum(2)
    check_projection(dot / (square + 1e-8), *zeroed)


def halves(x):
    """The same values as the second half of one batched output with more channels."""
    joined = x.new_full((2 * x.shape[0], x.shape[1] + 1, *x.shape[2:]), NAN)
    view = joined[x.shape[0] :, : x.shape[1]]
    return view.copy_(x)


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def every_other(x):
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), NAN)
    return wide[..., ::2].copy_(x)


layouts = pytest.mark.parametrize("layout", [halves, channels_last, every_other], ids=lambda f: f.__name__)


@layouts
def test_any_layout_gives_the_same_projection_and_prediction(layout):
    cond, uncond = pair((2, 4, 3, 5, 7))
    scale = torch.tensor([5.0, 0.5], device=DEVICE)
    strided = layout(cond), layout(uncond)
    assert not strided[0].is_contiguous()
    for left, right in (strided, (strided[0], uncond), (cond, strided[1])):
        assert torch.equal(
            ops.cfg_projection(left, right, backend="triton"), ops.cfg_projection(cond, uncond, backend="triton")
        )
        got = ops.guided_prediction(left, right, scale, 0.9, backend="triton")
        assert got.is_contiguous()
        assert torch.equal(got, ops.guided_prediction(cond, uncond, scale, 0.9, backend="triton"))


# guided_prediction

OMEGA, S_STAR = torch.tensor([5.0, 0.0, 1.75, -2.0]), torch.tensor([0.9, 1.0, -0.3, 0.0])


@dtypes
@shapes
def test_prediction_is_as_good_as_eager(shape, dtype):
    """No further from fp64 than a few fp32 roundings and one to the output's dtype."""
    cond, uncond = pair(shape, dtype)
    omega, s_star = (x[: shape[0]].to(DEVICE) for x in (OMEGA, S_STAR))
    got = ops.guided_prediction(cond, uncond, omega, s_star, backend="triton")
    want, magnitude = oracles.guided_prediction(cond, uncond, omega, s_star)
    assert got.dtype == dtype and got.shape == cond.shape and got.is_contiguous()
    info = torch.finfo(dtype)
    rounding = info.eps / 2 * abs(want) + info.smallest_normal * info.eps / 2
    assert (abs(oracles.f64(got) - want) <= rounding + 8 * 2**-24 * magnitude).all()


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=5),
    st.integers(0, 99),
    st.floats(-20, 20, width=32),
    st.floats(-2, 2, width=32),
    st.sampled_from(FLOATS),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_prediction_is_the_references_on_any_shape(shape, seed, omega, s_star, dtype):
    cond, uncond = pair(shape, dtype, seed)
    got = ops.guided_prediction(cond, uncond, omega, s_star, backend="triton")
    want = ops.guided_prediction(cond, uncond, omega, s_star, backend="reference")
    _, magnitude = oracles.guided_prediction(cond, uncond, omega, s_star)
    allowed = torch.finfo(dtype).eps * abs(oracles.f64(want)) + 8 * 2**-24 * magnitude + 1e-7
    assert (abs(oracles.f64(got) - oracles.f64(want)) <= allowed).all()


@bad_values
def test_bad_predictions_stay_visible_in_their_sample(bad):
    cond, uncond = pair((2, 3, 5))
    cond[0, 1, 2] = bad
    got = ops.guided_prediction(cond, uncond, 5.0, 1.0, backend="triton")
    assert not got[0, 1, 2].isfinite() and got.isfinite().sum() == got.numel() - 1


# windowed_variance

HISTORIES = {
    "two-predictions": (2, 2, 3, 2, 4, 5),
    "four-predictions": (4, 2, 1, 2, 4, 8),
    "full-window": (10, 2, 2, 3, 4, 6),
    "long-window": (17, 1, 1, 2, 3, 5),
    "one-sample": (5, 1, 4, 2, 5, 3),
    "one-element": (3, 2, 1, 1, 1, 1),
    "odd": (7, 3, 1, 5, 3, 7),
    "two-blocks": (3, 1, 2, 3, 19, 23),
    "no-samples": (3, 0, 2, 1, 2, 3),
}


def random_mask(*shape, seed=3, share=0.4):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    mask[:, 0, 0, 0] = True
    return mask.to(DEVICE)


def mask_of(history, shared, seed=3):
    return random_mask(1 if shared else history.shape[1], *history.shape[3:], seed=seed)


def check_variance(got, history, foreground, reduction="elements"):
    assert got.dtype == torch.float32 and got.shape == history.shape[1:2]
    want = oracles.windowed_variance(history, foreground, reduction)
    finite = history[history.isfinite()]
    # Rounding to fp32 shifts a deviation by half an ulp of the values.
    shift = 2**-24 * (abs(finite).max().item() if finite.numel() else 0.0)
    assert (abs(oracles.f64(got) - want) <= 1e-5 * want + 4 * shift * np.sqrt(want) + 4 * shift**2).all()


@dtypes
@pytest.mark.parametrize("shared", [True, False], ids=["shared-mask", "own-masks"])
@pytest.mark.parametrize("shape", HISTORIES.values(), ids=HISTORIES)
def test_variance_matches_fp64(shape, shared, dtype):
    history = normal(*shape, dtype=dtype)
    foreground = mask_of(history, shared)
    check_variance(ops.windowed_variance(history, foreground, backend="triton"), history, foreground)
    mean = ops.windowed_variance(history, foreground, reduction="mean", backend="triton")
    check_variance(mean, history, foreground, "mean")


@given(
    st.integers(2, 12),
    st.lists(st.integers(1, 4), min_size=5, max_size=5),
    st.booleans(),
    st.integers(0, 99),
    st.sampled_from([1e-3, 1.0, 100.0]),
    st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_variance_matches_fp64_on_any_shape(n, shape, shared, seed, spread, share):
    history = normal(n, *shape, seed=seed) * spread
    foreground = random_mask(1 if shared else shape[0], *shape[2:], seed=seed, share=share)
    check_variance(ops.windowed_variance(history, foreground, backend="triton"), history, foreground)


@pytest.mark.parametrize("outlier", range(0, 10, 3))
def test_variance_loses_little_to_its_pivot(outlier):
    """Deviations are from prediction 0: the worst case is that one, or another, far away from the rest."""
    history = normal(10, 1, 2, 2, 3, 4) * 1e-3
    history[outlier] += 100.0
    foreground = mask_of(history, shared=True)
    got = ops.windowed_variance(history, foreground, backend="triton")
    np.testing.assert_allclose(oracles.f64(got), oracles.windowed_variance(history, foreground), rtol=3e-6)


def test_variance_survives_a_large_offset():
    history = 1e3 + 1e-2 * normal(10, 2, 4, 2, 6, 5)
    foreground = mask_of(history, shared=False)
    got = oracles.f64(ops.windowed_variance(history, foreground, backend="triton"))
    np.testing.assert_allclose(got, oracles.windowed_variance(history, foreground), rtol=1e-4)


def test_a_constant_history_has_no_variance():
    history = normal(1, 2, 3, 2, 4, 5).expand(8, -1, -1, -1, -1, -1)
    foreground = torch.ones(1, 2, 4, 5, dtype=torch.bool, device=DEVICE)
    assert (ops.windowed_variance(history, foreground, backend="triton") == 0).all()


@bad_values
@pytest.mark.parametrize("shared", [True, False], ids=["shared-mask", "own-masks"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_variance_never_counts_the_background(shared, bad):
    history = normal(5, 2, 3, 2, 4, 5)
    foreground = mask_of(history, shared)
    history = history.masked_fill(~foreground[None, :, None], bad)
    check_variance(ops.windowed_variance(history, foreground, backend="triton"), history, foreground)


def test_a_bad_foreground_stays_visible_in_its_sample():
    history = normal(5, 2, 3, 2, 4, 5)
    foreground = mask_of(history, shared=True)
    history[2, 1, 0, 0, 0, 0] = NAN
    got = ops.windowed_variance(history, foreground, backend="triton")
    assert got[0].isfinite() and got[1].isnan()


HISTORY_LAYOUTS = {
    "batch-before-window": lambda h: h.transpose(0, 1).contiguous().transpose(0, 1),
    "channels-last": lambda h: h.movedim(2, -1).contiguous().movedim(-1, 2),
    "reversed": lambda h: h.permute(5, 1, 4, 0, 3, 2).contiguous().permute(3, 1, 5, 4, 2, 0),
    "part-of-a-ring": lambda h: torch.cat([h.new_full((2, *h.shape[1:]), NAN), h])[2:],
}


@pytest.mark.parametrize("layout", HISTORY_LAYOUTS.values(), ids=HISTORY_LAYOUTS)
def test_any_layout_gives_the_same_variance(layout):
    history = normal(5, 2, 3, 2, 4, 5)
    foreground = mask_of(history, shared=False)
    want = ops.windowed_variance(history, foreground, backend="triton")
    assert torch.equal(ops.windowed_variance(layout(history), foreground, backend="triton"), want)
    strided = foreground.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(ops.windowed_variance(history, strided, backend="triton"), want)


def test_an_empty_mask_is_refused():
    history = normal(3, 2, 2, 2, 3, 4)
    foreground = mask_of(history, shared=False)
    foreground[1] = False
    with pytest.raises(ValueError, match="foreground is empty"):
        ops.windowed_variance(history, foreground, backend="triton")


# What all three share


def calls():
    history = normal(5, 2, 3, 2, 4, 5)
    scale = torch.tensor([5.0, 0.3], device=DEVICE)
    return {
        "cfg_projection": (ops.cfg_projection, pair((2, 4, 3, 6, 5))),
        "guided_prediction": (ops.guided_prediction, (*pair((2, 4, 3, 6, 5)), scale, 0.9)),
        "windowed_variance": (ops.windowed_variance, (history, mask_of(history, shared=True))),
    }


CALLS = calls()
every_op = pytest.mark.parametrize(("op", "arguments"), CALLS.values(), ids=CALLS)


@every_op
def test_triton_and_reference_agree(op, arguments):
    want = op(*arguments, backend="reference")
    torch.testing.assert_close(op(*arguments, backend="triton"), want, rtol=1e-5, atol=1e-6)


@every_op
def test_many_blocks_and_partial_sums_add_up(op, arguments, monkeypatch):
    """As with large tensors: every program has several blocks, every sum several turns."""
    want = op(*arguments, backend="reference")
    for module in (guidance, variance):
        monkeypatch.setattr(module, "BLOCK", 8)
        monkeypatch.setattr(module, "SUM_BLOCK", 2)
    monkeypatch.setattr(guidance, "MOST_PROGRAMS", 3)
    torch.testing.assert_close(op(*arguments, backend="triton"), want, rtol=1e-5, atol=1e-6)


@every_op
def test_the_same_bits_every_run(op, arguments):
    assert torch.equal(op(*arguments, backend="triton"), op(*arguments, backend="triton"))


@every_op
def test_a_sample_has_the_bits_it_has_alone(op, arguments):
    window = op is ops.windowed_variance  # whose samples are dimension 1, under one mask
    first, *rest = arguments
    alone = [first[:, 1:], *rest] if window else [x[1:] if torch.is_tensor(x) else x for x in arguments]
    assert torch.equal(op(*alone, backend="triton"), op(*arguments, backend="triton")[1:])


@every_op
def test_compiled_equals_eager(op, arguments):
    def doubled(*arguments):
        return 2 * op(*arguments, backend="triton")

    torch.compiler.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), doubled(*arguments))


@every_op
def test_fp64_has_no_kernel(op, arguments):
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        op(*wide, backend="triton")
    assert op(*wide).dtype == (torch.float64 if op is ops.guided_prediction else torch.float32)


OPERATORS = {
    "cfg_projection": lambda: (*pair((2, 4, 7)), 1e-8, "triton"),
    "guided_prediction": lambda: (*pair((4, 4, 7)), OMEGA.to(DEVICE), S_STAR.to(DEVICE), "triton"),
    "windowed_variance": lambda: (h := normal(3, 2, 2, 2, 3, 4), mask_of(h, shared=False), "triton"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    operator = getattr(torch.ops.kvlock_fast, name).default
    torch.library.opcheck(operator, OPERATORS[name](), test_utils=("test_schema", "test_faketensor"))


LAUNCHES = {
    "cfg_projection": ["_projection_partials_kernel", "_projection_kernel"],
    "guided_prediction": ["_guided_kernel"],
    "windowed_variance": ["_variance_partials_kernel", "_variance_kernel"],
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_are_counted(name):
    op, arguments = CALLS[name]
    with recorded_launches() as launches:
        op(*arguments, backend="triton")
    assert [launch.name for launch in launches] == LAUNCHES[name]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("module", [guidance, variance], ids=["guidance", "variance"])
def test_what_ships_can_be_listed_without_a_gpu(module, architecture):
    with recorded_launches(dry_run_for=architecture) as launches:
        module.launch_shipped(architecture)
    assert {launch.name for launch in launches} <= {n for names in LAUNCHES.values() for n in names} and launches
