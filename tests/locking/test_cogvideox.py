"""The lock on CogVideoX against its definition: text in front of the video in every self-attention."""

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from hypothesis import given
from hypothesis import strategies as st

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.config import CacheConfig
from kvlock_fast.locking.lock import Mode, TransformerLock, blend_weight
from kvlock_fast.masks import project_mask
from kvlock_fast.models.cogvideox import COGVIDEOX, CogVideoXModel
from tests.pipeline.test_pipeline import call
from tests.support.locks import paper
from tests.support.tiny import COGVIDEOX_KINDS, tiny_cogvideox

KINDS = list(COGVIDEOX_KINDS)
TEXT = 7
TOKENS = {"2b": 18, "5b": 18, "1.5": 12}
PIPES = {kind: tiny_cogvideox(kind) for kind in KINDS}


class Blending:
    """An attention processor that blends K and V where they enter the attention, after RoPE: the oracle of the lock."""

    def __init__(self, foreground, alpha):
        self.foreground, self.alpha, self.kept, self.layer, self.captures = foreground, alpha, {}, 0, True

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = (f(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (
                torch.cat([x[:, :, :text], apply_rotary_emb(x[:, :, text:], image_rotary_emb)], dim=2) for x in (q, k)
            )
        if self.captures:
            self.kept[self.layer] = k, v
        else:
            outside = torch.cat([torch.zeros(text, dtype=torch.bool), ~self.foreground])[None, None, :, None]
            k, v = (
                torch.where(outside, self.alpha * theirs + (1 - self.alpha) * mine, mine)
                for mine, theirs in zip((k, v), self.kept[self.layer], strict=True)
            )
        self.layer += 1
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
        out = attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))
        return out[:, text:], out[:, :text]


def scene(pipe, seed, frames=3):
    """A model, latents of an edit (two rows) and its source, texts, and a random mask."""
    model, generator = CogVideoXModel(pipe), torch.Generator().manual_seed(seed)
    frames += -frames % model.geometry.patch_size[0]
    latents, source = torch.randn(2, 2, 4, frames, 4, 6, generator=generator)
    tokens = frames // model.geometry.patch_size[0] * 6
    inside = torch.rand(tokens, generator=generator) < 0.4
    texts = torch.randn(2, TEXT, 16, generator=generator)
    return model, latents, source[:1], texts, inside


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_locking_is_blending_at_the_attention_call(kind, alpha):
    model, latents, source, texts, inside = scene(tiny_cogvideox(kind), seed=3)
    transformer, timestep = model.transformers[0], torch.tensor(500)
    stock_processor = dict(transformer.attn_processors)
    plain = model.predict(0, latents, timestep, Conditioning(text=texts))

    oracle = Blending(inside, alpha)
    transformer.set_attn_processor(oracle)
    model.predict(0, source, timestep, Conditioning(text=texts[:1]))
    oracle.captures, oracle.layer = False, 0
    expected = model.predict(0, latents, timestep, Conditioning(text=texts))
    transformer.set_attn_processor(stock_processor)

    background = (~inside).nonzero()[:, 0]
    lock, kept = TransformerLock(transformer, COGVIDEOX, background=background), {}
    with lock.forward(Mode.CAPTURE, kept=kept, tokens=len(inside)):
        model.predict(0, source, timestep, Conditioning(text=texts[:1]))
    weight = blend_weight(torch.full((2,), alpha), inside[None])
    with lock.forward(Mode.STORED, weight, kept, tokens=len(inside)):
        stored = model.predict(0, latents, timestep, Conditioning(text=texts))
    rows, words = torch.cat([source, latents]), torch.cat([texts[:1], texts])
    with lock.forward(Mode.IN_BATCH, weight, tokens=len(inside)):
        along = model.predict(0, rows, timestep, Conditioning(text=words))[1:]
    lock.detach()

    torch.testing.assert_close(stored, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(along, expected, rtol=0, atol=1e-6)
    assert torch.equal(stored, plain) == (alpha == 0)
    assert alpha == 0 or (expected - plain).abs().max() > 1e-4  # the blend does something
    assert {x.shape for (_, name), x in kept.items() if name == "k"} == {(1, 2, len(background), 16)}
    assert {x.shape for (_, name), x in kept.items() if name == "v"} == {(1, len(background), 32)}


@pytest.mark.parametrize("cache", [CacheConfig(), CacheConfig(tier="resident", format="native")], ids=["along", "kept"])
@pytest.mark.parametrize("kind", KINDS)
def test_alpha_one_hands_the_source_to_the_background_bit_for_bit(monkeypatch, kind, cache):
    """K and V as they enter the attention, of the source and of both branches; text and foreground keep their own."""
    pipe, seen = tiny_cogvideox(kind), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, *args, **kwargs):
        if key.shape[2] == TEXT + TOKENS[kind]:
            seen.append((key.clone(), value.clone()))
        return attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    lock = paper(alpha=1.0, layers=(0, 2), guidance_batching="separate")
    inside = call(pipe, steps=2, lock=lock, cache=cache).mask.tokens[0]
    assert len(seen) == 3 * 2 * 3  # layers, steps, forwards of a step
    passes = [seen[i * 3 : i * 3 + 3] for i in range(6)]
    # Along: source, both branches, step by step; kept: the source's steps first.
    order = [(0, 1, 2), (3, 4, 5)] if cache.tier != "resident" else [(0, 2, 3), (1, 4, 5)]
    for source, *branches in order:
        for branch in branches:
            for layer in range(3):
                for mine, theirs in zip(passes[branch][layer], passes[source][layer], strict=True):
                    mine, theirs = mine[0, :, TEXT:], theirs[0, :, TEXT:]
                    assert torch.equal(mine[:, ~inside], theirs[:, ~inside]) == (layer in lock.layers)
                    if layer > 0:
                        assert not torch.isclose(mine[:, inside], theirs[:, inside]).all(-1).any()
                words = passes[branch][layer][0][0, :, :TEXT], passes[source][layer][0][0, :, :TEXT]
                assert not torch.equal(*words)


