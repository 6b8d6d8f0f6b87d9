"""The prologue on tokens in any order, with a weight for every token, against the same tokens sorted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlock_fast.kernels.language import HAS_TRITON
from kvlock_fast.kernels.launch import recorded_launches
from kvlock_fast.kernels.prologue import Capture, Lock, Places, RoPE, prologue
from tests.kernels.test_prologue import bits, check_exact
from tests.support import oracles
from tests.support.prologue_cases import DEVICE, Case, Oracle, generator, inputs, normal

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

EXAMPLES = settings().max_examples
backends = pytest.mark.parametrize("backend", ["reference", "triton"])


def scattered(case):
    """The case's sorted call; the same call with its tokens shuffled, and where each went."""
    positional, named = inputs(case)
    order = torch.randperm(case.tokens, generator=generator(case.seed + 5)).to(DEVICE)
    back = order.argsort()  # the sorted place of a token: its row in the background, F further on
    *qkv, heads = positional
    qkv = [x[:, back] for x in qkv]
    rope = named["rope"] and RoPE(named["rope"].cos[back], named["rope"].sin[back], named["rope"].layout)
    rows = (back - case.foreground).int()
    places = Places(rows, case.tokens - case.foreground)
    changed = {**named, "rope": rope, "foreground": None, "places": places}
    return (positional, named), ((*qkv, heads), changed), order


def check(case, backend, output="native"):
    (positional, named), (shuffled, changed), order = scattered(case)
    got, want = prologue(*shuffled, **changed, backend=backend), Oracle(positional, named)
    for name in ("q", "k", "v"):
        check_exact(getattr(got, name)[:, order].contiguous(), getattr(want, name), case)
    return got


