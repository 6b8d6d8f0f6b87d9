"""`kvlock_fast.ops` against fp64 oracles written from the specification, on CPU tensors."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kvlock_fast import ops
from tests.support import oracles

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
NAN, INF = float("nan"), float("inf")
EXAMPLES = settings().max_examples  # of the profile chosen on the command line
BAD_MASK_DTYPES = (torch.uint8, torch.int64, torch.float32)


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def name(value):
    return dtype_id(value) if isinstance(value, torch.dtype) else str(value)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=rng(seed)).to(dtype)


def random_mask(*shape, seed=0, share=0.4):
    return torch.rand(shape, generator=rng(seed)) < share


def quoting(shape):
    """A pattern for a shape however it is printed: (2, 3), [2, 3], 2x3."""
    return r"(?<!\d)" + r"\D{1,3}".join(map(str, shape)) + r"(?!\d)"


def check_close(got, want, tolerance):
    np.testing.assert_allclose(oracles.f64(got), want, rtol=0, atol=tolerance)


def check_as_good_as_eager(got, eager, truth):
    """No further from fp64 than same-dtype eager, plus one rounding to the output's dtype."""
    rounding = torch.finfo(got.dtype).eps / 2 * abs(truth).max() + 1e-6
    error, allowed = abs(oracles.f64(got) - truth).max(), abs(oracles.f64(eager) - truth).max() + rounding
    assert error <= allowed, f"error {error:.3e}, eager's plus one rounding {allowed:.3e}"


# token_mask

TOKEN_GRIDS = {
    "wan": ((9, 32, 48), {}),
    "one-frame": ((1, 16, 16), {}),
    "latent-pixels": ((5, 16, 24), {"patch_size": (1, 1, 1)}),
    "ltx": ((17, 64, 96), {"temporal_stride": 8, "spatial_stride": 32, "patch_size": (1, 1, 1)}),
    "no-compression": ((4, 3, 5), {"temporal_stride": 1, "spatial_stride": 1, "patch_size": (1, 1, 1)}),
    "frame-by-frame-vae": ((8, 16, 16), {"causal": False}),
    "temporal-patch": ((13, 16, 16), {"patch_size": (2, 2, 2)}),
    "temporal-patch-not-causal": ((16, 16, 16), {"patch_size": (2, 2, 2), "causal": False}),
    "unequal-patch": ((5, 16, 48), {"patch_size": (1, 1, 3)}),
    "frames-not-4n+1": ((7, 16, 16), {}),
    "frames-not-4n-not-causal": ((7, 16, 16), {"causal": False}),
    "patch-does-not-divide": ((5, 24, 40), {}),
    "stride-does-not-divide": ((5, 17, 30), {"patch_size": (1, 1, 1)}),
}


@pytest.mark.parametrize(("shape", "options"), TOKEN_GRIDS.values(), ids=TOKEN_GRIDS)
@pytest.mark.parametrize("share", [0.0, 0.002, 0.3, 1.0], ids=["none", "sparse", "some", "all"])
@pytest.mark.parametrize("batch", [(), (1,), (3,)], ids=["no-batch", "batch-1", "batch-3"])
def test_token_mask_marks_every_token_over_a_foreground_pixel(shape, options, share, batch):
    mask = random_mask(*batch, *shape, share=share)
    got = ops.token_mask(mask, **options)
    want = oracles.token_mask(mask, **options)
    assert got.dtype == torch.bool and got.shape == want.shape
    np.testing.assert_array_equal(got.numpy(), want)


