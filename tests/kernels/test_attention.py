"""Attention's and locked attention's kernels (interpreted without a GPU) against fp64 oracles."""

import itertools
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlock_fast import ops
from kvlock_fast.kernels.attention import attention_reference, launch_attention, launch_merge, plan_splits
from kvlock_fast.kernels.attention_fp8 import attention_fp8_reference, launch_attention_fp8
from kvlock_fast.kernels.fused_attention import launch_fused_attention
from kvlock_fast.kernels.language import HAS_TRITON
from kvlock_fast.kernels.launch import architecture, recorded_launches
from kvlock_fast.kernels.locked_attention import choose_route, launch_blend_kv
from kvlock_fast.kernels.packed import packed_arguments
from tests.support import oracles

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

EXAMPLES = settings().max_examples
NAN, INF = float("nan"), float("inf")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DIMS = (8, 32, 40, 64, 72, 96, 128)
SPLITS = (1, 2, 5, None)
dims = pytest.mark.parametrize("dim", DIMS, ids=lambda d: f"dim-{d}")
dtypes = pytest.mark.parametrize("dtype", (FP32, FP16, BF16), ids=lambda d: str(d).removeprefix("torch."))
two_dtypes = pytest.mark.parametrize("dtype", (FP32, FP16), ids=lambda d: str(d).removeprefix("torch."))
splits_ = pytest.mark.parametrize("splits", SPLITS, ids=lambda n: f"splits-{n}")
pointers_or_tma = pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
bad_values = pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, seed=0, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def random_mask(*shape, seed=0, share=0.4):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share).to(DEVICE)


def qkv(batch=1, queries=5, keys=5, heads=1, dim=16, dtype=FP32):
    return tuple(normal(batch, n, heads, dim, seed=i, dtype=dtype) for i, n in enumerate((queries, keys, keys)))


def bits(x):
    return x.contiguous().view(torch.uint8)


def in_fused_qkv(x):
    return torch.stack([torch.full_like(x, NAN), x, torch.full_like(x, NAN)], 2)[:, :, 1]


def heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def amid_others(x):
    """A slice of a longer sequence of a larger batch."""
    batch, tokens = x.shape[:2]
    around = x.new_full((batch + 2, tokens + 70, *x.shape[2:]), NAN)
    around[1 : batch + 1, 3 : tokens + 3] = x
    return around[1 : batch + 1, 3 : tokens + 3]


def gaps_between_channels(x):
    return torch.stack([x, torch.full_like(x, NAN)], -1)[..., 0]


LAYOUTS = {f.__name__: f for f in (in_fused_qkv, heads_first, amid_others)}
ALL_LAYOUTS = LAYOUTS | {"gaps_between_channels": gaps_between_channels}


# attention


def check_attention(got, q, k, v, scale=None):
    assert got.dtype == q.dtype and got.shape == q.shape and got.is_contiguous()
    eager, truth = oracles.eager_attention(q, k, v, scale), oracles.attention(q, k, v, scale)
    summed = abs(oracles.f64(v)).max(initial=0)
    if q.dtype == torch.float32:  # a weight is off by its exponent's rounding, which is that of the score
        scores = np.einsum("bqhd,bkhd->bhqk", oracles.f64(q), oracles.f64(k)) * (scale or q.shape[3] ** -0.5)
        summed *= 1 + 4 * abs(scores).max(initial=0)
    oracles.check_as_good_as_eager(got, eager, truth, summed)


LENGTHS = {
    "one": (1, 1),
    "one-query": (1, 129),
    "block-minus-one": (63, 127),
    "two-blocks": (64, 128),
    "prime": (67, 131),
}
lengths = pytest.mark.parametrize(("queries", "keys"), LENGTHS.values(), ids=LENGTHS)


@dims
@lengths
def test_attention_matches_fp64(queries, keys, dim):
    q, k, v = qkv(queries=queries, keys=keys, dim=dim)
    check_attention(launch_attention(q, k, v, dim**-0.5), q, k, v)


@splits_
@pointers_or_tma
@two_dtypes
def test_attention_with_split_keys(dtype, tma, splits):
    q, k, v = qkv(queries=5, keys=307, heads=2, dim=32, dtype=dtype)
    with recorded_launches() as launches:
        got = launch_attention(q, k, v, 0.25, splits=splits, tma=tma)
    names = [launch.name for launch in launches]
    assert names == (["_attention_kernel", "_merge_kernel"] if splits in (2, 5) else ["_attention_kernel"])
    check_attention(got, q, k, v, 0.25)


@dtypes
@pointers_or_tma
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_attention_reads_views_in_place(layout, tma, dtype):
    q, k, v = qkv(batch=2, queries=9, keys=70, heads=2, dim=40, dtype=dtype)
    q_, k_, v_ = (layout(x) for x in (q, k, v))
    assert not k_.is_contiguous()
    check_attention(launch_attention(q_, k_, v_, 40**-0.5, tma=tma), q, k, v)


@pointers_or_tma
def test_attention_of_samples_that_share_keys(tma):
    q, k, v = qkv(batch=2, queries=9, keys=33, heads=2, dim=8)
    k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
    check_attention(launch_attention(q, k, v, 0.5, tma=tma), q, k, v, 0.5)


@splits_
@dtypes
def test_very_large_scores_lose_only_their_own_rounding(dtype, splits):
    """Whole numbers, whose sums are exact: what is left is fp32's rounding of a score times log2(e)."""
    q, k, v = qkv(queries=7, keys=307, dim=32, dtype=dtype)
    q, k = (100 * q).round(), k.round()
    got = launch_attention(q, k, v, 1.0, splits=splits)
    truth, largest = oracles.attention(q, k, v, 1.0), abs(oracles.f64(q)[0, :, 0] @ oracles.f64(k)[0, :, 0].T).max()
    assert largest > 1000
    tolerance = torch.finfo(dtype).eps + 2 * largest * 2**-23
    np.testing.assert_allclose(oracles.f64(got), truth, rtol=0, atol=tolerance * abs(truth).max())


