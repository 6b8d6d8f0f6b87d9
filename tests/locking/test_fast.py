"""The fast path's processors against the lock's definition, against the generic path, and against a model untouched."""

import functools
from itertools import product

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlock_fast as kvf
from kvlock_fast.cache.layout import KVShape, StepLayout
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.kernels.language import HAS_TRITON
from kvlock_fast.locking import fast_path, fast_qkv, fast_trial
from kvlock_fast.locking.lock import Mode, TransformerLock, blend_weight, kv_sizes
from tests.support.fast_cases import FAMILIES, TOKENS, WORDS, AtTheCall, families, normal, wan
from tests.support.tiny import untouched

EXAMPLES = settings().max_examples
FORMATS = ("native", "bf16", "fp8_e4m3", "int8", "int4")


def a_mask(seed=0, share=0.4):
    inside = torch.rand(TOKENS, generator=torch.Generator().manual_seed(seed)) < share
    return inside, (~inside).nonzero()[:, 0]


def locked(family, background, processors="fast", layers=None):
    return TransformerLock(family.transformer, family.arch, layers, background, processors)


def places(family, lock, count, format):
    """Where a cache has room for a step."""
    shape = KVShape(lock.layers, count, *kv_sizes(family.transformer, family.arch))
    layout = StepLayout.usual(shape, format, torch.float32)
    return layout.packed(torch.empty(layout.nbytes, dtype=torch.uint8))


@torch.no_grad()
def forwards(family, processors, alphas=(0.3, 0.8), format=None, layers=None, mask=None):
    """What the model says in each mode that locks, and what was kept of the source."""
    inside, background = a_mask() if mask is None else mask
    lock = locked(family, background, processors, layers)
    weight = blend_weight(torch.tensor(alphas), inside[None])
    with lock.forward(Mode.IN_BATCH, weight, tokens=TOKENS):
        along = family.predict(3)
    kept = {} if format is None else places(family, lock, len(background), format)
    with lock.forward(Mode.CAPTURE, kept=kept, tokens=TOKENS):
        source = family.predict(1)
    with lock.forward(Mode.STORED, weight, kept, tokens=TOKENS):
        stored = family.predict(2)
    lock.detach()
    return along, source, stored, kept


def values(kept):
    return {key: x if isinstance(x, torch.Tensor) else x.dequantize(torch.float32) for key, x in kept.items()}


@families
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@torch.no_grad()
def test_is_blending_at_the_attention_call(make, alpha):
    family = make()
    inside, background = a_mask()
    weight = blend_weight(torch.full((2,), alpha), inside[None])
    plain = family.predict(3)
    layers = range(len(family.arch.attentions(family.transformer)))
    with AtTheCall(family, weight, layers) as call:
        call.pass_(1, captures=True)
        stored_truth = call.pass_(2, captures=False)
    along, source, stored, _ = forwards(family, "fast", (alpha, alpha), mask=(inside, background))
    torch.testing.assert_close(stored, stored_truth, rtol=0, atol=1e-6)
    torch.testing.assert_close(source, plain[:1], rtol=0, atol=1e-6)
    torch.testing.assert_close(along[:1], plain[:1], rtol=0, atol=1e-6)
    if alpha:
        assert (stored_truth - plain[:2]).abs().max() > 1e-4, "the blend does something"


@families
@torch.no_grad()
def test_the_source_in_the_batch_is_the_source_that_was_kept(make):
    """Rows 1 and 2 are locked to row 0, by a weight for each."""
    family = make()
    inside, background = a_mask(1)
    weight = blend_weight(torch.tensor([0.25, 1.0]), inside[None])
    lock = locked(family, background)
    with lock.forward(Mode.IN_BATCH, weight, tokens=TOKENS):
        along = family.predict(3)
    kept = {}
    with lock.forward(Mode.CAPTURE, kept=kept, tokens=TOKENS):
        family.predict(1)
    whole = torch.cat([torch.zeros(1, TOKENS), weight])
    with lock.forward(Mode.STORED, whole, kept, tokens=TOKENS):
        torch.testing.assert_close(along, family.predict(3), rtol=0, atol=1e-6)


