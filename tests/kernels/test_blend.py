"""The Triton blend (interpreted without a GPU): exact where nothing is computed, as good as eager elsewhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlock_fast.kernels.blend import blend_
from kvlock_fast.kernels.language import HAS_TRITON
from kvlock_fast.kernels.launch import recorded_launches
from kvlock_fast.kernels.quantize import quantize_kv
from tests.support import oracles

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

EXAMPLES = settings().max_examples
NAN, INF = float("nan"), float("inf")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
backends = pytest.mark.parametrize("backend", ["reference", "triton"])

SHAPES = {
    "aligned": (1, 32, 2, 64),
    "two-samples-prime": (2, 37, 3, 40),
    "one-token": (3, 1, 1, 8),
    "dim-1": (2, 5, 2, 1),
    "dim-300": (1, 5, 2, 300),
    "odd-dim": (2, 17, 2, 33),
    "no-tokens": (2, 0, 3, 16),
    "no-samples": (0, 5, 3, 16),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)

# Name: token_dim, and the layout of [B, S, H, D] as a model has it.
LAYOUTS = {
    "tokens-then-heads": (1, lambda x: x.clone()),
    "heads-then-tokens": (2, lambda x: x.transpose(1, 2).clone(memory_format=torch.contiguous_format)),
    "heads-then-tokens-strided": (2, lambda x: x.clone().transpose(1, 2)),
    "one-row-of-channels": (1, lambda x: x.flatten(2).clone()),
    "slice-of-fused-qkv": (1, lambda x: torch.stack([x, x], 2)[:, :, 1]),
    "behind-text": (2, lambda x: torch.cat([x[:, :3], x], 1).transpose(1, 2).contiguous()[:, :, min(3, x.shape[1]) :]),
    "gaps-between-channels": (1, lambda x: torch.stack([x, x], -1)[..., 1]),
}
layouts = pytest.mark.parametrize(("token_dim", "layout"), LAYOUTS.values(), ids=LAYOUTS)

PACKED = {
    "native": ("native", "k", 1),
    "bf16": ("bf16", "k", 1),
    "fp8": ("fp8_e4m3", "k", 1),
    "fp8-by-128": ("fp8_e4m3", "v", 128),
    "int8": ("int8", "v", 1),
    "int4-keys": ("int4", "k", 1),
    "int4-values": ("int4", "v", 1),
}
packed = pytest.mark.parametrize("packed", PACKED.values(), ids=PACKED)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=rng(seed)).to(DEVICE, dtype)


def some_weights(batch, tokens, seed=5):
    """0, 1 and numbers between."""
    weight = torch.rand(batch, tokens, generator=rng(seed))
    ends = torch.randint(0, 3, (batch, tokens), generator=rng(seed + 1))
    return torch.where(ends == 0, 0.0, torch.where(ends == 1, 1.0, weight)).to(DEVICE)


def bits(x):
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def as_rows(x, token_dim, shape):
    return x.movedim(token_dim, 1).reshape(shape)


def check_blend(got, x, ref, weight):
    """[B, S, H, D]: bits where the weight is 0 or 1; elsewhere no further from fp64 than eager, plus one rounding."""
    w = weight[:, :, None, None].expand_as(x)
    assert torch.equal(bits(got)[w == 0], bits(x)[w == 0])
    assert torch.equal(bits(got)[w == 1], bits(ref.to(x.dtype).expand_as(x))[w == 1])
    mixed = ((w != 0) & (w != 1)).cpu().numpy()
    if not mixed.any():
        return
    w64, x64, ref64 = (oracles.f64(t)[mixed] for t in (w, x, ref.expand_as(x)))
    truth = (1 - w64) * x64 + w64 * ref64
    eager = oracles.f64((1 - w.to(x.dtype)) * x + w.to(x.dtype) * ref.to(x.dtype))[mixed]
    rounding = torch.finfo(x.dtype).eps / 2 * abs(truth).max() + 1e-6
    assert abs(oracles.f64(got)[mixed] - truth).max() <= abs(eager - truth).max() + rounding


@dtypes
@layouts
@shapes
def test_blend_of_plain_tensors(shape, token_dim, layout, dtype):
    x, ref, weight = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype), some_weights(*shape[:2])
    laid_out = layout(x)
    with recorded_launches() as launches:
        got = blend_(laid_out, layout(ref), weight, token_dim, backend="triton")
    assert got is laid_out
    assert len(launches) == (x.numel() > 0)
    check_blend(as_rows(got, token_dim, shape), x, ref, weight)


@pytest.mark.parametrize(("refs", "weights"), [(1, 3), (3, 1), (1, 1)], ids=["ref", "weight", "both"])
def test_one_row_serves_the_whole_batch(refs, weights):
    x, ref, weight = normal(3, 21, 2, 24), normal(refs, 21, 2, 24, seed=1), some_weights(weights, 21)
    check_blend(blend_(x.clone(), ref, weight, backend="triton"), x, ref, weight.expand(3, -1))


def test_the_sources_row_of_the_batch_itself_is_the_reference():
    x, weight = normal(3, 21, 2, 24), some_weights(2, 21)
    got = x.clone()
    blend_(got[1:], got[:1], weight, backend="triton")
    assert torch.equal(bits(got[0]), bits(x[0]))
    check_blend(got[1:], x[1:], x[:1], weight)


def indices(name, tokens):
    return {
        "ascending": torch.arange(1, tokens, 3),
        "permuted": torch.randperm(tokens, generator=rng(3))[: tokens // 2],
        "all": torch.arange(tokens),
        "one": torch.tensor([tokens - 1]),
        "none": torch.tensor([], dtype=torch.int64),
        "strided": (torch.rand(1, tokens, generator=rng(4)) < 0.6).nonzero()[:, 1],
    }[name].to(DEVICE)


@pytest.mark.parametrize("name", ["ascending", "permuted", "all", "one", "none", "strided"])
@layouts
def test_indexed_tokens_are_blended_and_others_left(token_dim, layout, name):
    shape = (2, 43, 2, 24)
    x, weight, index = normal(*shape, dtype=torch.bfloat16), some_weights(2, 43), indices(name, 43)
    rows = normal(2, len(index), 2, 24, seed=1, dtype=torch.bfloat16)
    got = as_rows(blend_(layout(x), layout(rows), weight, token_dim, index, backend="triton"), token_dim, shape)
    ref, weight_there = normal(*shape, seed=2, dtype=torch.bfloat16), torch.zeros_like(weight)
    ref[:, index], weight_there[:, index] = rows, weight[:, index]
    check_blend(got, x, ref, weight_there)


@packed
@layouts
@pytest.mark.parametrize("refs", [1, 2], ids=["shared", "per-sample"])
def test_packed_references_blend_as_their_values(refs, token_dim, layout, packed):
    shape, index = (2, 150, 2, 40), indices("permuted", 150)
    format, kind, per_scale = packed
    x, weight = normal(*shape, dtype=torch.float16), some_weights(2, 150)
    cache = quantize_kv(normal(refs, len(index), 2, 40, seed=1), format, kind, tokens_per_scale=per_scale)
    values = cache.dequantize(torch.float32)
    ref, weight_there = normal(*shape, seed=2), torch.zeros_like(weight)
    ref[:, index], weight_there[:, index] = values, weight[:, index]
    for backend in ("triton", "reference"):
        got = blend_(layout(x), cache, weight, token_dim, index, backend=backend)
        check_blend(as_rows(got, token_dim, shape), x, ref, weight_there)


@packed
@dtypes
@pytest.mark.parametrize("shape", [(1, 65, 1, 128), (2, 5, 2, 33), (1, 3, 1, 300), (1, 4, 2, 1)], ids=str)
def test_packed_references_of_all_tokens(shape, dtype, packed):
    format, kind, per_scale = packed
    x, weight = normal(*shape, dtype=dtype), some_weights(*shape[:2])
    cache = quantize_kv(normal(*shape, seed=1, dtype=dtype), format, kind, tokens_per_scale=per_scale)
    got = blend_(x.clone(), cache, weight, backend="triton")
    check_blend(got, x, cache.dequantize(torch.float32), weight)


@packed
@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
def test_what_has_no_weight_never_comes_through(bad, packed):
    format, kind, per_scale = packed
    weight = some_weights(1, 200)
    x, source = normal(1, 200, 2, 64), normal(1, 200, 2, 64, seed=1)
    clean = quantize_kv(source, format, kind, tokens_per_scale=per_scale).dequantize()
    locked, free = weight[0] == 1, weight[0] == 0
    x[:, locked] = bad
    cache = quantize_kv(source, format, kind, tokens_per_scale=per_scale)
    for part in (cache.codes, *cache.scales):
        if part.is_floating_point() and part.shape[1] == 200:
            part.view(torch.uint8)[:, free] = torch.full((1,), bad).to(part.dtype).view(torch.uint8)[-1]
    got = blend_(x.clone(), cache, weight, backend="triton")
    assert torch.equal(bits(got[:, free]), bits(x[:, free]))
    assert torch.equal(got[:, locked], clean[:, locked])
    assert got[:, ~free].isfinite().all()


@st.composite
def blends(draw):
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 50)), draw(st.integers(1, 3)), draw(st.integers(1, 70)))
    dtype, seed = draw(st.sampled_from(FLOATS)), draw(st.integers(0, 99))
    refs, weights = (draw(st.sampled_from([1, shape[0]])) for _ in range(2))
    ref = normal(refs, *shape[1:], seed=seed + 1, dtype=dtype)
    layout = draw(st.sampled_from(list(LAYOUTS.values())))
    return normal(*shape, seed=seed, dtype=dtype), ref, some_weights(weights, shape[1], seed), *layout


@given(blends())
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_blend_matches_fp64(case):
    x, ref, weight, token_dim, layout = case
    got = blend_(layout(x), layout(ref), weight, token_dim, backend="triton")
    check_blend(as_rows(got, token_dim, x.shape), x, ref, weight.expand(len(x), -1))


@dtypes
def test_kernel_and_reference_agree_to_a_rounding(dtype):
    x, ref, weight = normal(2, 50, 2, 64, dtype=dtype), normal(2, 50, 2, 64, seed=1, dtype=dtype), some_weights(2, 50)
    got, want = (blend_(x.clone(), ref, weight, backend=backend) for backend in ("triton", "reference"))
    np.testing.assert_allclose(oracles.f64(got), oracles.f64(want), rtol=torch.finfo(dtype).eps, atol=1e-6)


@packed
@backends
def test_the_operator_passes_opcheck(backend, packed):
    format, kind, per_scale = packed
    x, weight, index = normal(2, 40, 2, 34), some_weights(2, 40), indices("permuted", 40)
    cache = quantize_kv(normal(1, len(index), 2, 34, seed=1), format, kind, tokens_per_scale=per_scale)
    # The schema's check multiplies what it compares, which torch cannot do in fp8.
    checks = ("test_faketensor",) if format == "fp8_e4m3" else ("test_schema", "test_faketensor")
    arguments = (x, cache.codes, cache.scales, weight, index, 1, format, kind, per_scale, backend)
    torch.library.opcheck(torch.ops.kvlock_fast.blend_.default, arguments, test_utils=checks)


@packed
def test_compiled_equals_eager(packed):
    format, kind, per_scale = packed
    x, weight, index = normal(2, 40, 2, 34), some_weights(2, 40), indices("strided", 40)
    cache = quantize_kv(normal(1, len(index), 2, 34, seed=1), format, kind, tokens_per_scale=per_scale)

    def blend_a_copy(x, weight, index):
        return 2 * blend_(x + 1, cache, weight, index=index, backend="triton")

    torch.compiler.reset()
    compiled = torch.compile(blend_a_copy, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, index), blend_a_copy(x, weight, index))


SEVEN = torch.ones(2, 7)
ERRORS = {
    "rank": (dict(x=torch.ones(2, 7)), r"x must be .* got \(2, 7\)"),
    "token-dim": (dict(token_dim=3), "token_dim=3"),
    "weight-length": (dict(weight=torch.ones(2, 9)), r"weight.*\(2, 9\)"),
    "weight-batch": (dict(weight=torch.ones(3, 7)), r"weight.*\(3, 7\)"),
    "ref-length": (dict(ref=torch.ones(2, 9, 3, 8)), r"ref.*\(2, 9, 3, 8\)"),
    "ref-batch": (dict(ref=torch.ones(3, 7, 3, 8)), r"ref.*\(3, 7, 3, 8\)"),
    "ref-rank": (dict(ref=torch.ones(2, 7, 24)), r"ref.*\(2, 7, 24\)"),
    "packed-heads": (dict(ref=quantize_kv(torch.ones(1, 7, 2, 12))), r"ref.*\(1, 7, 2, 12\)"),
    "packed-of-flat": (dict(x=torch.ones(2, 7, 20), ref=quantize_kv(torch.ones(1, 7, 2, 12))), r"ref.*\(1, 7, 2, 12\)"),
    "index-dtype": (dict(index=torch.ones(7, dtype=torch.bool)), "index.*bool"),
    "index-rank": (dict(index=torch.zeros(1, 7, dtype=torch.int64)), r"index.*\(1, 7\)"),
    "index-length": (dict(index=torch.arange(5)), r"ref must be \(2, 5, 3, 8\)"),
    "backend": (dict(backend="abacus"), "abacus"),
}


@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_arguments_are_quoted(changes, message):
    arguments = dict(x=torch.ones(2, 7, 3, 8), ref=torch.ones(2, 7, 3, 8), weight=SEVEN)
    with pytest.raises(ValueError, match=message):
        blend_(**arguments | changes)


@pytest.mark.large
@packed
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_larger_packed_references(dim, packed):
    format, kind, per_scale = packed
    x, weight, index = normal(2, 1000, 4, dim, dtype=torch.bfloat16), some_weights(2, 1000), indices("permuted", 1000)
    cache = quantize_kv(normal(1, len(index), 4, dim, seed=1), format, kind, tokens_per_scale=per_scale)
    got, want = (blend_(x.clone(), cache, weight, index=index, backend=b).float() for b in ("triton", "reference"))
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-6)