@splits_
def test_equal_keys_give_the_mean_of_the_values(splits):
    q, k, v = qkv(queries=3, keys=307, dim=32)
    got = launch_attention(q, k[:, :1].expand_as(k), v, 1.0, splits=splits)
    np.testing.assert_allclose(oracles.f64(got), oracles.f64(v).mean(1, keepdims=True).repeat(3, 1), atol=1e-6)


@dtypes
def test_one_key_gives_its_value(dtype):
    q, k, v = qkv(queries=66, keys=1, heads=2, dim=40, dtype=dtype)
    assert torch.equal(bits(launch_attention(q, k, v, 0.1)), bits(v.expand_as(q)))


@splits_
@bad_values
def test_a_bad_query_spoils_its_own_row_only(bad, splits):
    q, k, v = qkv(queries=20, keys=307, dim=32)
    want = launch_attention(q, k, v, 1.0, splits=splits)
    q[0, 7, 0, 3] = bad
    got = launch_attention(q, k, v, 1.0, splits=splits)
    others = torch.arange(20, device=DEVICE) != 7
    assert torch.equal(bits(got[:, others]), bits(want[:, others])) and got[:, ~others].isnan().all()


@splits_
@pytest.mark.parametrize("which", ["key", "value"])
def test_a_bad_key_or_value_stays_visible(which, splits):
    q, k, v = qkv(queries=3, keys=307, dim=32)
    (k if which == "key" else v)[0, 100, 0, 5] = NAN
    got = launch_attention(q, k, v, 1.0, splits=splits)
    assert (got.isnan().all() if which == "key" else got[..., 5].isnan().all()) and got[..., 5].isnan().all()


@given(
    st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 200), st.integers(1, 2), st.integers(1, 128)),
    st.sampled_from((FP32, FP16, BF16)),
    st.sampled_from(SPLITS),
    st.sampled_from([0.01, 0.3, 1.0]),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_attention_matches_fp64_on_any_shape(shape, dtype, splits, scale):
    q, k, v = qkv(*shape, dtype=dtype)
    check_attention(launch_attention(q, k, v, scale, splits=splits), q, k, v, scale)


@pytest.mark.parametrize("parts", [1, 7, 33])
@pytest.mark.parametrize("spread", [1.0, 1e4], ids=str)
@two_dtypes
def test_merge_weighs_the_parts_by_their_sums(dtype, spread, parts):
    partial, lse = normal(parts, 4, 19, 40), normal(parts, 4, 19, seed=1) * spread
    out = torch.empty(2, 19, 2, 40, dtype=dtype, device=DEVICE)
    launch_merge(partial, lse, out)
    weights = np.exp2(oracles.f64(lse) - oracles.f64(lse).max(0))
    merged = (weights[..., None] * oracles.f64(partial)).sum(0) / weights.sum(0)[..., None]
    want = merged.reshape(2, 2, 19, 40).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(oracles.f64(out), want, rtol=torch.finfo(dtype).eps / 2, atol=2e-6)


@given(st.integers(1, 5000), st.sampled_from([16, 64, 128]), st.one_of(st.none(), st.integers(0, 40)))
@settings(max_examples=4 * EXAMPLES, deadline=None)
def test_splits_cover_every_key_once(tokens, block, wanted):
    q = torch.empty(1, 1, 2, 64, device="meta")
    for arch in (None, 90):
        with recorded_launches(arch):
            splits, share = plan_splits(q, 128, block, tokens, wanted)
        assert share % block == 0 and splits >= 1 and (splits - 1) * share < tokens <= splits * share
        assert splits <= max(1, wanted if wanted is not None else 32)


# what is launched on a GPU


def dry(arch, launcher, *arguments, **options):
    with recorded_launches(dry_run_for=arch) as launches:
        launcher(*arguments, **options)
    return launches


def test_few_queries_are_split_over_the_gpu():
    k = torch.empty(1, 62_000, 9, 128, dtype=BF16, device="meta")
    first, merge = dry(90, launch_attention, k[:, :200], k, k, 1.0)
    assert first.grid[:2] == (2, 9) and 100 <= math.prod(first.grid) <= 264 and merge.name == "_merge_kernel"
    (whole,) = dry(90, launch_attention, k, k, k, 1.0)
    assert whole.grid[2] == 1


TMA = {
    "contiguous": (lambda x: x, True),
    "fused-qkv": (lambda x: torch.cat([x, x, x], 3)[..., 64:128], True),
    "transposed": (heads_first, True),
    "odd-start": (lambda x: torch.cat([x, x], 3)[..., 1:65], False),
    "odd-row": (lambda x: torch.cat([x, x[..., :3]], 3)[..., :64], False),
    "fp32": (lambda x: x.float(), False),
}


@pytest.mark.parametrize(("layout", "fits"), TMA.values(), ids=TMA)
def test_tensor_descriptors_only_where_the_strides_allow_them(layout, fits):
    x = torch.zeros(1, 200, 2, 64, dtype=FP16, device=DEVICE)
    y = layout(x)
    assert y.shape == x.shape
    others = x.to(y.dtype)
    for chosen in ((y, others, others), (others, y, others), (others, others, y)):
        assert dry(90, launch_attention, *chosen, 1.0)[0].arguments["TMA"] == fits
        assert not dry(89, launch_attention, *chosen, 1.0)[0].arguments["TMA"]


def test_fp8_attention_is_refused_where_the_gpu_has_none():
    operands = fp8_operands(*qkv(keys=20))
    with recorded_launches(dry_run_for=86), pytest.raises(ValueError, match=r"8\.6"):
        launch_attention_fp8(*operands, 1.0, FP16)