@st.composite
def token_mask_calls(draw):
    size = st.integers(1, 12)
    options = {
        "temporal_stride": draw(st.integers(1, 5)),
        "spatial_stride": draw(st.integers(1, 5)),
        "patch_size": (1, draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "causal": draw(st.booleans()),
    }
    shape = (*draw(st.sampled_from([(), (1,), (2,)])), draw(size), draw(size), draw(size))
    mask = torch.zeros(shape, dtype=torch.bool)
    for flat in draw(st.lists(st.integers(0, mask.numel() - 1), max_size=4)):
        mask.view(-1)[flat] = True
    return mask, options


@given(token_mask_calls())
@settings(max_examples=8 * EXAMPLES, deadline=None)
def test_token_mask_matches_brute_force_on_any_geometry(call):
    mask, options = call
    np.testing.assert_array_equal(ops.token_mask(mask, **options).numpy(), oracles.token_mask(mask, **options))


@pytest.mark.parametrize(
    ("causal", "latent_of_frame"),
    [(True, {0: 0, 1: 1, 4: 1, 5: 2, 8: 2, 9: 3, 12: 3}), (False, {0: 0, 3: 0, 4: 1, 7: 1, 8: 2, 11: 2})],
    ids=["causal", "plain"],
)
def test_a_single_masked_frame_marks_exactly_its_latent_frame(causal, latent_of_frame):
    for frame, latent in latent_of_frame.items():
        mask = torch.zeros(13 if causal else 12, 16, 16, dtype=torch.bool)
        mask[frame, 5, 11] = True
        tokens = ops.token_mask(mask, causal=causal, patch_size=(1, 1, 1)).view(-1, 2, 2)
        assert torch.nonzero(tokens).tolist() == [[latent, 0, 1]]


def test_samples_of_a_batch_are_projected_independently():
    masks = random_mask(3, 9, 16, 32, share=0.01)
    alone = torch.cat([ops.token_mask(mask) for mask in masks])
    assert torch.equal(ops.token_mask(masks), alone)


@pytest.mark.parametrize("frames", [5, 9, 4], ids=["3-latent-frames-odd", "9-frames", "4-frames"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "plain"])
def test_a_temporal_patch_that_does_not_divide_loses_no_foreground(frames, causal):
    """Where the padding goes is the model's choice; that no masked frame may vanish is not."""
    options = {"patch_size": (3, 2, 2), "causal": causal}
    for frame in range(frames):
        mask = torch.zeros(frames, 16, 16, dtype=torch.bool)
        mask[frame] = True
        got = ops.token_mask(mask, **options)
        assert got.shape == oracles.token_mask(mask, **options).shape
        assert got.any()


@pytest.mark.parametrize("dtype", BAD_MASK_DTYPES, ids=name)
def test_token_mask_refuses_masks_that_are_not_bool(dtype):
    with pytest.raises(ValueError, match=dtype_id(dtype)):
        ops.token_mask(torch.ones(5, 16, 16, dtype=dtype))


@pytest.mark.parametrize("shape", [(16, 24), (2, 1, 5, 16, 24)], ids=["rank-2", "rank-5"])
def test_token_mask_refuses_other_ranks(shape):
    with pytest.raises(ValueError, match=quoting(shape)):
        ops.token_mask(torch.ones(shape, dtype=torch.bool))


# locked_attention


def attention_inputs(batch=2, queries=7, keys=7, heads=3, dim=16, ref_batch=None, fg_batch=None, dtype=torch.float32):
    """q, k, v, k_ref, v_ref, foreground."""
    ref_batch, fg_batch = ref_batch or batch, fg_batch or batch
    q = normal(batch, queries, heads, dim, seed=1, dtype=dtype)
    k, v = (normal(batch, keys, heads, dim, seed=seed, dtype=dtype) for seed in (2, 3))
    k_ref, v_ref = (normal(ref_batch, keys, heads, dim, seed=seed, dtype=dtype) for seed in (4, 5))
    return q, k, v, k_ref, v_ref, random_mask(fg_batch, keys, seed=6)


ATTENTION_SHAPES = {
    "square": {},
    "one-sample": {"batch": 1},
    "one-token": {"queries": 1, "keys": 1},
    "one-head": {"heads": 1},
    "one-query": {"queries": 1, "keys": 61},
    "fewer-queries": {"queries": 5, "keys": 33},
    "more-queries": {"queries": 29, "keys": 3},
    "long-prime": {"queries": 67, "keys": 257, "heads": 2},
    "block-minus-one": {"queries": 127, "keys": 127, "heads": 1},
    "block-plus-one": {"queries": 129, "keys": 129, "heads": 1},
    "dim-8": {"dim": 8},
    "dim-40": {"dim": 40},
    "dim-64": {"dim": 64},
    "dim-96": {"dim": 96},
    "dim-128": {"dim": 128},
    "shared-reference": {"ref_batch": 1},
    "shared-mask": {"fg_batch": 1},
    "shared-both": {"batch": 3, "ref_batch": 1, "fg_batch": 1},
}
ALPHAS = {
    "alpha-0": 0.0,
    "alpha-0.3": 0.3,
    "alpha-1": 1.0,
    "alpha-int": 1,
    "alpha-per-sample": torch.tensor([0.0, 1.0, 0.625]),
}


def alpha_for(alpha, batch):
    return alpha[:batch] if isinstance(alpha, torch.Tensor) else alpha


@pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES.values(), ids=ATTENTION_SHAPES)
def test_locked_attention_matches_fp64(shape, alpha):
    tensors = attention_inputs(**shape)
    alpha = alpha_for(alpha, len(tensors[0]))
    got = ops.locked_attention(*tensors, alpha)
    assert got.dtype == torch.float32 and got.shape == tensors[0].shape
    check_close(got, oracles.locked_attention(*tensors, alpha), 1e-5)


@pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS)
@pytest.mark.parametrize("everything", [True, False], ids=["all-foreground", "all-background"])
def test_locked_attention_with_a_uniform_mask(everything, alpha):
    q, k, v, k_ref, v_ref, foreground = attention_inputs()
    foreground, alpha = torch.full_like(foreground, everything), alpha_for(alpha, 2)
    got = ops.locked_attention(q, k, v, k_ref, v_ref, foreground, alpha)
    check_close(got, oracles.locked_attention(q, k, v, k_ref, v_ref, foreground, alpha), 1e-5)


@st.composite
def attention_calls(draw):
    shape = {
        "batch": (batch := draw(st.integers(1, 3))),
        "queries": draw(st.integers(1, 20)),
        "keys": draw(st.integers(1, 40)),
        "heads": draw(st.integers(1, 3)),
        "dim": 8 * draw(st.integers(1, 6)),
        "ref_batch": draw(st.sampled_from([1, batch])),
        "fg_batch": draw(st.sampled_from([1, batch])),
    }
    weights = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32))
    per_sample = st.lists(weights, min_size=batch, max_size=batch).map(torch.tensor)
    return shape, draw(st.one_of(weights, per_sample)), draw(st.sampled_from([None, 0.5, 1.25]))


@given(attention_calls())
@settings(max_examples=5 * EXAMPLES, deadline=None)
def test_locked_attention_matches_fp64_on_any_shape(call):
    shape, alpha, scale = call
    tensors = attention_inputs(**shape)
    got = ops.locked_attention(*tensors, alpha, scale=scale)
    # A caller's scale sharpens the softmax beyond unit-variance logits, and the error with it.
    check_close(got, oracles.locked_attention(*tensors, alpha, scale), 1e-5 if scale is None else 4e-5)


@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
def test_alpha_1_never_reads_new_background_tokens(bad):
    q, k, v, k_ref, v_ref, foreground = attention_inputs(keys=33)
    k[~foreground], v[~foreground] = bad, bad
    got = ops.locked_attention(q, k, v, k_ref, v_ref, foreground, 1.0)
    check_close(got, oracles.locked_attention(q, k, v, k_ref, v_ref, foreground, 1.0), 1e-5)


@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
def test_alpha_0_never_reads_the_reference(bad):
    q, k, v, k_ref, v_ref, foreground = attention_inputs(keys=33)
    k_ref.fill_(bad), v_ref.fill_(bad)
    got = ops.locked_attention(q, k, v, k_ref, v_ref, foreground, 0.0)
    check_close(got, oracles.locked_attention(q, k, v, k_ref, v_ref, foreground, 0.0), 1e-5)


@pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS)
@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
def test_the_reference_at_foreground_tokens_is_never_read(bad, alpha):
    q, k, v, k_ref, v_ref, foreground = attention_inputs(keys=33)
    k_ref[foreground], v_ref[foreground] = bad, bad
    alpha = alpha_for(alpha, 2)
    got = ops.locked_attention(q, k, v, k_ref, v_ref, foreground, alpha)
    check_close(got, oracles.locked_attention(q, k, v, k_ref, v_ref, foreground, alpha), 1e-5)


def test_exact_weights_in_a_batch_hold_sample_by_sample():
    q, k, v, k_ref, v_ref, foreground = attention_inputs(keys=33)
    alpha = torch.tensor([0.0, 1.0])
    k_ref[0], v_ref[0] = NAN, NAN
    k[1, ~foreground[1]], v[1, ~foreground[1]] = NAN, NAN
    got = ops.locked_attention(q, k, v, k_ref, v_ref, foreground, alpha)
    check_close(got, oracles.locked_attention(q, k, v, k_ref, v_ref, foreground, alpha), 1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [{}, {"keys": 131}, {"dim": 128}, {"ref_batch": 1}], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=name)
def test_half_precision_attention_is_as_accurate_as_eager(dtype, shape, alpha):
    tensors = attention_inputs(**shape, dtype=dtype)
    got = ops.locked_attention(*tensors, alpha)
    assert got.dtype == dtype
    check_as_good_as_eager(
        got, oracles.eager_locked_attention(*tensors, alpha), oracles.locked_attention(*tensors, alpha)
    )


def test_huge_logits_do_not_overflow():
    q, *rest = attention_inputs(keys=33)
    q, values = q * 1e4, torch.cat([rest[1], rest[3]])
    got = ops.locked_attention(q, *rest, 0.5)
    assert got.isfinite().all() and got.abs().max() <= values.abs().max() * (1 + 1e-5)


