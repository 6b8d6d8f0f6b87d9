"""CogVideoX's foreground alone, beside its text: the same edit as the whole, with less work."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.config import CacheConfig
from kvlock_fast.locking.lock import Mode, TransformerLock, blend_weight
from kvlock_fast.loop.foreground import edit_region
from kvlock_fast.models.cogvideox import CogVideoXModel
from tests.locking.test_foreground import SATURATED, assert_same, both, token_mask, tokens
from tests.pipeline.test_pipeline import call
from tests.support.locks import paper
from tests.support.tiny import COGVIDEOX_KINDS, tiny_cogvideox, untouched

KINDS = list(COGVIDEOX_KINDS)
TEXT = 7


@pytest.mark.parametrize("format", ["native", "fp8_e4m3", "int4"])
@pytest.mark.parametrize("tier", ["resident", "host", "disk"])
def test_a_stored_sources_edit_is_the_same(tmp_path, tier, format):
    kind = {"resident": "2b", "host": "5b", "disk": "1.5"}[tier]
    cache = CacheConfig(tier=tier, format=format, root=str(tmp_path))
    full, sparse = both(tiny_cogvideox(kind), prompt=["a dog", "a cat"], cache=cache)
    assert_same(full, sparse)
    inside = int(full.mask.tokens.sum())
    assert (tokens(sparse) == inside).all() and inside < full.mask.tokens.shape[1]


@pytest.mark.parametrize("batching", ["batched", "separate"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_runs_along_is_the_same(kind, batching):
    full, sparse = both(tiny_cogvideox(kind), guidance_scale=5.0, guidance_batching=batching)
    assert_same(full, sparse)
    assert sparse.trace.forwards == full.trace.forwards


@pytest.mark.parametrize("kind", KINDS)
def test_a_halo_is_the_same_in_full(kind):
    assert_same(*both(tiny_cogvideox(kind), halo=1, seam="blend", cache=CacheConfig(tier="resident", format="native")))


def test_with_an_ofs_and_unguided():
    assert_same(*both(tiny_cogvideox("1.5", ofs_embed_dim=8), guidance_scale=1.0))


def test_samples_differ_in_what_is_computed():
    prompts = ["a dog", "a cat right over dark stripes", "a red circle"]
    pipe, changes = tiny_cogvideox("5b"), {"omega": "constant", "kappa": 6, "steps": 8, "prompt": prompts}
    smallest, second = sorted(r.variance for r in both(pipe, **changes)[0].trace if r.step == 1)[:2]
    full, sparse = both(pipe, alpha="dynamic", tau=(smallest + second) / 2, **changes)
    assert_same(full, sparse, 1e-4)
    assert any(len(set(row)) == 2 for row in tokens(sparse)), "some step has samples of both kinds"


def test_half_precision_is_as_close_as_its_rounding():
    pipe = tiny_cogvideox("5b")
    for part in (pipe.transformer, pipe.text_encoder):
        part.to(torch.bfloat16)
    noise = torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    full, sparse = both(pipe, latents=noise)
    exact = call(tiny_cogvideox("5b"), lock=paper(**SATURATED), steps=6, latents=noise).latents
    assert (full.latents - sparse.latents).abs().max() <= 2 * (exact - full.latents).abs().max()


@given(st.sampled_from(KINDS), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2), st.integers(0, 10**6))
def test_every_layer_of_every_forward_is_the_same(kind, height, width, halo, seed):
    """Block by block, both on the same source: rows of the foreground and of the text, and the prediction."""
    pipe, generator = PIPES[kind], torch.Generator().manual_seed(seed)
    model, transformer = CogVideoXModel(pipe), pipe.transformer
    patch, grid = model.geometry.patch_size, (2, height, width)
    inside = torch.rand(2 * height * width, generator=generator) < 0.4
    inside[seed % len(inside)] = True
    mask = token_mask(grid, patch, inside)
    region = edit_region(mask, paper(**SATURATED, halo=halo))
    background = (~inside).nonzero()[:, 0]
    latents, source = torch.randn(2, 1, 4, *(n * p for n, p in zip(grid, patch, strict=True)), generator=generator)
    text, timestep = torch.randn(1, TEXT, 16, generator=generator), torch.tensor(400)
    lock, seen, kept = TransformerLock(transformer, model.arch, background=background), [], {}
    blocks = transformer.transformer_blocks
    handles = [block.register_forward_hook(lambda m, i, out: seen.append(out)) for block in blocks]
    with torch.no_grad():
        with lock.forward(Mode.CAPTURE, kept=kept, tokens=len(inside)):
            model.predict(0, source, timestep, Conditioning(text=text))
        seen.clear()
        with lock.forward(Mode.STORED, blend_weight(torch.ones(1), inside[None]), kept, len(inside)):
            whole = model.predict(0, latents, timestep, Conditioning(text=text))
        layers, seen[:] = list(seen), []
        with lock.forward(Mode.FOREGROUND, kept=kept):
            part = model.predict_foreground(lock, latents, timestep, Conditioning(text=text), region, background, None)
    for (video, words), (rows, own) in zip(layers, seen, strict=True):
        torch.testing.assert_close(rows, video[:, region.computed], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own, words, rtol=1e-4, atol=1e-5)
    computed = mask.on_latents((mask.distance(halo) <= halo).float())[:, None] > 0
    torch.testing.assert_close(part, torch.where(computed, whole, 0.0), rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()
    lock.detach()
    assert untouched(transformer)
    assert type(blocks[0].attn1.processor).__name__ == "CogVideoXAttnProcessor2_0"


PIPES = {kind: tiny_cogvideox(kind) for kind in KINDS}


def test_it_computes_less():
    """Products and attention of a step's forward, counted by torch: the share of the tokens, the text among them."""
    model = CogVideoXModel(tiny_cogvideox("5b", num_layers=6))
    inside = torch.zeros(3 * 8 * 8, dtype=torch.bool)
    inside[:20] = True
    region = edit_region(token_mask((3, 8, 8), (1, 2, 2), inside), paper(**SATURATED))
    background = (~inside).nonzero()[:, 0]
    latents, text, timestep = torch.randn(1, 4, 3, 16, 16), torch.randn(1, TEXT, 16), torch.tensor(400)
    lock, kept, counts = TransformerLock(model.transformers[0], model.arch, background=background), {}, []
    with torch.no_grad():
        with FlopCounterMode(display=False) as flops, lock.forward(Mode.CAPTURE, kept=kept, tokens=len(inside)):
            model.predict(0, latents, timestep, Conditioning(text=text))
        counts.append(flops.get_total_flops())
        with FlopCounterMode(display=False) as flops, lock.forward(Mode.FOREGROUND, kept=kept):
            model.predict_foreground(lock, latents, timestep, Conditioning(text=text), region, background, None)
        counts.append(flops.get_total_flops())
    lock.detach()
    share = (20 + TEXT) / (192 + TEXT)
    assert share < counts[1] / counts[0] < share + 0.1


def test_captured_and_compiled_it_is_the_same(monkeypatch):
    from kvlock_fast import pipeline
    from tests.loop.test_graph import RecordedCapture

    lock = paper(tau=0.5, kappa=3, compute="foreground", halo=1, seam="blend")
    arguments = {"lock": lock, "steps": 9, "prompt": ["a dog", "a cat"], "cache": CacheConfig(tier="resident")}
    eager = call(tiny_cogvideox("5b"), **arguments)
    capture = RecordedCapture()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "choose_capture", lambda wish, device, why: capture)
        replayed = call(tiny_cogvideox("5b"), **arguments)
    assert capture.replays >= 4 and torch.equal(replayed.latents, eager.latents)
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend="aot_eager", fullgraph=True))
    torch.compiler.reset()
    arguments |= {"lock": paper(alpha=1.0, compute="foreground"), "steps": 2}
    expected = call(tiny_cogvideox("5b"), **arguments)
    compiled = call(tiny_cogvideox("5b"), compile="regional", **arguments)
    torch.testing.assert_close(compiled.latents, expected.latents, rtol=1e-4, atol=1e-4)