def test_what_is_stored_is_the_backgrounds_video_tokens():
    """The indices count from behind the text."""
    model, _, source, texts, inside = scene(tiny_cogvideox("5b"), seed=0)
    transformer, background = model.transformers[0], (~inside).nonzero()[:, 0]
    whole, seen = {}, []
    layer = transformer.transformer_blocks[1].attn1
    handles = [m.register_forward_hook(lambda m, i, out: seen.append(out.clone())) for m in (layer.norm_k, layer.to_v)]
    lock = TransformerLock(transformer, COGVIDEOX, background=background)
    with torch.no_grad(), lock.forward(Mode.CAPTURE, kept=whole, tokens=len(inside)):
        model.predict(0, source, torch.tensor(100), Conditioning(text=texts[:1]))
    for handle in handles:
        handle.remove()
    lock.detach()
    v, k = sorted(seen, key=lambda x: x.ndim)
    assert torch.equal(whole[1, "k"], k[:, :, TEXT + background]) and k.shape[2] == TEXT + 18
    assert torch.equal(whole[1, "v"], v[:, TEXT + background])


@given(st.sampled_from(KINDS), st.integers(0, 4), st.integers(0, 10**6))
def test_mask_projection_by_brute_force(kind, quads, seed):
    """A token is foreground if any pixel under it is; of an odd number of latent frames 1.5 has the first one twice."""
    geometry = CogVideoXModel(PIPES[kind]).geometry
    frames, pixels = 4 * quads + 1, np.random.default_rng(seed)
    mask = pixels.random((frames, 32, 48)) < 1e-3
    fold = geometry.patch_size[0]
    lead = -(quads + 1) % fold
    expected = np.zeros(((quads + 1 + lead) // fold, 2, 3), bool)
    for f, y, x in np.argwhere(mask):
        latent = 0 if f == 0 else (f - 1) // 4 + 1
        expected[(latent + lead) // fold, y // 16, x // 16] = True
    found = project_mask(torch.from_numpy(mask), geometry)
    assert np.array_equal(found.tokens.view(expected.shape).numpy(), expected)
    assert found.latents.shape[1] == quads + 1 + lead


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_lie_as_the_model_has_them(kind):
    """A change of one token's latents is a change of that row of the model's patches, and the prediction's."""
    model, latents, _, texts, _ = scene(tiny_cogvideox(kind), seed=5)
    patches, geometry = [], model.geometry
    embed = model.transformers[0].patch_embed
    handle = embed.register_forward_hook(lambda m, i, out: patches.append(out[0, TEXT:]))
    for token in range(TOKENS[kind]):
        pixels = torch.zeros(9, 32, 48, dtype=torch.bool)
        t, y, x = np.unravel_index(token, geometry.token_grid(9, 32, 48))
        latent = t * geometry.patch_size[0] + geometry.patch_size[0] - 1 - geometry.lead(3)
        pixels[max(0, 4 * latent - 3), 16 * y, 16 * x] = True
        mask = project_mask(pixels, geometry)
        assert mask.tokens[0].nonzero().flatten().tolist() == [token]
        changed = torch.where(mask.on_latents(mask.tokens)[:, None], latents + 1, latents)[:1]
        for one in (latents[:1], changed):
            embed(texts[:1], one.transpose(1, 2))
        before, after = patches[-2:]
        assert (before != after).any(1).nonzero().flatten().tolist() == [token]
    handle.remove()