def heads_first(x):
    """The same values, stored as [B, H, S, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_other(x):
    """The same values, with a gap of NaN after each element."""
    return torch.stack([x, torch.full_like(x, NAN)], dim=-1)[..., 0]


@pytest.mark.parametrize("layout", [heads_first, every_other], ids=lambda f: f.__name__)
def test_strided_attention_inputs(layout):
    *tensors, foreground = attention_inputs(keys=13, ref_batch=1)
    wide = torch.stack([foreground, ~foreground], dim=-1)[..., 0]
    strided = [layout(x) for x in tensors]
    strided[3] = strided[3].expand(2, -1, -1, -1)
    assert not any(x.is_contiguous() for x in (*strided, wide))
    got = ops.locked_attention(*strided, wide, 0.3)
    check_close(got, oracles.locked_attention(*tensors, foreground, 0.3), 1e-5)


def test_no_queries_give_an_empty_result():
    got = ops.locked_attention(*attention_inputs(queries=0, keys=5, dtype=torch.bfloat16), 0.5)
    assert got.shape == (2, 0, 3, 16) and got.dtype == torch.bfloat16


@pytest.mark.parametrize("ref_batch", [1, 2], ids=["shared", "per-sample"])
@pytest.mark.parametrize("format", ["native", "bf16", "fp8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("which", ["k", "v", "kv"])
def test_a_quantised_reference_equals_its_dequantised_tensor(which, format, ref_batch):
    q, k, v, k_ref, v_ref, foreground = attention_inputs(keys=33, ref_batch=ref_batch)
    quantised, plain = [k_ref, v_ref], [k_ref, v_ref]
    for kind in which:
        i = "kv".index(kind)
        quantised[i] = ops.quantize_kv(plain[i], format, kind)
        plain[i] = quantised[i].dequantize(torch.float32)
    got = ops.locked_attention(q, k, v, *quantised, foreground, 0.7)
    check_close(got, oracles.locked_attention(q, k, v, *plain, foreground, 0.7), 1e-5)


ATTENTION_SHAPE_ERRORS = {
    "q-rank-3": ("q", (7, 3, 16)),
    "q-heads": ("q", (2, 7, 5, 16)),
    "q-dim": ("q", (2, 7, 3, 24)),
    "q-batch": ("q", (3, 7, 3, 16)),
    "k-length": ("k", (2, 9, 3, 16)),
    "v-length": ("v", (2, 9, 3, 16)),
    "v-rank-3": ("v", (7, 3, 16)),
    "k_ref-length": ("k_ref", (2, 9, 3, 16)),
    "v_ref-length": ("v_ref", (2, 9, 3, 16)),
    "k_ref-batch": ("k_ref", (3, 7, 3, 16)),
    "v_ref-heads": ("v_ref", (2, 7, 1, 16)),
    "foreground-length": ("foreground", (2, 9)),
    "foreground-batch": ("foreground", (3, 7)),
    "foreground-rank-1": ("foreground", (7,)),
    "foreground-rank-3": ("foreground", (2, 7, 1)),
    "alpha-length": ("alpha", (3,)),
    "alpha-rank-2": ("alpha", (2, 1)),
}


def named_attention_inputs(**changes):
    arguments = dict(zip(("q", "k", "v", "k_ref", "v_ref", "foreground"), attention_inputs(), strict=True))
    return arguments | {"alpha": 0.5} | changes


@pytest.mark.parametrize(("argument", "shape"), ATTENTION_SHAPE_ERRORS.values(), ids=ATTENTION_SHAPE_ERRORS)
def test_locked_attention_quotes_a_wrong_shape(argument, shape):
    given = torch.zeros(shape, dtype=torch.bool if argument == "foreground" else torch.float32)
    with pytest.raises(ValueError, match=quoting(shape)):
        ops.locked_attention(**named_attention_inputs(**{argument: given}))


def test_locked_attention_quotes_the_shape_of_a_wrong_quantised_reference():
    with pytest.raises(ValueError, match=quoting((2, 9, 3, 16))):
        ops.locked_attention(**named_attention_inputs(k_ref=ops.quantize_kv(normal(2, 9, 3, 16), "int8", "k")))


@pytest.mark.parametrize("alpha", [-0.1, 1.5, 7, NAN, INF], ids=str)
def test_locked_attention_refuses_alpha_outside_0_to_1(alpha):
    with pytest.raises(ValueError, match=str(alpha)):
        ops.locked_attention(**named_attention_inputs(alpha=alpha))


@pytest.mark.parametrize("dtype", BAD_MASK_DTYPES, ids=name)
def test_locked_attention_refuses_a_foreground_that_is_not_bool(dtype):
    with pytest.raises(ValueError, match=dtype_id(dtype)):
        ops.locked_attention(**named_attention_inputs(foreground=torch.ones(2, 7, dtype=dtype)))


def test_locked_attention_refuses_integers():
    integers = {argument: torch.ones(2, 7, 3, 16, dtype=torch.int64) for argument in ("q", "k", "v", "k_ref", "v_ref")}
    with pytest.raises(ValueError, match="int64"):
        ops.locked_attention(**named_attention_inputs(**integers))


# cfg_projection and guided_prediction

PREDICTION_SHAPES = {
    "rank-2": (3, 5),
    "rank-3": (2, 7, 4),
    "video": (2, 4, 3, 8, 6),
    "one-sample": (1, 16, 2, 5, 7),
    "one-element": (4, 1),
    "rank-7": (2, 1, 2, 1, 2, 1, 3),
    "long": (2, 40_009),
}


def predictions(shape, dtype=torch.float32, seed=0):
    return normal(*shape, seed=seed + 10, dtype=dtype), normal(*shape, seed=seed + 11, dtype=dtype)


def check_projection(got, cond, uncond, eps=1e-8):
    """Rounding errors scale with |c| |u| / (|u|^2 + eps), whatever cancels in the dot product."""
    assert got.dtype == torch.float32 and got.shape == cond.shape[:1]
    absolute = oracles.cfg_projection(cond.abs(), uncond.abs(), eps)
    assert (abs(oracles.f64(got) - oracles.cfg_projection(cond, uncond, eps)) <= 1e-5 * absolute + 1e-30).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("shape", PREDICTION_SHAPES.values(), ids=PREDICTION_SHAPES)
def test_cfg_projection_matches_fp64(shape, dtype):
    cond, uncond = predictions(shape, dtype)
    check_projection(ops.cfg_projection(cond, uncond), cond, uncond)


@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=5),
    st.integers(0, 99),
    st.sampled_from([1e-8, 1e-3, 1.0]),
    st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
)
@settings(max_examples=3 * EXAMPLES, deadline=None)
def test_cfg_projection_matches_fp64_on_any_shape(shape, seed, eps, magnitude):
    cond, uncond = predictions(shape, seed=seed)
    uncond = uncond * magnitude
    check_projection(ops.cfg_projection(cond, uncond, eps=eps), cond, uncond, eps)


@pytest.mark.parametrize("shape", [(3, 50), (2, 4, 3, 8, 6)], ids=str)
def test_cfg_projection_matches_diffusers(shape):
    guider = pytest.importorskip("diffusers.guiders.classifier_free_zero_star_guidance")
    cond, uncond = predictions(shape)
    want = guider.cfg_zero_star_scale(cond.flatten(1), uncond.flatten(1)).flatten()
    torch.testing.assert_close(ops.cfg_projection(cond, uncond), want, rtol=1e-5, atol=1e-6)


def test_cfg_projection_onto_zero_is_zero():
    cond, uncond = predictions((2, 4, 5))
    uncond[1] = 0
    got = ops.cfg_projection(cond, uncond)
    assert got[1] == 0 and got[0] != 0 and got.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=name)
def test_cfg_projection_sums_in_fp32(dtype):
    """1e5 products of 100 overflow fp16, and 1e5 ones stall a bf16 sum at 256."""
    x = torch.full((2, 100_000), 10.0, dtype=dtype)
    torch.testing.assert_close(ops.cfg_projection(x, x), torch.ones(2), rtol=1e-4, atol=0)


def test_cfg_projection_of_strided_predictions():
    cond, uncond = predictions((2, 6, 4, 5))
    got = ops.cfg_projection(cond.transpose(1, 3).contiguous().transpose(1, 3), every_other(uncond))
    check_projection(got, cond, uncond)


PAIR_ERRORS = {
    "other-shape": ((2, 3, 4), (2, 3, 5), (2, 3, 5)),
    "other-batch": ((2, 3, 4), (1, 3, 4), (1, 3, 4)),
    "other-rank": ((2, 3, 4), (2, 12), (2, 12)),
}


@pytest.mark.parametrize(("cond", "uncond", "quoted"), PAIR_ERRORS.values(), ids=PAIR_ERRORS)
def test_predictions_of_unequal_shape_are_refused(cond, uncond, quoted):
    with pytest.raises(ValueError, match=quoting(quoted)):
        ops.cfg_projection(torch.ones(cond), torch.ones(uncond))
    with pytest.raises(ValueError, match=quoting(quoted)):
        ops.guided_prediction(torch.ones(cond), torch.ones(uncond), 5.0, 1.0)


def test_cfg_projection_refuses_a_vector():
    with pytest.raises(ValueError, match=r"13"):
        ops.cfg_projection(torch.ones(13), torch.ones(13))


def test_predictions_of_integers_are_refused():
    integers = torch.ones(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="int32"):
        ops.cfg_projection(integers, integers)
    with pytest.raises(ValueError, match="int32"):
        ops.guided_prediction(integers, integers, 5.0, 1.0)


OMEGA, S_STAR = torch.tensor([5.0, 0.0, 1.75]), torch.tensor([0.9, 1.0, -0.3])
GUIDANCE = {
    "floats": (5.0, 0.9),
    "per-sample": (OMEGA, S_STAR),
    "omega-per-sample": (OMEGA, 1.0),
    "s_star-per-sample": (7.5, S_STAR),
    "omega-0": (0.0, 0.8),
    "omega-1": (1.0, 0.8),
    "integers": (3, 1),
}


@pytest.mark.parametrize(("omega", "s_star"), GUIDANCE.values(), ids=GUIDANCE)
@pytest.mark.parametrize("shape", [(3, 5), (3, 7, 4), (3, 4, 3, 6, 5)], ids=str)
def test_guided_prediction_matches_fp64(shape, omega, s_star):
    cond, uncond = predictions(shape)
    got = ops.guided_prediction(cond, uncond, omega, s_star)
    want, magnitude = oracles.guided_prediction(cond, uncond, omega, s_star)
    assert got.dtype == torch.float32 and got.shape == cond.shape
    assert (abs(oracles.f64(got) - want) <= 8 * 2**-24 * magnitude + 1e-30).all()


@pytest.mark.parametrize(("omega", "s_star"), GUIDANCE.values(), ids=GUIDANCE)
@pytest.mark.parametrize("dtype", HALVES, ids=name)
def test_guided_prediction_computes_in_fp32_and_rounds_once(dtype, omega, s_star):
    cond, uncond = predictions((3, 4, 3, 6, 5), dtype)
    got = ops.guided_prediction(cond, uncond, omega, s_star)
    want, magnitude = oracles.guided_prediction(cond, uncond, omega, s_star)
    assert got.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 * abs(want) + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    assert (abs(oracles.f64(got) - want) <= rounding + 8 * 2**-24 * magnitude).all()


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=5),
    st.integers(0, 99),
    st.floats(-20, 20, width=32),
    st.floats(-2, 2, width=32),
)
@settings(max_examples=2 * EXAMPLES, deadline=None)
def test_guided_prediction_floats_equal_constant_tensors(shape, seed, omega, s_star):
    cond, uncond = predictions(shape, seed=seed)
    got = ops.guided_prediction(cond, uncond, omega, s_star)
    want, magnitude = oracles.guided_prediction(cond, uncond, omega, s_star)
    assert (abs(oracles.f64(got) - want) <= 8 * 2**-24 * magnitude + 1e-30).all()
    per_sample = (torch.full(shape[:1], value) for value in (omega, s_star))
    torch.testing.assert_close(ops.guided_prediction(cond, uncond, *per_sample), got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("argument", ["omega", "s_star"])
@pytest.mark.parametrize("shape", [(4,), (3, 1)], ids=["length", "rank-2"])
def test_guided_prediction_quotes_a_wrong_scalar_shape(argument, shape):
    cond, uncond = predictions((3, 5))
    scalars = {"omega": 5.0, "s_star": 1.0} | {argument: torch.ones(shape)}
    with pytest.raises(ValueError, match=quoting(shape)):
        ops.guided_prediction(cond, uncond, **scalars)


# windowed_variance

HISTORIES = {
    "two-predictions": (2, 2, 3, 2, 4, 5),
    "full-window": (10, 2, 4, 3, 4, 6),
    "one-sample": (5, 1, 16, 2, 5, 3),
    "one-element": (3, 2, 1, 1, 1, 1),
    "odd": (7, 3, 1, 5, 3, 7),
}


def mask_of(history, shared, seed=3):
    mask = random_mask(1 if shared else history.shape[1], *history.shape[3:], seed=seed)
    mask[:, 0, 0, 0] = True
    return mask


def check_variance(got, history, foreground, reduction="elements"):
    assert got.dtype == torch.float32 and got.shape == history.shape[1:2]
    want = oracles.windowed_variance(history, foreground, reduction)
    # A mean rounded to fp32 shifts each deviation by half an ulp of the values.
    shift = 2**-24 * abs(history[history.isfinite()]).max().item()
    assert (abs(oracles.f64(got) - want) <= 1e-5 * want + 4 * shift * np.sqrt(want) + 4 * shift**2).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("shared", [True, False], ids=["shared-mask", "own-masks"])
@pytest.mark.parametrize("shape", HISTORIES.values(), ids=HISTORIES)
def test_windowed_variance_matches_fp64(shape, shared, dtype):
    history = normal(*shape, dtype=dtype)
    foreground = mask_of(history, shared)
    check_variance(ops.windowed_variance(history, foreground), history, foreground)
    mean = ops.windowed_variance(history, foreground, reduction="mean")
    check_variance(mean, history, foreground, "mean")


def test_the_two_reductions_differ_where_elements_move_apart():
    """Elements that move against each other have a variance; their mean stays where it is."""
    history = normal(6, 2, 1, 1, 1, 1) * torch.tensor([1.0, -1.0])
    foreground = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    assert (ops.windowed_variance(history, foreground) > 0.1).all()
    assert (ops.windowed_variance(history, foreground, reduction="mean") < 1e-12).all()


def test_windowed_variance_refuses_another_reduction():
    with pytest.raises(ValueError, match="reduction must be one of elements, mean, got 'sum'"):
        ops.windowed_variance(normal(4, 2, 3, 2, 4, 5), torch.ones(1, 2, 4, 5, dtype=torch.bool), reduction="sum")


@given(
    st.integers(2, 10),
    st.lists(st.integers(1, 4), min_size=5, max_size=5),
    st.booleans(),
    st.integers(0, 99),
    st.sampled_from([1e-3, 1.0, 100.0]),
)
@settings(max_examples=3 * EXAMPLES, deadline=None)
def test_windowed_variance_matches_fp64_on_any_shape(n, shape, shared, seed, spread):
    history = normal(n, *shape, seed=seed) * spread
    foreground = mask_of(history, shared, seed)
    check_variance(ops.windowed_variance(history, foreground), history, foreground)


def test_windowed_variance_does_not_depend_on_mask_area():
    """Every element carries the same series, so one foreground token and all of them must agree."""
    history = normal(6, 1, 1, 1, 1, 1).expand(6, 2, 3, 2, 4, 5)
    one, whole = torch.zeros(2, 1, 2, 4, 5, dtype=torch.bool).unbind(0)
    one[0, 1, 2, 3], whole = True, ~whole
    torch.testing.assert_close(ops.windowed_variance(history, one), ops.windowed_variance(history, whole))


def test_windowed_variance_survives_a_large_offset():
    history = 1e3 + 1e-2 * normal(10, 2, 4, 2, 6, 5)
    foreground = mask_of(history, shared=False)
    got = oracles.f64(ops.windowed_variance(history, foreground))
    np.testing.assert_allclose(got, oracles.windowed_variance(history, foreground), rtol=1e-3)


def test_a_constant_history_has_no_variance():
    history = normal(1, 2, 3, 2, 4, 5).expand(8, -1, -1, -1, -1, -1)
    assert (ops.windowed_variance(history, torch.ones(1, 2, 4, 5, dtype=torch.bool)) < 1e-12).all()


@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared-mask", "own-masks"])
def test_windowed_variance_never_reads_the_background(shared, bad):
    history = normal(5, 2, 3, 2, 4, 5)
    foreground = mask_of(history, shared)
    history = history.masked_fill(~foreground[None, :, None], bad)
    check_variance(ops.windowed_variance(history, foreground), history, foreground)
    mean = ops.windowed_variance(history, foreground, reduction="mean")
    check_variance(mean, history, foreground, "mean")


def test_windowed_variance_of_a_strided_history():
    history = normal(5, 2, 3, 2, 4, 5)
    foreground = mask_of(history, shared=False)
    strided = history.permute(5, 1, 4, 0, 3, 2).contiguous().permute(3, 1, 5, 4, 2, 0)
    check_variance(ops.windowed_variance(strided, foreground), history, foreground)


@pytest.mark.parametrize("n", [0, 1])
def test_windowed_variance_refuses_fewer_than_two_predictions(n):
    with pytest.raises(ValueError, match=str(n)):
        ops.windowed_variance(torch.ones(n, 2, 3, 2, 4, 5), torch.ones(1, 2, 4, 5, dtype=torch.bool))


@pytest.mark.parametrize("reduction", ["elements", "mean"])
@pytest.mark.parametrize("shape", [(1, 2, 4, 5), (2, 2, 4, 5)], ids=["shared", "one-sample-empty"])
def test_windowed_variance_refuses_an_empty_mask(shape, reduction):
    foreground = torch.ones(shape, dtype=torch.bool)
    foreground[-1] = False
    with pytest.raises(ValueError, match=r"(?i)foreground|mask"):
        ops.windowed_variance(normal(4, 2, 3, 2, 4, 5), foreground, reduction=reduction)


@pytest.mark.parametrize("shape", [(2, 4, 5), (3, 2, 4, 5), (2, 2, 4, 9), (1, 1, 2, 4, 5)], ids=str)
def test_windowed_variance_quotes_a_wrong_mask_shape(shape):
    with pytest.raises(ValueError, match=quoting(shape)):
        ops.windowed_variance(normal(4, 2, 3, 2, 4, 5), torch.ones(shape, dtype=torch.bool))


def test_windowed_variance_quotes_a_wrong_history_shape():
    with pytest.raises(ValueError, match=quoting((4, 3, 2, 4, 5))):
        ops.windowed_variance(normal(4, 3, 2, 4, 5), torch.ones(1, 2, 4, 5, dtype=torch.bool))


@pytest.mark.parametrize("dtype", BAD_MASK_DTYPES, ids=name)
def test_windowed_variance_refuses_a_mask_that_is_not_bool(dtype):
    with pytest.raises(ValueError, match=dtype_id(dtype)):
        ops.windowed_variance(normal(4, 2, 3, 2, 4, 5), torch.ones(1, 2, 4, 5, dtype=dtype))


# quantize_kv

SQNR_DB = {"native": math.inf, "bf16": 48.0, "fp8_e4m3": 29.0, "int8": 36.0, "int4": 15.0}
BYTES_OF_BF16 = {"bf16": 1.0, "fp8_e4m3": 0.60, "int8": 0.60, "int4": 0.42}
# Half a step of each format, relative to the largest magnitude anywhere, with room for a half-precision scale.
WORST_STEP = {"native": 0.0, "bf16": 2**-8, "fp8_e4m3": 2**-4, "int8": 1 / 254 + 2**-8, "int4": 1 / 14 + 2**-8}
LOSSY = ("fp8_e4m3", "int8", "int4")
formats = pytest.mark.parametrize("format", SQNR_DB)
kinds = pytest.mark.parametrize("kind", ["k", "v"])

KV_SHAPES = {
    "aligned": (1, 128, 2, 64),
    "prime-131": (2, 131, 3, 32),
    "block-plus-one": (1, 129, 1, 128),
    "one-token": (2, 1, 2, 64),
    "short": (1, 5, 3, 16),
    "dim-40": (1, 67, 2, 40),
    "odd-dim": (2, 33, 2, 33),
    "tiny-odd-dim": (1, 17, 1, 7),
}


@formats
@kinds
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("shape", KV_SHAPES.values(), ids=KV_SHAPES)
def test_quantised_normal_data_keeps_its_signal(shape, dtype, kind, format):
    x = normal(*shape, dtype=dtype)
    cache = ops.quantize_kv(x, format, kind)
    assert type(cache).__name__ == "QuantizedKV"
    for out in FLOATS:
        assert cache.dequantize(out).dtype == out
        assert cache.dequantize(out).shape == x.shape
    # Fewer than a thousand values are too few for the decibels of a distribution.
    floor = SQNR_DB[format] - (0 if x.numel() >= 1000 else 2)
    assert oracles.sqnr_db(x, cache.dequantize(torch.float32)) >= floor


def bits(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@kinds
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_native_is_lossless_to_the_bit(dtype, kind):
    x = normal(2, 13, 3, 17, dtype=dtype)
    x[0, 0, 0, :5] = torch.tensor([NAN, INF, -INF, -0.0, 1e-40])
    cache = ops.quantize_kv(x, "native", kind)
    assert torch.equal(bits(cache.dequantize(dtype)), bits(x))
    assert cache.nbytes == x.numel() * x.element_size()


@kinds
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_bf16_is_one_rounding_and_two_bytes(dtype, kind):
    x = normal(2, 13, 3, 17, dtype=dtype)
    cache = ops.quantize_kv(x, "bf16", kind)
    assert torch.equal(cache.dequantize(torch.float32), x.bfloat16().float())
    assert cache.nbytes == 2 * x.numel()


def test_the_default_is_fp8_of_keys():
    x = normal(1, 33, 2, 32)
    default, named = ops.quantize_kv(x), ops.quantize_kv(x, format="fp8_e4m3", kind="k")
    assert torch.equal(default.dequantize(torch.float32), named.dequantize(torch.float32))
    assert default.nbytes == named.nbytes


def stored_bytes(cache):
    if dataclasses.is_dataclass(cache):
        values = [getattr(cache, field.name) for field in dataclasses.fields(cache)]
    else:
        values = vars(cache).values()
    return sum(value.untyped_storage().nbytes() for value in values if isinstance(value, torch.Tensor))


@kinds
@pytest.mark.parametrize("format", BYTES_OF_BF16)
@pytest.mark.parametrize("dim", [32, 33, 40, 64, 128])
@pytest.mark.parametrize("tokens", [128, 129, 131, 257, 509])
def test_nbytes_counts_everything_and_stays_under_its_share_of_bf16(tokens, dim, format, kind):
    x = normal(1, tokens, 2, dim)
    cache = ops.quantize_kv(x, format, kind)
    payload = {"bf16": 2.0, "int4": 0.5}.get(format, 1.0) * x.numel()
    assert isinstance(cache.nbytes, int)
    assert payload <= cache.nbytes <= BYTES_OF_BF16[format] * 2 * x.numel()
    assert stored_bytes(cache) == cache.nbytes


@given(
    st.sampled_from(sorted(SQNR_DB)),
    st.sampled_from("kv"),
    st.sampled_from(FLOATS),
    st.integers(0, 99),
    st.tuples(st.integers(1, 2), st.integers(1, 140), st.integers(1, 3), st.integers(1, 70)),
    st.sampled_from([1e-3, 1.0, 50.0, 2000.0]),
)
@settings(max_examples=6 * EXAMPLES, deadline=None)
def test_no_element_is_off_by_more_than_half_a_step_of_the_largest(format, kind, dtype, seed, shape, magnitude):
    x = (normal(*shape, seed=seed).clamp(-5, 5) * magnitude).to(dtype)
    error = abs(oracles.f64(x) - oracles.f64(ops.quantize_kv(x, format, kind).dequantize(torch.float32)))
    assert error.max() <= WORST_STEP[format] * abs(oracles.f64(x)).max() * (1 + 1e-3)


@kinds
@pytest.mark.parametrize("format", LOSSY)
@pytest.mark.parametrize("magnitude", [1e-4, 1e-2, 100.0, 2000.0], ids=str)
def test_the_signal_survives_at_any_magnitude(magnitude, format, kind):
    x = normal(1, 131, 2, 64).clamp(-5, 5) * magnitude
    assert oracles.sqnr_db(x, ops.quantize_kv(x, format, kind).dequantize(torch.float32)) >= SQNR_DB[format]


@formats
@kinds
def test_zeros_stay_zeros(format, kind):
    x = torch.zeros(2, 33, 2, 40)
    assert (ops.quantize_kv(x, format, kind).dequantize(torch.float32) == 0).all()
    x[1] = normal(33, 2, 40)
    assert (ops.quantize_kv(x, format, kind).dequantize(torch.float32)[0] == 0).all()


@pytest.mark.parametrize(
    ("format", "kind"),
    [(format, kind) for format in SQNR_DB for kind in "kv" if (format, kind) != ("int4", "k")],
)
def test_a_zero_token_stays_zero_among_others(format, kind):
    """Not so for int4 keys: a step shared by many tokens need not have a code for zero."""
    x = normal(1, 33, 2, 40)
    x[:, 7] = 0
    assert (ops.quantize_kv(x, format, kind).dequantize(torch.float32)[:, 7] == 0).all()


@formats
@kinds
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("constant", [1.0, -0.03, 1e4, -1e4], ids=str)
def test_a_constant_is_kept(constant, dtype, kind, format):
    x = torch.full((1, 131, 2, 32), constant, dtype=dtype)
    got = ops.quantize_kv(x, format, kind).dequantize(torch.float32)
    torch.testing.assert_close(got, x.float(), rtol=1e-2, atol=0)


@formats
@kinds
def test_an_offset_with_small_noise_stays_finite_and_close(format, kind):
    x = 1e4 + normal(1, 131, 2, 64)
    got = ops.quantize_kv(x, format, kind).dequantize(torch.float32)
    assert got.isfinite().all() and oracles.sqnr_db(x, got) >= SQNR_DB[format]


@pytest.mark.parametrize(("format", "kind"), [("fp8_e4m3", "k"), ("fp8_e4m3", "v"), ("int8", "v"), ("int4", "v")])
@pytest.mark.parametrize("size", [1e3, 1e5], ids=str)
def test_an_outlier_token_does_not_spoil_the_others(size, format, kind):
    x, others = normal(1, 131, 2, 64), torch.arange(131) != 57
    x[:, 57] *= size
    got = ops.quantize_kv(x, format, kind).dequantize(torch.float32)
    assert oracles.sqnr_db(x[:, others], got[:, others]) >= SQNR_DB[format]
    assert oracles.sqnr_db(x[:, ~others], got[:, ~others]) >= SQNR_DB[format] - 3


def test_an_outlier_head_does_not_spoil_the_others():
    x = normal(1, 131, 3, 64)
    x[:, :, 1] *= 1000.0
    for format in LOSSY:
        for kind in "kv":
            got = ops.quantize_kv(x, format, kind).dequantize(torch.float32)
            assert oracles.sqnr_db(x[:, :, ::2], got[:, :, ::2]) >= SQNR_DB[format], (format, kind)


@pytest.mark.parametrize("size", [10.0, 100.0], ids=str)
def test_outlier_channels_of_int4_keys_do_not_spoil_the_others(size):
    x = normal(1, 256, 2, 64)
    x[..., [5, 40]] *= size
    others = torch.ones(64, dtype=torch.bool)
    others[[5, 40]] = False
    got = ops.quantize_kv(x, "int4", "k").dequantize(torch.float32)
    assert oracles.sqnr_db(x[..., others], got[..., others]) >= SQNR_DB["int4"]


@formats
@kinds
def test_an_empty_cache(format, kind):
    cache = ops.quantize_kv(torch.empty(2, 0, 3, 40), format, kind)
    assert cache.dequantize(torch.bfloat16).shape == (2, 0, 3, 40)
    assert cache.nbytes == 0


@formats
@kinds
def test_quantising_a_strided_tensor(format, kind):
    x = normal(2, 33, 3, 40)
    want = ops.quantize_kv(x, format, kind).dequantize(torch.float32)
    for layout in (heads_first, every_other):
        assert torch.equal(ops.quantize_kv(layout(x), format, kind).dequantize(torch.float32), want)


@pytest.mark.parametrize("format", ["fp4", "FP8_E4M3", ""], ids=repr)
def test_an_unknown_format_is_quoted(format):
    with pytest.raises(ValueError, match=f"['\"]{format}['\"]"):
        ops.quantize_kv(normal(1, 4, 1, 8), format, "k")


@pytest.mark.parametrize("kind", ["q", "kv", "K"])
def test_an_unknown_kind_is_quoted(kind):
    with pytest.raises(ValueError, match=f"['\"]{kind}['\"]"):
        ops.quantize_kv(normal(1, 4, 1, 8), "int8", kind)


@pytest.mark.parametrize("shape", [(4, 3, 8), (1, 2, 4, 3, 8)], ids=["rank-3", "rank-5"])
def test_quantize_kv_quotes_a_wrong_shape(shape):
    with pytest.raises(ValueError, match=quoting(shape)):
        ops.quantize_kv(torch.ones(shape), "int8", "k")


def test_quantize_kv_refuses_integers():
    with pytest.raises(ValueError, match="int64"):
        ops.quantize_kv(torch.ones(1, 4, 3, 8, dtype=torch.int64), "int8", "k")


# Every op: purity, backends, torch.compile


def calls():
    """One ordinary call of each op: function, positional arguments."""
    history = normal(4, 2, 3, 2, 4, 5)
    calls = {
        "token_mask": (ops.token_mask, (random_mask(2, 5, 16, 32, share=0.01),)),
        "locked_attention": (ops.locked_attention, (*attention_inputs(keys=33), 0.3)),
        "locked_attention-alpha-1": (ops.locked_attention, (*attention_inputs(keys=33, fg_batch=1), 1.0)),
        "locked_attention-alpha-tensor": (
            ops.locked_attention,
            (*attention_inputs(keys=33, ref_batch=1), torch.tensor([0.2, 1.0])),
        ),
        "cfg_projection": (ops.cfg_projection, predictions((2, 4, 3, 6, 5))),
        "guided_prediction": (ops.guided_prediction, (*predictions((2, 4, 3, 6, 5)), 5.0, 0.9)),
        "guided_prediction-tensors": (
            ops.guided_prediction,
            (*predictions((2, 4, 3, 6, 5)), OMEGA[:2], S_STAR[:2]),
        ),
        "windowed_variance": (ops.windowed_variance, (history, mask_of(history, shared=True))),
    }
    for format in SQNR_DB:
        calls[f"quantize_kv-{format}"] = (ops.quantize_kv, (normal(2, 33, 3, 40), format, "v"))
    return calls


CALLS = calls()
every_op = pytest.mark.parametrize(("op", "arguments"), CALLS.values(), ids=CALLS)


def plain(result):
    return result if isinstance(result, torch.Tensor) else result.dequantize(torch.float32)


@every_op
def test_auto_and_reference_agree(op, arguments):
    want = plain(op(*arguments))
    assert torch.equal(plain(op(*arguments, backend="auto")), want)
    torch.testing.assert_close(plain(op(*arguments, backend="reference")), want, rtol=1e-6, atol=1e-6)


@every_op
def test_an_unknown_backend_is_quoted(op, arguments):
    with pytest.raises(ValueError, match="abacus"):
        op(*arguments, backend="abacus")


@every_op
def test_arguments_are_left_alone(op, arguments):
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    op(*arguments)
    for x, y in zip(arguments, before, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@every_op
def test_compiled_equals_eager(op, arguments):
    def doubled(*arguments):
        return 2 * plain(op(*arguments))

    torch.compiler.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), doubled(*arguments), rtol=1e-6, atol=1e-6)


def reversed_strides(x):
    """The same values, stored with the dimensions after the first in reverse order."""
    order = [0, *range(x.ndim - 1, 0, -1)]
    return x.permute(order).contiguous().permute(order)


@every_op
@pytest.mark.parametrize("strided", ["none", "first", "rest", "all"])
def test_fake_tensors_predict_the_layout_of_the_result(op, arguments, strided):
    """torch.compile's default backend trusts the strides it was told, and stops where the real ones differ."""
    chosen = {"none": (), "first": (0,), "rest": range(1, len(arguments)), "all": range(len(arguments))}[strided]
    real = [reversed_strides(x) if i in chosen and isinstance(x, torch.Tensor) else x for i, x in enumerate(arguments)]
    want = plain(op(*real))
    with FakeTensorMode() as mode:
        fake = plain(op(*[mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in real]))
    assert (fake.dtype, fake.shape, fake.stride()) == (want.dtype, want.shape, want.stride())


def test_the_package_offers_ops_by_name():
    import kvlock_fast as kvf

    assert kvf.ops is ops


@pytest.mark.parametrize("format", ["fp8_e4m3", "int8", "int4"])
def test_nan_in_the_input_stays_visible(format):
    x = torch.randn(1, 70, 2, 32)
    x[0, 3, 1, 5] = float("nan")
    values = ops.quantize_kv(x, format, "v").dequantize()
    assert values[0, 3, 1, 5].isnan() and values[0, 4:].isfinite().all()