@families
@pytest.mark.parametrize("format", [None, *FORMATS])
def test_is_the_generic_path(make, format):
    """Whatever is kept of the source, in which format, in layers all or some: the same, and kept in the same layout."""
    family = make()
    for layers in (None, (0, 2)):
        one, other = (forwards(family, wish, format=format, layers=layers) for wish in ("generic", "fast"))
        for a, b in zip(one[:3], other[:3], strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-6)
        a, b = values(one[3]), values(other[3])
        assert a.keys() == b.keys() and all(a[key].shape == b[key].shape for key in a)
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=0, atol=1e-6)


@st.composite
def situations(draw):
    inside = torch.tensor(draw(st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS)))
    alphas = draw(st.lists(st.sampled_from([0.0, 0.01, 0.5, 1.0]), min_size=2, max_size=2))
    return inside, alphas, draw(st.sampled_from([None, "fp8_e4m3", "int4"]))


@functools.cache
def shared(name):
    return FAMILIES[name]()


@settings(max_examples=max(10, EXAMPLES // 5), deadline=None)
@given(name=st.sampled_from(list(FAMILIES)), situation=situations())
def test_is_the_generic_path_for_any_mask(name, situation):
    inside, alphas, format = situation
    family, mask = shared(name), (inside, (~inside).nonzero()[:, 0])
    one, other = (forwards(family, wish, tuple(alphas), format, mask=mask) for wish in ("generic", "fast"))
    for a, b in zip(one[:3], other[:3], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("name", list(FAMILIES))
def test_by_the_kernel_itself(monkeypatch, name):
    family = shared(name)
    layers = (1, 2) if name == "hunyuan-video" else (1,)  # a dual block and a single one
    truth = forwards(family, "generic", format="fp8_e4m3", layers=layers)
    monkeypatch.setattr(fast_qkv, "prologue", functools.partial(fast_qkv.prologue, backend="triton"))
    got = forwards(family, "fast", format="fp8_e4m3", layers=layers)
    for a, b in zip(truth[:2], got[:2], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)
    # A value in the middle between two codes may be packed as either.
    torch.testing.assert_close(got[2], truth[2], rtol=0, atol=1e-2)


@families
@torch.no_grad()
def test_several_samples_are_kept_as_by_the_generic_path(make):
    family, kept = make(), {}
    for wish in ("generic", "fast"):
        lock = locked(family, a_mask()[1], wish)
        with lock.forward(Mode.CAPTURE, kept=kept.setdefault(wish, {}), tokens=TOKENS):
            family.predict(3)
        lock.detach()
    for key, x in kept["generic"].items():
        assert x.shape[0] == 3
        torch.testing.assert_close(kept["fast"][key], x, rtol=0, atol=1e-6)


@families
@torch.no_grad()
def test_the_whole_video_as_background(make):
    """Without indices every token of the video is kept; text, where there is any among them, is not."""
    family, outs = make(), []
    weight = torch.full((2, TOKENS), 0.6)
    for wish in ("generic", "fast"):
        lock, kept = locked(family, None, wish), {}
        with lock.forward(Mode.CAPTURE, kept=kept, tokens=TOKENS):
            family.predict(1)
        with lock.forward(Mode.STORED, weight, kept, tokens=TOKENS):
            outs.append(family.predict(2))
        lock.detach()
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-6)


@families
@torch.no_grad()
def test_in_somebody_elses_loop(make):
    """`attach`: any number of forwards, both branches of guidance in one, kept in a format or as they are."""
    family, outs = make(), {}
    inside, _ = a_mask(2)
    for format, wish in product((None, "int8"), ("generic", "fast")):
        with kvf.attach(family.transformer, inside, family=family.arch, format=format, processors=wish) as kv:
            with kv.source():
                family.predict(1)
            with kv.edit(torch.tensor([0.7])):
                one, two = family.predict(1), family.predict(2)
        outs[format, wish] = one, two, kv
        assert untouched(family.transformer)
    for format in (None, "int8"):
        for a, b in zip(outs[format, "generic"][:2], outs[format, "fast"][:2], strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-6)
    assert not torch.equal(outs[None, "fast"][0], outs["int8", "fast"][0])


@torch.no_grad()
def test_rows_of_weights_may_be_repeated():
    """Two samples, both branches in a batch."""
    family, outs = wan(), []
    inside, background = a_mask()
    weight = blend_weight(torch.tensor([0.2, 0.9]), inside[None])
    for wish in ("generic", "fast"):
        lock, kept = locked(family, background, wish), {}
        with lock.forward(Mode.CAPTURE, kept=kept, tokens=TOKENS):
            family.predict(1)
        latents = torch.cat([normal(2, 4, 3, 4, 6, seed=5)] * 2)
        text = normal(4, WORDS, 16, seed=6)
        with lock.forward(Mode.STORED, weight, kept, tokens=TOKENS):
            outs.append(family.transformer(latents, torch.full((4,), 300), text, return_dict=False)[0])
        lock.detach()
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-6)


# What is left as it was


@families
@torch.no_grad()
def test_without_a_lock_the_model_has_its_own_processors_and_bits(make):
    family = make()
    own = dict(family.transformer.attn_processors)
    plain = family.predict(2)
    lock = locked(family, a_mask()[1])
    assert family.transformer.attn_processors == own
    with lock.forward(Mode.OFF, tokens=TOKENS):
        assert family.transformer.attn_processors == own
        assert torch.equal(family.predict(2), plain)
    with lock.forward(Mode.IN_BATCH, torch.zeros(1, TOKENS), tokens=TOKENS):
        ours = [type(x).__name__ for x in family.transformer.attn_processors.values()]
        assert sum("Fast" in name for name in ours) == len(lock.layers)
        family.predict(2)
    assert family.transformer.attn_processors == own
    lock.detach()
    assert untouched(family.transformer) and torch.equal(family.predict(2), plain)


def test_a_forward_that_fails_leaves_nothing_behind():
    family = wan()
    own = dict(family.transformer.attn_processors)
    lock = locked(family, a_mask()[1])
    with pytest.raises(KeyError), lock.forward(Mode.STORED, torch.ones(2, TOKENS), {}, tokens=TOKENS), torch.no_grad():
        family.predict(2)
    assert family.transformer.attn_processors == own and lock.state.prologue is None
    lock.detach()
    assert untouched(family.transformer)


@families
@torch.no_grad()
def test_a_layer_that_is_skipped_is_noticed(make):
    family = make()
    lock = locked(family, a_mask()[1])
    _, first = family.arch.attentions(family.transformer)[0]
    block = next(m for m in family.transformer.modules() if first in m.children())
    x = lambda given, named: given[0] if given else named["hidden_states"]  # noqa: E731
    text = lambda given, named: given[1] if given else named["encoder_hidden_states"]  # noqa: E731
    joint = family.arch.text != "none"
    block.forward = lambda *g, **n: (x(g, n), text(g, n)) if joint else x(g, n)
    skipped = pytest.raises(RuntimeError, match=r"locked projections ran in a forward of .*: layers were skipped")
    with skipped, lock.forward(Mode.IN_BATCH, torch.ones(1, TOKENS), tokens=TOKENS):
        family.predict(2)
    lock.detach()


def test_a_sequence_of_other_tokens_is_refused():
    family = wan()
    lock = locked(family, a_mask()[1])
    other = pytest.raises(RuntimeError, match=f"{TOKENS} tokens, of a video of 12")
    with other, torch.no_grad(), lock.forward(Mode.IN_BATCH, torch.ones(1, 12), tokens=12):
        family.predict(2)
    lock.detach()


# Who has it


def refusal(family, **changes):
    with pytest.raises(InputError) as refused:
        locked(family, None, **changes)
    assert untouched(family.transformer)
    locked(family, None, "auto").detach()  # which declines
    return str(refused.value)


class Own(WanAttnProcessor):
    pass


def test_what_it_would_leave_out_is_refused():
    family = wan()
    attention = family.transformer.blocks[1].attn1
    attention.processor = Own()
    assert "processors is 'fast', but there is no fast path for blocks.1.attn1" in refusal(family)
    assert "has a Own" in refusal(family)
    locked(family, None, layers=(0, 2)).detach()
    attention.processor = WanAttnProcessor()
    attention.processor._parallel_config = object()
    assert "blocks.1.attn1 shares its tokens with other processes" in refusal(family)
    attention.processor = WanAttnProcessor()
    handle = attention.norm_q.register_forward_hook(lambda *_: None)
    assert "hooks on its norms (as by offloading) would be left out" in refusal(family)
    handle.remove()
    attention.norm_q.eps *= 2
    assert "its queries and keys are not normed alike" in refusal(family)
    attention.norm_k = torch.nn.Softsign()
    assert "Softsign is a norm that the prologue does not know" in refusal(family)


def test_a_norm_with_a_forward_of_its_own_is_not_known():
    family = wan()

    class Doubled(torch.nn.RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    family.transformer.blocks[0].attn1.norm_k = Doubled(24)
    assert "Doubled is a norm" in refusal(family)


def test_unknown_words_are_said():
    with pytest.raises(InputError, match="processors must be one of auto, generic, fast, got 'quick'"):
        locked(wan(), None, "quick")


def test_auto_is_generic_without_a_gpu():
    assert locked(wan(), None, "auto").fast is None


def test_the_users_attention_is_used():
    family = wan()
    one = forwards(family, "fast")
    for block in family.transformer.blocks:
        block.attn1.processor._attention_backend = "_native_math"
    seen = []
    from diffusers.models import attention_dispatch

    with pytest.MonkeyPatch.context() as patch:
        stock = attention_dispatch.dispatch_attention_fn
        spy = lambda *given, **named: (seen.append(named["backend"]), stock(*given, **named))[1]  # noqa: E731
        patch.setattr(attention_dispatch, "dispatch_attention_fn", spy)
        other = forwards(family, "fast")
    assert set(seen) == {"_native_math"} and len(seen) == 9
    torch.testing.assert_close(other[0], one[0], rtol=0, atol=1e-5)


# A trial on the GPU


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Tensors stay where they are; the kernel runs in Triton's interpreter."""
    monkeypatch.setattr(fast_path, "device_of", lambda transformer: torch.device("cuda"))
    trial = fast_trial.disagreement.__wrapped__  # without its memory
    monkeypatch.setattr(fast_trial, "disagreement", lambda device, *sizes: trial(torch.device("cpu"), *sizes))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("name", ["wan", "cogvideox-2b", "hunyuan-video"])
def test_auto_is_fast_where_the_kernel_agrees(pretended_gpu, name):
    """Of each kind of norm."""
    lock = locked(FAMILIES[name](), None, "auto")
    assert lock.fast is not None
    lock.detach()


def broken(part):
    def prologue(*given, backend="auto", **named):
        from kvlock_fast.kernels.prologue import prologue

        out = prologue(*given, backend="reference", **named)
        if backend == "triton":
            x = getattr(out, part)
            x = x if x is None or isinstance(x, torch.Tensor) else x.codes.view(torch.uint8)
            if x is not None:
                x.zero_()
        return out

    return prologue


@pytest.mark.parametrize("part", ["q", "k", "v", "captured_k", "captured_v"])
def test_auto_is_generic_and_says_so_where_it_does_not(monkeypatch, pretended_gpu, part):
    monkeypatch.setattr(fast_trial, "prologue", broken(part))
    family, name = wan(), part.replace("_", " ")
    with pytest.warns(InputWarning, match=f"generic path: the prologue's kernel gives other {name} than plain torch"):
        lock = locked(family, None, "auto")
    assert lock.fast is None
    lock.detach()
    with pytest.raises(InputError, match=f"processors is 'fast', but the prologue's kernel gives other {name}"):
        locked(family, None, "fast")
    assert untouched(family.transformer)


def test_and_where_it_does_not_run(monkeypatch, pretended_gpu):
    errors = pytest.importorskip("triton.errors")

    def fail(*given, **named):
        raise errors.TritonError("out of something\nat 3:4")

    monkeypatch.setattr(fast_trial, "prologue", fail)
    with pytest.raises(InputError, match=r"the prologue's kernel does not run on this GPU: out of something$"):
        locked(wan(), None, "fast")


def test_and_for_other_dtypes(monkeypatch, pretended_gpu):
    family = wan()
    family.transformer.double()
    with pytest.raises(InputError, match="processors is 'fast', but the model's dtype is float64"):
        locked(family, None, "fast")


def test_words_and_tokens_differ_in_number():
    """Or a text's keys could not be told from a video's."""
    assert WORDS < TOKENS and normal(1).shape == (1,)


def test_the_librarys_attention_is_attention():
    """Never ours; in fp32, where only torch's own choice is left."""
    from kvlock_fast.kernels.attention import attention, attention_reference
    from kvlock_fast.kernels.launch import recorded_launches

    q, k, v = (normal(2, n, 3, 8, seed=n) for n in (5, 9, 9))
    for backend in ("auto", "triton") if HAS_TRITON else ("auto",):
        with recorded_launches() as launches:
            out = attention(q, k, v, backend=backend, attention="library")
        torch.testing.assert_close(out, attention_reference(q, k, v, 8**-0.5), rtol=0, atol=1e-6)
        assert not launches