ROUTE_CHOICES = {
    "few-queries": (100, 30_000, 128, "fused"),
    "short": (900, 900, 128, "fused"),
    "long": (2000, 2000, 128, "triton"),
    "wide-heads": (2000, 2000, 256, "sdpa"),
}


@pytest.mark.parametrize(("queries", "keys", "dim", "route"), ROUTE_CHOICES.values(), ids=ROUTE_CHOICES)
def test_the_route_goes_by_the_shape(queries, keys, dim, route):
    q, k = (torch.empty(1, n, 2, dim, device="meta") for n in (queries, keys))
    assert choose_route(q, k, only_ours=False) == route


# fp8 attention


def fp8_codes(x, slack=1.0):
    """Codes [B, S, H, D] and scales [B, H, ceil(S / 128)], the blocks one by one."""
    batch, tokens, heads, _ = x.shape
    scale = torch.empty(batch, heads, -(-tokens // 128), device=x.device)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    for i in range(scale.shape[2]):
        block = slice(128 * i, 128 * (i + 1))
        amax = x[:, block].abs().amax((1, 3))
        scale[..., i] = torch.where(amax == 0, 1.0, slack * amax / 448)
        codes[:, block] = (x[:, block] / scale[:, None, :, i, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale


def fp8_operands(q, k, v, slack=1.0):
    """As `launch_attention_fp8` takes them."""
    (q, q_scale), (k, k_scale), (v, v_scale) = (fp8_codes(x, slack) for x in (q, k, v))
    v_t = torch.zeros((*v.shape[2:], -(-v.shape[1] // 16) * 16), dtype=torch.uint8, device=v.device)
    v_t = v_t.expand(v.shape[0], *v_t.shape).clone()
    v_t[..., : v.shape[1]] = v.view(torch.uint8).permute(0, 2, 3, 1)
    return q, q_scale, k, k_scale, v_t.view(torch.float8_e4m3fn), v_scale


def decoded(operands):
    q, q_scale, k, k_scale, v_t, v_scale = operands

    def decode(codes, scale):
        by_token = scale.double().repeat_interleave(128, 2)[..., : codes.shape[1]].transpose(1, 2)
        return codes.double() * by_token[..., None]

    v = v_t.view(torch.uint8)[..., : k.shape[1]].permute(0, 3, 1, 2).contiguous().view(torch.float8_e4m3fn)
    return decode(q, q_scale), decode(k, k_scale), decode(v, v_scale)


def check_fp8(got, operands, scale):
    q, k, v = decoded(operands)
    truth = torch.from_numpy(oracles.attention(q, k, v, scale))
    if truth.numel() >= 1024:
        assert oracles.sqnr_db(truth, got) >= 30
    # Of few numbers the error may be all there can be: each weight rounded by 2^-4, whatever their values' signs.
    assert (abs(oracles.f64(got) - truth.numpy()) <= 2**-4 * oracles.attention(q, k, abs(v), scale) + 1e-5).all()
    assert oracles.sqnr_db(truth, attention_fp8_reference(*operands, scale)) >= 100


@dims
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 129), (131, 67)], ids=str)
def test_fp8_attention_matches_fp64_of_its_operands(queries, keys, dim):
    operands = fp8_operands(*qkv(queries=queries, keys=keys, dim=dim))
    got = launch_attention_fp8(*operands, dim**-0.5, FP16)
    assert got.dtype == FP16 and got.shape == (1, queries, 1, dim) and got.is_contiguous()
    check_fp8(got, operands, dim**-0.5)


@dims
def test_fp8_attention_keeps_the_signal_of_normal_data(dim):
    q, k, v = qkv(queries=64, keys=256, heads=2, dim=dim)
    got = launch_attention_fp8(*fp8_operands(q, k, v), dim**-0.5, FP32)
    # A score of 8 products keeps more of their rounding.
    assert oracles.sqnr_db(torch.from_numpy(oracles.attention(q, k, v)), got) >= (25 if dim > 8 else 20)


@splits_
@pointers_or_tma
def test_fp8_attention_with_split_keys(tma, splits):
    operands = fp8_operands(*qkv(queries=5, keys=307, heads=2, dim=32))
    with recorded_launches() as launches:
        got = launch_attention_fp8(*operands, 0.25, BF16, splits=splits, tma=tma)
    assert got.dtype == BF16 and len(launches) == (2 if splits in (2, 5) else 1)
    check_fp8(got, operands, 0.25)


@pointers_or_tma
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_fp8_attention_reads_views_in_place(layout, tma):
    operands = q, q_scale, k, k_scale, v_t, v_scale = fp8_operands(*qkv(batch=2, queries=9, keys=70, heads=2, dim=32))
    q_, k_ = (layout(x.float()).to(torch.float8_e4m3fn) for x in (q, k))
    around = torch.full((3, 2, 40, 96), NAN, device=DEVICE).to(torch.float8_e4m3fn)
    v_ = around.view(torch.uint8)[1:, :, 4:36, :80].copy_(v_t.view(torch.uint8)).view(torch.float8_e4m3fn)
    got = launch_attention_fp8(q_, q_scale, k_, k_scale, v_, v_scale, 0.2, FP32, tma=tma)
    assert torch.equal(bits(got), bits(launch_attention_fp8(*operands, 0.2, FP32, tma=tma)))


@pytest.mark.parametrize("slack", [1.0, 8.0], ids=["tight-scales", "loose-scales"])
@pytest.mark.parametrize("splits", [1, 5])
def test_every_block_has_its_own_fp8_scale(splits, slack):
    q, k, v = qkv(queries=131, keys=270, dim=32)
    q[:, 128:], k[:, :128], k[:, 256:], v[:, 128:256], v[:, 256:] = 9 * q[:, 128:], 7, 0.01, 1000 * v[:, 128:256], 30
    k[:, :128] += normal(1, 128, 1, 32, seed=5)
    operands = fp8_operands(q / 10, k, v, slack)
    check_fp8(launch_attention_fp8(*operands, 1.0, FP32, splits=splits), operands, 1.0)


def test_a_score_of_many_equal_keys_does_not_underflow():
    """One key ahead of 4000 others, which together weigh as much: each probability is 2^-12 of the largest."""
    q, k, v = torch.zeros(3, 1, 4001, 1, 32, device=DEVICE)
    q, k[:, 17], v[:] = torch.ones_like(q[:, :2]), 12 * math.log(2) / 32, 1
    v[:, 17] = 3
    operands = fp8_operands(q, k, v)
    check_fp8(launch_attention_fp8(*operands, 1.0, FP32), operands, 1.0)


@given(
    st.tuples(st.integers(1, 2), st.integers(1, 140), st.integers(1, 200), st.integers(1, 2), st.integers(1, 128)),
    st.sampled_from(SPLITS),
)
@settings(max_examples=EXAMPLES // 2, deadline=None)
def test_fp8_attention_keeps_its_signal_on_any_shape(shape, splits):
    operands = fp8_operands(*qkv(*shape))
    check_fp8(launch_attention_fp8(*operands, shape[4] ** -0.5, FP32, splits=splits), operands, shape[4] ** -0.5)


# blended keys and values


def locked_inputs(batch=1, queries=5, keys=5, heads=1, dim=16, ref_batch=None, fg_batch=None, dtype=FP32, share=0.4):
    """q, k, v, k_ref, v_ref, foreground."""
    k_ref, v_ref = (normal(ref_batch or batch, keys, heads, dim, seed=i, dtype=dtype) for i in (3, 4))
    foreground = random_mask(fg_batch or batch, keys, seed=5, share=share)
    return *qkv(batch, queries, keys, heads, dim, dtype), k_ref, v_ref, foreground


CACHES = {
    "native": ("native", 1),
    "bf16": ("bf16", 1),
    "fp8": ("fp8_e4m3", 1),
    "fp8-by-128": ("fp8_e4m3", 128),
    "int8": ("int8", 1),
    "int4": ("int4", 1),
}
caches = pytest.mark.parametrize("cache", CACHES)
ALPHAS = {"alpha-0": 0.0, "alpha-0.3": 0.3, "alpha-1": 1.0, "alpha-per-sample": torch.tensor([0.0, 1.0, 0.625])}
alphas = pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS)
MASKS = {"all": 1.1, "none": -1.0, "random": 0.4, "one": None}
masks = pytest.mark.parametrize("mask", MASKS)


def mask_of(name, *shape):
    if name == "one":
        mask = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
        mask[:, shape[1] // 2] = True
        return mask
    return random_mask(*shape, seed=5, share=MASKS[name])


def cached(x, cache, kind):
    """x in one of CACHES, and what it decodes to."""
    format, per_scale = CACHES[cache]
    packed = ops.quantize_kv(x, format, kind, tokens_per_scale=per_scale, backend="reference")
    return packed, packed.dequantize(FP32, backend="reference")


def packed(x):
    """A tensor or QuantizedKV as the launchers take it."""
    if isinstance(x, torch.Tensor):
        return packed_arguments(x, [], "native", "k", 1, architecture(x))
    return packed_arguments(x.codes, x.scales, x.format, x.kind, x.tokens_per_scale, architecture(x.codes))


def per_sample(alpha, batch):
    """[B] fp32, as the launchers take it."""
    return alpha[:batch].to(DEVICE) if isinstance(alpha, torch.Tensor) else torch.full((batch,), alpha, device=DEVICE)


def blend_kv(k, v, k_ref, v_ref, foreground, alpha):
    return launch_blend_kv(k, v, packed(k_ref), packed(v_ref), foreground, per_sample(alpha, len(k)))


def check_blend(got, new, ref, foreground, alpha):
    """Bit for bit where the weight is 0 or 1, else within a rounding of fp64."""
    assert got.dtype == new.dtype and got.shape == new.shape and got.is_contiguous()
    alpha = per_sample(alpha, len(new))
    weight = torch.where(foreground, 0.0, alpha[:, None])[..., None, None].expand_as(new)
    exact = torch.where(weight == 0, new, ref.to(new.dtype))
    assert torch.equal(bits(got[(weight == 0) | (weight == 1)]), bits(exact[(weight == 0) | (weight == 1)]))
    truth, eps = oracles.blended(new, ref, foreground, alpha), torch.finfo(got.dtype).eps
    np.testing.assert_allclose(oracles.f64(got), truth, rtol=eps / 2 * (1 + 1e-3), atol=1e-6)


@caches
@pytest.mark.parametrize("alpha", [ALPHAS["alpha-per-sample"], 0.3], ids=["per-sample", "shared"])
@two_dtypes
def test_blended_keys_and_values_match_fp64(dtype, alpha, cache):
    _, k, v, k_ref, v_ref, foreground = locked_inputs(batch=3, keys=19, dim=40, dtype=dtype)
    (k_packed, k_ref), (v_packed, v_ref) = cached(k_ref, cache, "k"), cached(v_ref, cache, "v")
    got = blend_kv(k, v, k_packed, v_packed, foreground, alpha)
    for x, new, ref in zip(got, (k, v), (k_ref, v_ref), strict=True):
        check_blend(x, new, ref, foreground, alpha)


@masks
@dims
def test_blend_of_any_width_and_mask(dim, mask):
    _, k, v, k_ref, v_ref, _ = locked_inputs(batch=2, keys=18, dim=dim, ref_batch=1, dtype=FP16)
    foreground = mask_of(mask, 1, 18)
    for x, new, ref in zip(blend_kv(k, v, k_ref, v_ref, foreground, 0.3), (k, v), (k_ref, v_ref), strict=True):
        check_blend(x, new, ref, foreground, 0.3)


@caches
@pytest.mark.parametrize("dim", [1, 2, 7, 33, 65])
def test_blend_of_odd_widths(dim, cache):
    _, k, v, k_ref, v_ref, foreground = locked_inputs(keys=20, dim=dim)
    (k_packed, k_ref), (v_packed, v_ref) = cached(k_ref, cache, "k"), cached(v_ref, cache, "v")
    got = blend_kv(k, v, k_packed, v_packed, foreground, 0.6)
    for x, new, ref in zip(got, (k, v), (k_ref, v_ref), strict=True):
        check_blend(x, new, ref, foreground, 0.6)


SPECIALS = [INF, -INF, NAN, -0.0, 1e-40, -6e-8, 65504.0]


@two_dtypes
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_weights_of_0_and_1_keep_every_bit(alpha, dtype):
    specials = torch.tensor(SPECIALS, device=DEVICE).to(dtype)
    new = specials.expand(1, 20, 2, -1).contiguous()
    ref = new.flip(3).contiguous()
    foreground = random_mask(1, 20)
    got, _ = blend_kv(new, new, ref, ref, foreground, alpha)
    kept = foreground[..., None, None] | (alpha == 0)
    want = torch.where(kept, new, ref)
    # What a NaN carries besides being one is lost on the way through fp32.
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(bits(got.nan_to_num(7.0, INF, -INF)), bits(want.nan_to_num(7.0, INF, -INF)))


# locked attention: both routes


def triton_route(route):
    def call(*arguments, **options):
        return ops.locked_attention(*arguments, backend="triton", attention=route, **options)

    return call


ROUTES = {"fused": triton_route("fused"), "blend-first": triton_route("triton")}
routes = pytest.mark.parametrize("locked", ROUTES.values(), ids=ROUTES)


def check_locked(got, q, k, v, k_ref, v_ref, foreground, alpha, scale=None):
    assert got.dtype == q.dtype and got.shape == q.shape and got.is_contiguous()
    alpha = per_sample(alpha, len(q)).cpu()
    arguments = (q, k, v, k_ref, v_ref, foreground, alpha, scale)
    # Weights and blended values are rounded to q's dtype, and eager's error of few of them can be small by chance.
    summed = max((x.float().abs().max().item() for x in (v, v_ref) if x.numel()), default=0.0)
    oracles.check_as_good_as_eager(
        got, oracles.eager_locked_attention(*arguments), oracles.locked_attention(*arguments), summed
    )


@routes
@dims
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 129), (65, 64)], ids=str)
def test_locked_attention_matches_fp64(queries, keys, dim, locked):
    tensors = locked_inputs(queries=queries, keys=keys, dim=dim)
    check_locked(locked(*tensors, 0.3), *tensors, 0.3)


@routes
@alphas
@masks
def test_locked_attention_under_any_mask_and_weight(mask, alpha, locked):
    *tensors, _ = locked_inputs(batch=2, keys=35, dtype=FP16)
    foreground = mask_of(mask, 2, 35)
    alpha = per_sample(alpha, 2)
    check_locked(locked(*tensors, foreground, alpha), *tensors, foreground, alpha)


@routes
@pytest.mark.parametrize(("ref_batch", "fg_batch"), [(1, 3), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("alpha", [ALPHAS["alpha-per-sample"], 0.5], ids=["per-sample", "shared"])
def test_references_and_masks_may_be_shared(alpha, ref_batch, fg_batch, locked):
    tensors = locked_inputs(batch=3, keys=19, ref_batch=ref_batch, fg_batch=fg_batch)
    alpha = per_sample(alpha, 3)
    check_locked(locked(*tensors, alpha), *tensors, alpha)


@routes
def test_keys_may_be_shared_where_values_are_not(locked):
    q, k, v, k_ref, v_ref, foreground = locked_inputs(batch=2, keys=19, heads=2)
    tensors = q, k, v, k_ref[:1], v_ref, foreground
    check_locked(locked(*tensors, 0.5), *tensors, 0.5)


SAME = [(cache, cache, FP16) for cache in CACHES]
MIXED = [("native", "fp8"), ("bf16", "int8"), ("int8", "int4"), ("int4", "fp8-by-128"), ("fp8-by-128", "native")]
PAIRS = {f"{k}-{v}": (k, v, dtype) for k, v, dtype in (*SAME, *((*pair, FP32) for pair in MIXED))}


@routes
@pytest.mark.parametrize(("k_cache", "v_cache", "dtype"), PAIRS.values(), ids=PAIRS)
def test_any_cache_gives_what_it_decodes_to(k_cache, v_cache, dtype, locked):
    q, k, v, k_ref, v_ref, foreground = locked_inputs(keys=131, dim=72, dtype=dtype)
    (k_packed, k_ref), (v_packed, v_ref) = cached(k_ref, k_cache, "k"), cached(v_ref, v_cache, "v")
    got = locked(q, k, v, k_packed, v_packed, foreground, 0.7)
    check_locked(got, q, k, v, k_ref, v_ref, foreground, 0.7)


@routes
@pytest.mark.parametrize("ref_batch", [1, 2], ids=["shared", "own"])
@caches
def test_caches_of_a_batch(cache, ref_batch, locked):
    q, k, v, k_ref, v_ref, foreground = locked_inputs(batch=2, keys=20, ref_batch=ref_batch)
    (k_packed, k_ref), (v_packed, v_ref) = cached(k_ref, cache, "k"), cached(v_ref, cache, "v")
    check_locked(locked(q, k, v, k_packed, v_packed, foreground, 0.7), q, k, v, k_ref, v_ref, foreground, 0.7)


@routes
@dtypes
def test_a_reference_may_have_another_dtype(dtype, locked):
    q, k, v, k_ref, v_ref, foreground = locked_inputs(keys=33, dtype=dtype)
    k_ref, v_ref = k_ref.to(BF16), v_ref.to(FP32)
    check_locked(locked(q, k, v, k_ref, v_ref, foreground, 0.5), q, k, v, k_ref, v_ref, foreground, 0.5)


@routes
@pytest.mark.parametrize("layout", ALL_LAYOUTS.values(), ids=ALL_LAYOUTS)
def test_locked_attention_of_views(layout, locked):
    *tensors, foreground = locked_inputs(batch=2, queries=9, keys=70, heads=2, dim=40, dtype=FP16)
    wide = torch.stack([foreground, ~foreground], -1)[..., 0]
    strided = [layout(x) for x in tensors]
    strided[3] = strided[3][:1].expand(2, -1, -1, -1)
    tensors[3] = tensors[3][:1]
    check_locked(locked(*strided, wide, 0.3), *tensors, foreground, 0.3)


@routes
def test_text_tokens_marked_foreground_keep_their_own_keys(locked):
    """Joint attention: the text's cached rows hold nothing."""
    *tensors, foreground = locked_inputs(batch=2, queries=40, keys=40, ref_batch=1, dtype=FP16)
    foreground[:, :9] = True
    planted = [x.clone() for x in tensors]
    for ref in planted[3:]:
        ref[:, :9] = NAN
    check_locked(locked(*planted, foreground, 1.0), *tensors, foreground, 1.0)


def planted(packed, rows, bad):
    """A copy of a cache whose `rows` [S] decode to `bad`."""
    codes = packed.codes.clone()
    if packed.format in ("native", "bf16"):
        codes[:, rows] = bad
    elif packed.format == "fp8_e4m3":
        codes.view(torch.uint8)[:, rows] = 0x7F
    scales = [s.clone() for s in packed.scales]
    for scale in scales:
        if scale.shape[1] == len(rows):  # a scale shared with other tokens would spoil these too
            scale[:, rows] = bad
    named = dict(zip(("scale", "minimum"), scales, strict=False))
    return type(packed)(**{**vars(packed), "codes": codes, **named})


@routes
@caches
@pytest.mark.parametrize(("bad", "alpha"), [(NAN, 0.4), (INF, 1.0), (-INF, 0.4)], ids=str)
def test_the_cache_of_the_foreground_is_never_read(bad, alpha, cache, locked):
    q, k, v, k_ref, v_ref, foreground = locked_inputs(keys=35)
    (k_packed, k_plain), (v_packed, v_plain) = cached(k_ref, cache, "k"), cached(v_ref, cache, "v")
    k_packed, v_packed = (planted(x, foreground[0], bad) for x in (k_packed, v_packed))
    got = locked(q, k, v, k_packed, v_packed, foreground, alpha)
    check_locked(got, q, k, v, k_plain, v_plain, foreground, alpha)


@routes
@caches
def test_nothing_of_the_cache_is_read_without_weight(cache, locked):
    q, k, v, k_ref, v_ref, foreground = locked_inputs(keys=35)
    (k_packed, k_plain), (v_packed, v_plain) = cached(k_ref, cache, "k"), cached(v_ref, cache, "v")
    everything = torch.ones(35, dtype=torch.bool, device=DEVICE)
    k_packed, v_packed = (planted(x, everything, NAN) for x in (k_packed, v_packed))
    for x in (*k_packed.scales, *v_packed.scales):
        x.fill_(NAN)
    got = locked(q, k, v, k_packed, v_packed, foreground, 0.0)
    check_locked(got, q, k, v, k_plain, v_plain, foreground, 0.0)


@routes
@bad_values
@two_dtypes
def test_new_background_is_never_read_under_full_lock(dtype, bad, locked):
    q, k, v, k_ref, v_ref, foreground = locked_inputs(keys=70, dtype=dtype)
    spoilt = [x.masked_fill(~foreground[..., None, None], bad) for x in (k, v)]
    got = locked(q, *spoilt, k_ref, v_ref, foreground, 1.0)
    check_locked(got, q, k, v, k_ref, v_ref, foreground, 1.0)


@routes
def test_weights_of_0_and_1_hold_sample_by_sample(locked):
    q, k, v, k_ref, v_ref, foreground = locked_inputs(batch=3, keys=33)
    alpha = per_sample(ALPHAS["alpha-per-sample"], 3)
    spoilt = [x.clone() for x in (k, v, k_ref, v_ref)]
    for new, ref in zip(spoilt[:2], spoilt[2:], strict=True):
        ref[0], new[1, ~foreground[1]] = NAN, NAN
    check_locked(locked(q, *spoilt, foreground, alpha), q, k, v, k_ref, v_ref, foreground, alpha)


@routes
def test_an_infinite_value_is_infinite(locked):
    """Not NaN, which inf times a weight of 0 would give."""
    q, k, v, k_ref, v_ref, foreground = locked_inputs(keys=9)
    foreground[:, 4], v[0, 4, 0, 3] = True, INF
    got = locked(q, k, v, k_ref, v_ref, foreground, 0.5)
    assert (got[..., 3] == INF).all() and got.isfinite().sum() == got.numel() - 5


@splits_
@two_dtypes
@pytest.mark.parametrize("cache", ["native", "int4"])
def test_the_fused_kernel_with_split_keys(cache, dtype, splits):
    q, k, v, k_ref, v_ref, foreground = locked_inputs(keys=307, dim=32, dtype=dtype)
    (k_packed, k_ref), (v_packed, v_ref) = cached(k_ref, cache, "k"), cached(v_ref, cache, "v")
    with recorded_launches() as launches:
        arguments = packed(k_packed), packed(v_packed), foreground, per_sample(0.3, 1)
        got = launch_fused_attention(q, k, v, *arguments, 0.2, splits=splits)
    assert len(launches) == (2 if splits in (2, 5) else 1)
    check_locked(got, q, k, v, k_ref, v_ref, foreground, 0.3, 0.2)


@routes
@dtypes
def test_very_large_scores_do_not_overflow(dtype, locked):
    q, *rest, foreground = locked_inputs(keys=70, dim=32, dtype=dtype)
    got = locked(100 * q, *rest, foreground, 0.5, scale=100.0)
    bound = max(x.abs().max() for x in (rest[1], rest[3])).float()
    assert got.isfinite().all() and got.abs().max() <= bound * 1.01


@st.composite
def locked_calls(draw):
    shape = {
        "batch": (batch := draw(st.integers(1, 2))),
        "queries": draw(st.integers(1, 20)),
        "keys": draw(st.integers(1, 70)),
        "heads": draw(st.integers(1, 2)),
        "dim": draw(st.integers(1, 128)),
        "ref_batch": draw(st.sampled_from([1, batch])),
        "fg_batch": draw(st.sampled_from([1, batch])),
        "dtype": draw(st.sampled_from((FP32, FP16, BF16))),
        "share": draw(st.sampled_from([-1.0, 0.1, 0.5, 1.1])),
    }
    weights = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32))
    alpha = torch.tensor(draw(st.lists(weights, min_size=batch, max_size=batch)))
    return shape, alpha.to(DEVICE), draw(st.sampled_from(list(CACHES))), draw(st.sampled_from(list(CACHES)))


@given(locked_calls(), st.sampled_from(list(ROUTES)), st.sampled_from(list(ALL_LAYOUTS)))
@settings(max_examples=EXAMPLES, deadline=None)
def test_locked_attention_matches_fp64_on_any_call(call, route, layout):
    shape, alpha, k_cache, v_cache = call
    q, k, v, k_ref, v_ref, foreground = locked_inputs(**shape)
    (k_packed, k_ref), (v_packed, v_ref) = cached(k_ref, k_cache, "k"), cached(v_ref, v_cache, "v")
    new = (ALL_LAYOUTS[layout](x) for x in (q, k, v))
    got = ROUTES[route](*new, k_packed, v_packed, foreground, alpha)
    check_locked(got, q, k, v, k_ref, v_ref, foreground, alpha)


GRID = list(itertools.product((FP32, FP16, BF16), DIMS, ((1, 127), (128, 129), (131, 257), (70, 3)), ALPHAS, ROUTES))


@pytest.mark.large
@pytest.mark.parametrize(("dtype", "dim", "lengths", "alpha", "route"), GRID, ids=str)
def test_the_whole_grid_of_locked_attention(dtype, dim, lengths, alpha, route):
    tensors = locked_inputs(batch=2, queries=lengths[0], keys=lengths[1], heads=2, dim=dim, ref_batch=1, dtype=dtype)
    alpha = per_sample(ALPHAS[alpha], 2)
    check_locked(ROUTES[route](*tensors, alpha), *tensors, alpha)


# purity, launches, torch.compile, large strides


def test_locked_attention_is_one_launch_or_two():
    tensors = locked_inputs(keys=33)
    launched = {}
    for route in ("fused", "triton", "auto", "sdpa"):
        with recorded_launches() as launches:
            triton_route(route)(*tensors, 0.5)
        launched[route] = [launch.name for launch in launches]
    assert launched == {
        "fused": ["_fused_attention_kernel"],
        "triton": ["_blend_kv_kernel", "_attention_kernel"],
        "auto": ["_fused_attention_kernel"],
        "sdpa": ["_blend_kv_kernel"],
    }


@pytest.mark.parametrize("route", ["fused", "triton", "auto"])
@pytest.mark.parametrize("shape", [dict(queries=0), dict(batch=0), dict(heads=0)], ids=["queries", "batch", "heads"])
def test_an_empty_call_gives_an_empty_result(shape, route):
    q, *rest = locked_inputs(**shape)
    assert triton_route(route)(q, *rest, 0.5).shape == q.shape


@pytest.mark.parametrize("route", ["fused", "triton"])
@pytest.mark.parametrize("cache", ["native", "fp8", "int4"])
def test_the_same_bits_twice_and_inputs_as_they_were(cache, route):
    q, k, v, k_ref, v_ref, foreground = locked_inputs(batch=2, queries=9, keys=35, dtype=FP16)
    (k_ref, _), (v_ref, _) = cached(k_ref, cache, "k"), cached(v_ref, cache, "v")
    given = [q, k, v, foreground, k_ref.codes, v_ref.codes, *k_ref.scales, *v_ref.scales]
    before = [bits(x).clone() for x in given]
    first, second = (triton_route(route)(q, k, v, k_ref, v_ref, foreground, 0.4) for _ in range(2))
    assert torch.equal(bits(first), bits(second))
    assert all(torch.equal(bits(x), y) for x, y in zip(given, before, strict=True))


@pytest.mark.parametrize("launcher", ["attention", "fp8", "fused"])
def test_split_keys_give_the_same_bits_twice(launcher):
    q, k, v, k_ref, v_ref, foreground = locked_inputs(queries=5, keys=307, dim=32)
    call = {
        "attention": lambda: launch_attention(q, k, v, 0.2, splits=5),
        "fp8": lambda: launch_attention_fp8(*fp8_operands(q, k, v), 0.2, FP32, splits=5),
        "fused": lambda: launch_fused_attention(
            q, k, v, packed(k_ref), packed(v_ref), foreground, per_sample(0.3, 1), 0.2, splits=5
        ),
    }[launcher]
    assert torch.equal(bits(call()), bits(call()))


def operator_arguments(backend, route, cache):
    q, k, v, k_ref, v_ref, foreground = locked_inputs(batch=2, keys=33, ref_batch=1)
    caches = []
    for x, kind in ((k_ref, "k"), (v_ref, "v")):
        x, _ = cached(x, cache, kind)
        caches += [x.codes, x.scales, x.format, x.kind, x.tokens_per_scale]
    return q, k, v, *caches, foreground, per_sample(0.3, 2), 0.25, backend, route


@pytest.mark.parametrize("cache", ["native", "fp8", "int4"])
@pytest.mark.parametrize(
    ("backend", "route"),
    [("triton", "fused"), ("triton", "triton"), ("auto", "auto"), ("reference", "auto")],
    ids="-".join,
)
def test_the_operator_passes_opcheck(backend, route, cache):
    # The schema's check multiplies what it compares, which torch cannot do in fp8.
    checks = ("test_faketensor",) if cache == "fp8" else ("test_schema", "test_faketensor")
    operator = torch.ops.kvlock_fast.locked_attention.default
    torch.library.opcheck(operator, operator_arguments(backend, route, cache), test_utils=checks)


COMPILED = [
    ("triton", "fused", "native"),
    ("triton", "triton", "fp8"),
    ("triton", "auto", "int4"),
    ("auto", "auto", "fp8"),
]


@pytest.mark.parametrize(("backend", "route", "cache"), COMPILED, ids="-".join)
def test_compiled_equals_eager(backend, route, cache):
    def doubled(q, k, v, k_ref, v_ref, foreground, alpha):
        refs = (ops.quantize_kv(x, CACHES[cache][0], kind, backend=backend) for x, kind in ((k_ref, "k"), (v_ref, "v")))
        return 2 * ops.locked_attention(q, k, v, *refs, foreground, alpha, backend=backend, attention=route)

    torch.compiler.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for keys in (33, 20):
        arguments = (*locked_inputs(batch=2, keys=keys, ref_batch=1), per_sample(0.3, 2))
        torch.testing.assert_close(compiled(*arguments), doubled(*arguments), rtol=0, atol=0)


@contextmanager
def untouched_memory():
    """torch.empty leaves memory alone again: only pages that are written exist."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="module")
def vast():
    """Room for offsets of 2^31 elements of 2 bytes, up or (where an offset wraps around) down."""
    with untouched_memory():
        try:
            memory = torch.empty(2**33 + 2**24, dtype=torch.uint8, device=DEVICE)
        except RuntimeError:
            pytest.skip("8 GiB of address space are not to be had")
    yield memory
    del memory


def far_apart(vast, x, dim, place):
    """x with a stride of 2^30 along `dim`, in the vast memory: entry 2 is 2^31 elements away."""
    strides = list(x[:1].contiguous().stride())
    strides[dim] = 2**30
    elements = vast.view(x.dtype)
    at = elements.numel() // 2 + place * 2**15
    return elements.as_strided(x.shape, strides, at).copy_(x)


# The dimension whose entry 2 is far away, and the shape of k.
FAR = {
    "batch": (0, (3, 4, 1, 8)),
    "tokens": (1, (1, 3, 2, 8)),
    "heads": (2, (1, 4, 3, 8)),
    "channels": (3, (1, 4, 1, 3)),
}


@pytest.mark.parametrize("launcher", ["attention", "fused", "blend"])
@pytest.mark.parametrize(("dim", "shape"), FAR.values(), ids=FAR)
def test_offsets_beyond_32_bits(dim, shape, launcher, vast):
    if launcher == "attention" and dim == 3:
        pytest.skip("channels are contiguous there")
    tensors = [normal(*shape, seed=i, dtype=FP16) for i in range(5)]
    foreground = random_mask(shape[0], shape[1], seed=1)
    alpha = per_sample(0.5, shape[0])

    def call(q, k, v, k_ref, v_ref):
        if launcher == "attention":
            return launch_attention(q, k, v, 0.5, splits=1, tma=False)
        if launcher == "blend":
            return torch.stack(launch_blend_kv(k, v, packed(k_ref), packed(v_ref), foreground, alpha))
        return launch_fused_attention(q, k, v, packed(k_ref), packed(v_ref), foreground, alpha, 0.5)

    far = [far_apart(vast, x, dim, place) for place, x in enumerate(tensors)]
    with untouched_memory():
        assert torch.equal(bits(call(*far)), bits(call(*tensors)))


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "tokens", "heads"])
def test_offsets_beyond_32_bits_in_fp8(dim, vast):
    shape = [1, 20, 1, 32]
    shape[dim] = 3
    q, q_scale, k, k_scale, v_t, v_scale = fp8_operands(*(normal(*shape, seed=i) for i in range(3)))
    q_, k_ = (far_apart(vast, x.view(torch.uint8), dim, i).view(torch.float8_e4m3fn) for i, x in enumerate((q, k)))
    v_dim = (0, 2, 1)[dim]  # the channels of v_t, in place of its tokens
    v_ = far_apart(vast, v_t.view(torch.uint8)[:, :, :3], v_dim, 2).view(torch.float8_e4m3fn)
    q, k, q_, k_, v_t = (*(x[..., :3] for x in (q, k, q_, k_)), v_t[:, :, :3])
    far, near = (
        launch_attention_fp8(*x, 0.2, FP32, splits=1, tma=False)
        for x in ((q_, q_scale, k_, k_scale, v_, v_scale), (q, q_scale, k, k_scale, v_t, v_scale))
    )
    assert torch.equal(bits(far), bits(near))


def test_the_reference_is_attention():
    q, k, v = qkv(batch=2, queries=9, keys=33, heads=2, dim=40, dtype=BF16)
    check = oracles.attention(q, k, v)
    np.testing.assert_allclose(oracles.f64(attention_reference(q, k, v, 40**-0.5)), check, atol=2e-6)
