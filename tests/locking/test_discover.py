"""family="auto": transformers that nobody has described, some that must be found and some that must be refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kvlock_fast as kvf
from kvlock_fast.locking.discover import find_and_check
from kvlock_fast.locking.probe import first_tensor
from tests.support import strangers
from tests.support.strangers import STRANGERS, made
from tests.support.tiny import untouched

ALPHA = 0.6


def foreground_of(tokens):
    foreground = torch.rand(1, tokens, generator=torch.Generator().manual_seed(3)) < 0.4
    foreground[0, 1] = True
    return foreground


class SourceAndEdit:
    """Two forwards of a stranger: of its sample, and of other latents."""

    def __init__(self, transformer, sample):
        self.transformer, self.sample = transformer, sample
        self.first = next(iter(sample))
        generator, latents = torch.Generator().manual_seed(9), sample[self.first]
        other = [
            torch.randn(x.shape, generator=generator).to(x)
            for x in ([latents] if torch.is_tensor(latents) else latents)
        ]
        self.other = other[0] if torch.is_tensor(latents) else other

    @torch.no_grad()
    def source(self):
        return first_tensor(self.transformer(**self.sample))

    @torch.no_grad()
    def edit(self):
        return first_tensor(self.transformer(**self.sample | {self.first: self.other}))


class BlendedCalls:
    """`scaled_dot_product_attention` that blends the image's keys and values with those of the source: the oracle.

    The image's tokens are told apart by the calls' lengths: the longest keys are the image's and the text's.
    """

    def __init__(self, monkeypatch, foreground, own, text):
        self.outside, self.own, self.text, self.kept, self.at = ~foreground, own, text, [], None
        self.attention = F.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention", self)

    def __call__(self, query, key, value, *args, **kwargs):
        own = self.own(query, key)
        if own and self.at is None:
            self.kept.append((key, value))
        elif own:
            tokens, others = self.outside.shape[1], key.shape[2] - self.outside.shape[1]
            where = torch.zeros(key.shape[2], dtype=torch.bool)
            first = others if self.text == "prefix" else 0
            where[first : first + tokens] = self.outside[0]
            where = where[:, None]
            key, value = (
                torch.where(where, ALPHA * old + (1 - ALPHA) * new, new)
                for new, old in zip((key, value), self.kept[self.at], strict=True)
            )
            self.at += 1
        return self.attention(query, key, value, *args, **kwargs)


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_found_is_blending_at_the_attention_call(name, monkeypatch):
    make, layers, text = STRANGERS[name]
    transformer, sample, tokens = made(make)
    foreground, both = foreground_of(tokens), SourceAndEdit(transformer, sample)
    arch = find_and_check(transformer, sample, tokens)
    assert untouched(transformer)
    assert len(arch.attentions(transformer)) == layers and arch.text == text
    stock = both.edit()
    with kvf.attach(transformer, foreground, family="auto", sample=sample) as kv:
        rows = len(stock)
        if rows > 1:  # sources are of one row
            one = {k: x[:1] if torch.is_tensor(x) and x.ndim and len(x) == rows else x for k, x in sample.items()}
            both.sample, both.other = one, both.other[:1]
            stock = both.edit()
        with kv.source():
            both.source()
        with kv.edit(ALPHA):
            locked = both.edit()
        assert torch.equal(both.edit(), stock)
    # With the text's own joint blocks, the image's queries and keys number at least its tokens.
    oracle = BlendedCalls(
        monkeypatch, foreground, lambda q, k: q.shape[2] == k.shape[2] >= tokens and _is_the_images(name, k), text
    )
    both.source()
    assert len(oracle.kept) == layers
    oracle.at = 0
    expected = both.edit()
    torch.testing.assert_close(locked, expected, rtol=0, atol=1e-5)
    assert untouched(transformer)
    # Random weights make little of it: what is left of it must still be far from what is off.
    assert 0 < 50 * (locked - expected).abs().max() < (locked - stock).abs().max() or torch.equal(locked, expected)


_CALLS = {}


def _is_the_images(name, key):
    """Cross-attention to a text as long as the image, and the refiner of Z-Image's text, are not the image's."""
    if name in ("pixart", "z-image"):
        _CALLS[name] = _CALLS.get(name, -1) + 1
        pattern = {"pixart": (True, False) * 2, "z-image": (True, False, True, True)}[name]
        return pattern[_CALLS[name] % len(pattern)]
    return True


def test_a_function_is_a_sample_too():
    transformer, sample, tokens = made(strangers.dit)
    calls = []

    def forward():
        calls.append(1)
        return transformer(**sample).sample

    assert find_and_check(transformer, forward, tokens) == find_and_check(transformer, sample, tokens)
    assert len(calls) <= 9


def test_in_half_precision():
    transformer, sample, tokens = made(strangers.sd3)
    transformer = transformer.bfloat16()
    sample = {name: x.bfloat16() for name, x in sample.items()}
    assert len(find_and_check(transformer, sample, tokens).attentions(transformer)) == 2


class Attention(nn.Module):
    """Written by hand, with names of its own; `kind` says what is wrong with it."""

    def __init__(self, kind, dim=16, heads=2):
        super().__init__()
        self.kind, self.heads = kind, heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.k_norm = nn.LayerNorm(dim // heads) if kind != "renamed-norm" else None
        self.magnitude = nn.LayerNorm(dim // heads)
        self.out = nn.Linear(dim, dim)
        self.drop = nn.Dropout(0.5)
        if kind == "fused":
            self.q_proj = self.k_proj = self.v_proj = None
            self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x):
        if self.kind == "fused":
            q, k, v = self.qkv(x).chunk(3, -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        if self.k_norm is not None and self.kind != "idle-norm":
            k = self.k_norm(k)
        if self.kind == "renamed-norm":
            k = self.magnitude(k)
        if self.kind == "twice":
            v = v + self.v_proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        if self.kind == "relu-values":
            v = v.relu()
        if self.kind == "by-hand":
            y = (q @ k.mT).softmax(-1) @ v
        elif self.kind == "linear":
            y = q.relu() @ (k.relu().mT @ v)
        elif self.kind == "halves":  # tokens attend to their half only
            q, k, v = (z.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1) for z in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v)
            y = y.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.drop(self.out(y.transpose(1, 2).flatten(2)))


class Model(nn.Module):
    """A DiT of two layers over [B, S, 4], with registers behind the tokens."""

    def __init__(self, kind="fine", registers=3):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(4, 16), nn.Linear(16, 4)
        self.registers = nn.Parameter(torch.randn(1, registers, 16))
        self.layers = nn.ModuleList(Attention(kind) for _ in range(2))
        if kind == "silent":
            nn.init.zeros_(self.head.weight)
        self.kind = kind

    def forward(self, x):
        tokens = x.shape[1]
        x = torch.cat([self.embed(x), self.registers.expand(len(x), -1, -1)], 1)
        for layer in self.layers if self.kind != "shared" else [self.layers[0]] * 2:
            x = x + layer(x)
        return self.head(x[:, :tokens])


@pytest.mark.parametrize("kind", ["fine", "idle-norm"])
@pytest.mark.parametrize("registers", [0, 3])
def test_a_model_written_by_hand(registers, kind):
    model, latents = Model(kind, registers).eval(), torch.randn(2, 1, 10, 4)
    foreground = foreground_of(10)
    with torch.no_grad(), kvf.attach(model, foreground, family="auto", sample=dict(x=latents[0])) as kv:
        with kv.source():
            source = model(latents[0])
        with kv.edit(1.0):
            locked = model(latents[1])
        with kv.edit(0.0):
            assert torch.equal(model(latents[1]), model(latents[1]))
        with kv.edit(1.0):  # the source locked to itself is the source
            torch.testing.assert_close(model(latents[0]), source)
    assert untouched(model) and not torch.equal(locked, model(latents[1]))


REFUSED = {
    "fused": "come from no projection of their own",
    "renamed-norm": "locking the keys of layers.0 where they are projected is not blending",
    "relu-values": "locking the values of layers.0 where they are projected is not blending",
    "twice": r"layers.0.v_proj runs 2 times in a forward",
    "by-hand": "no attention of its sample was torch's scaled_dot_product_attention",
    "linear": "no attention of its sample was torch's scaled_dot_product_attention",
    "halves": "an attention of layers.0 has 5 tokens of the video, where the foreground has 10",
    "silent": "nothing to check",
    "shared": "layers.0 attends more than once in a forward",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_must_be_refused(kind):
    registers = 0 if kind == "halves" else 3
    model = Model(kind, registers).eval()
    with pytest.raises(kvf.InputError, match=f"family 'auto' does not lock Model: .*{REFUSED[kind]}"):
        kvf.attach(model, foreground_of(10), family="auto", sample=dict(x=torch.randn(1, 10, 4)))
    assert untouched(model) and not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )


def test_a_model_that_is_in_training_is_refused():
    with pytest.raises(kvf.InputError, match=r"two of its forwards differ.*eval mode"):
        kvf.attach(Model().train(), foreground_of(10), family="auto", sample=dict(x=torch.randn(1, 10, 4)))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (dict(x=torch.randn(1, 9, 4)), "has 9 tokens of the video, where the foreground has 10"),
        (dict(y=torch.randn(1, 10, 4)), "its sample failed .TypeError.*'y'"),
        (torch.randn(1, 10, 4), "sample must be a forward's arguments by name, or a function, got Tensor"),
        (None, "family 'auto' needs sample"),
    ],
    ids=["another-size", "another-name", "a-tensor", "nothing"],
)
def test_bad_samples(sample, message):
    model = Model().eval()
    with pytest.raises(kvf.InputError, match=message):
        kvf.attach(model, foreground_of(10), family="auto", sample=sample)
    assert untouched(model)


def test_tokens_that_never_attend_all_to_all_are_refused():
    transformer, sample, tokens = made(strangers.latte)
    with pytest.raises(kvf.InputError, match=r"does not lock LatteTransformer3DModel: .* tokens of the video"):
        find_and_check(transformer, sample, tokens)


@pytest.mark.parametrize("family", [None, "auto"])
@pytest.mark.parametrize("make", [strangers.sana, strangers.sana_video])
def test_linear_attention_is_refused_with_the_reason(make, family):
    transformer, sample, tokens = made(make)
    with pytest.raises(kvf.InputError, match=r"linear attention \(SanaLinearAttn.*summed into one matrix"):
        kvf.attach(transformer, foreground_of(tokens), family=family, sample=sample)
    assert untouched(transformer)