@backends
@pytest.mark.parametrize("format", ["native", "fp8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("stage", ["raw", "normed", "rotated"])
@pytest.mark.parametrize("layout", [None, "interleaved", "split_half"])
def test_a_source_of_every_stage_and_format(layout, stage, format, backend):
    check(Case(batch=2, layout=layout, source=format, stage=stage, dim=12, tokens=9, alpha=0.6), backend)


@backends
@pytest.mark.parametrize("foreground", [0, 1, 10, 11])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_all_none_and_some_of_the_tokens(alpha, foreground, backend):
    check(Case(tokens=11, foreground=foreground, source="native", alpha=alpha), backend)


@backends
@pytest.mark.parametrize("format", ["native", "bf16", "fp8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("stage", ["normed", "rotated"])
def test_what_is_captured_lies_in_the_backgrounds_order(stage, format, backend):
    case = Case(tokens=13, dim=12, foreground=4, capture=Capture(format, stage))
    (positional, named), (shuffled, changed), _ = scattered(case)
    want = prologue(*positional, **named, backend=backend)
    got = prologue(*shuffled, **changed, backend=backend)
    for kind in ("captured_k", "captured_v"):
        one, other = getattr(want, kind), getattr(got, kind)
        assert other.shape == one.shape
        for a, b in zip((one.codes, *one.scales), (other.codes, *other.scales), strict=True):
            assert torch.equal(bits(a), bits(b))


@st.composite
def cases(draw):
    tokens = draw(st.integers(1, 12))
    norm = draw(st.sampled_from(["none", "rms", "layer", "rms_across_heads"]))
    # The difference of two numbers that are near each other is their rounding, and a layer norm of two is little else.
    least = 4 if norm == "layer" else 1
    return Case(
        batch=draw(st.integers(1, 3)),
        tokens=tokens,
        heads=draw(st.integers(1, 4)),
        dim=2 * draw(st.integers(least, 20)),
        foreground=draw(st.integers(0, tokens)),
        norm=norm,
        layout=draw(st.sampled_from([None, "interleaved", "split_half"])),
        angles=draw(st.sampled_from(["shared", "heads"])),
        source=draw(st.sampled_from(["native", "bf16", "fp8_e4m3", "int8", "int4"])),
        stage=draw(st.sampled_from(["raw", "normed", "rotated"])),
        alpha=draw(st.sampled_from([0.0, 0.25, 1.0])),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=max(8, EXAMPLES // 10))
@given(case=cases())
def test_any_case(case):
    check(case, "triton")
    check(case, "reference")


def by_token(case, batch):
    """A weight for every token: both ends among them."""
    weight = torch.rand(batch, case.tokens, generator=generator(case.seed + 7))
    weight[:, ::3], weight[:, 1::5] = 0, 1
    return weight.to(DEVICE)


class ByToken(Oracle):
    def weight(self, b, t, first, skipped, missing):
        if t < first or b < skipped:
            return 0.0
        alpha = self.lock.alpha
        return float(alpha[0 if len(alpha) == 1 else b - skipped, t])


@backends
@pytest.mark.parametrize("one_row", [False, True], ids=["a-row-each", "one-row"])
@pytest.mark.parametrize("source", ["in_batch", "native", "fp8_e4m3"])
def test_a_weight_for_every_token(source, one_row, backend):
    for foreground in (0, 3):
        case = Case(batch=3, tokens=9, foreground=foreground, source=source)
        positional, named = inputs(case)
        lock = named["lock"]
        weight = by_token(case, 1 if one_row else 3 - lock.first_row - (lock.k is None))
        named["lock"] = replace(lock, alpha=weight)
        got, want = prologue(*positional, **named, backend=backend), ByToken(positional, named)
        for name in ("q", "k", "v"):
            check_exact(getattr(got, name), getattr(want, name), case)


@backends
def test_places_and_a_weight_for_every_token(backend):
    """A token that has a row in the source's may be the edit's foreground: its weight is 0."""
    case = Case(batch=2, tokens=11, foreground=4, source="fp8_e4m3", stage="normed")
    (positional, named), (shuffled, changed), order = scattered(case)
    weight = by_token(case, 2)
    named["lock"] = replace(named["lock"], alpha=weight)
    changed["lock"] = replace(changed["lock"], alpha=weight[:, order.argsort()].contiguous())
    got, want = prologue(*shuffled, **changed, backend=backend), ByToken(positional, named)
    for name in ("q", "k", "v"):
        check_exact(getattr(got, name)[:, order].contiguous(), getattr(want, name), case)


@backends
def test_at_both_ends_the_other_side_is_not_read(backend):
    case = Case(tokens=10, foreground=4, norm="rms", source="native", stage="normed")
    _, ((q, k, v, heads), changed), order = scattered(case)
    weight = torch.ones(1, 10, device=DEVICE)
    weight[0, order[4:7]] = 0  # of the background, but not locked
    lock = replace(changed["lock"], alpha=weight)
    for x in (lock.k, lock.v):
        x[:, :3] = float("nan")
    locked = order[7:]
    k, v = k.clone(), v.clone()
    k[:, locked], v[:, locked] = float("nan"), float("inf")
    got = prologue(q, k, v, heads, **{**changed, "lock": lock}, backend=backend)
    assert got.k.isfinite().all() and got.v.isfinite().all()
    np.testing.assert_array_equal(oracles.f64(got.v[:, locked]), oracles.f64(lock.v[:, 3:]))


@pytest.mark.parametrize("output", ["native", "fp8"])
def test_takes_no_more_launches(output):
    _, (shuffled, changed), _ = scattered(Case(tokens=9, source="native"))
    with recorded_launches() as launches:
        prologue(*shuffled, **{**changed, "output": output}, backend="triton")
    assert len(launches) == (1 if output == "native" else 2)


def test_fp8_output_agrees_with_the_reference():
    _, (shuffled, changed), _ = scattered(Case(tokens=140, heads=2, dim=16, foreground=50, source="int8"))
    one, other = (prologue(*shuffled, **{**changed, "output": "fp8"}, backend=b) for b in ("reference", "triton"))
    for name in ("q", "k", "v"):
        a, b = (oracles.f64(getattr(x, name)) for x in (one, other))
        assert abs(a - b).max() <= abs(a).max() / 8 and (a == b).mean() > 0.999


def test_what_does_not_fit_is_said():
    q = k = v = normal(1, 6, 8)
    rows = torch.arange(6, dtype=torch.int32, device=DEVICE)
    source = normal(1, 6, 2, 4)
    call = lambda **given: prologue(q, k, v, 2, **given)  # noqa: E731
    for given_, message in (
        (dict(foreground=2, places=Places(rows, 6)), "foreground counts tokens that lie first.*got 2"),
        (dict(places=Places(rows.long(), 6)), r"int32 \[6\], got torch.int64"),
        (dict(places=Places(rows[:5], 5)), r"int32 \[6\], got torch.int32 \(5,\)"),
        (dict(places=Places(rows, 7)), "count must be a number of tokens from 0 to 6, got 7"),
        (dict(places=Places(rows, 6), lock=Lock(0.5)), "a source in the batch"),
        (dict(places=Places(rows, 5), lock=Lock(0.5, source, source)), r"the lock's k must be \[1 or 1, 5, 2, 4\]"),
        (dict(lock=Lock(torch.ones(1, 5, device=DEVICE), source, source), foreground=0), r"alpha must be fp32 \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**given_)


def test_is_visible_to_compile():
    (_, _), (shuffled, changed), _ = scattered(Case(tokens=9, source="fp8_e4m3", capture=None))
    run = lambda *given: prologue(*given, **changed).k  # noqa: E731
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*shuffled), run(*shuffled))
