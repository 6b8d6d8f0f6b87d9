"""One suite for all families: what docs/families.md says of each is what passed here."""

from functools import cache

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import kvlock_fast as kvf
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.locking.compatibility import compiled_blocks
from kvlock_fast.locking.fast_path import why_not_fast
from kvlock_fast.locking.lock import Mode
from kvlock_fast.masks import project_mask
from kvlock_fast.models import FAMILIES
from tests.support import matrix
from tests.support.conformance import OFF, PROMPT, Scene, StockCall, all_cases, attention_calls, blend_at_call
from tests.support.locks import paper
from tests.support.tiny import untouched

CASES = {case.name: case for case in all_cases()}


@cache
def representatives():
    """The names of the first cases of each class of transformer."""
    return {case.name for case in {case.transformer: case for case in reversed(CASES.values())}.values()}


@pytest.fixture(params=CASES)
def case(request):
    case = CASES[request.param]
    reason = case.without.get(request.node.originalname)
    if reason is not None:
        pytest.skip(reason)
    return case


@pytest.fixture
def representative(case, request):
    """The case, where it is the first of its transformer's class; the others run with --all."""
    if request.config.getoption("--all") or case.name in representatives():
        return case
    pytest.skip("large: another case of the same class of transformer runs without --all")


def test_the_page_is_of_these_families_and_tests():
    """docs/families.md: `make matrix` makes it anew."""
    text = matrix.PAGE.read_text()
    assert matrix.facts() in text and matrix.INTRO in text
    header, _, *rows = (line for line in text.partition("## ")[0].splitlines() if line.startswith("|"))
    assert header.split("|")[2:-1] == [f" {feature} " for feature in matrix.FEATURES.values()]
    assert [row.split("|")[1].strip() for row in rows] == list(CASES)
    assert not any(word in text for word in ("NO", "not run"))


def stock(case, pipe, guidance=None):
    with torch.no_grad():
        return case.stock(pipe, StockCall(case, case.guidance if guidance is None else guidance)).float()


def test_every_family_has_a_case():
    assert {Scene(case).model.arch.family for case in CASES.values()} >= set(FAMILIES)


@pytest.mark.parametrize("branches", ["guided", "unguided"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_lock_off_is_diffusers_bit_for_bit(case, dtype, branches):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    guidance = case.guidance if branches == "guided" else case.unguided
    if dtype not in case.dtypes or guidance is None:
        pytest.skip(f"the pipeline has no such call: {dtype}, {branches}")
    pipe = case.make()
    for name, part in pipe.components.items():
        if name != "vae" and isinstance(part, torch.nn.Module):
            part.to(dtype)
    expected = stock(case, pipe, guidance)
    out = case.edit(pipe, lock="cfg", guidance_scale=guidance)
    assert torch.equal(out.latents, expected)
    assert out.trace.forwards == case.steps * (2 if case.guided and branches == "guided" else 1)
    if dtype is torch.float32 and branches == "guided":
        assert torch.equal(case.edit(pipe, lock=OFF).latents, expected)
        assert not case.guided or not torch.equal(expected, stock(case, pipe, guidance + 2.5))


@torch.no_grad()
def test_pixels_are_diffusers_own(case):
    pipe = case.make()
    out = case.edit(pipe, lock="cfg", output="frames")
    call = StockCall(case, case.guidance, "np")
    theirs = pipe(**call.arguments).frames[0] if case.frames is None else case.frames(pipe, call)
    error = np.abs(out.frames[0].astype(int) - np.round(theirs * 255).astype(int))
    assert out.frames[0].shape == (*case.size, 3) and error.max() <= 1


@torch.no_grad()
def test_encoding_is_the_inverse_of_what_decoding_does_to_latents(case, monkeypatch):
    scene = Scene(case)
    vae, modes, given = scene.pipe.vae, [], []
    encode, decode = vae.encode, vae.decode

    def spied_encode(x, *args, **kwargs):
        out = encode(x, *args, **kwargs)
        modes.append(out.latent_dist.mode())
        return out

    monkeypatch.setattr(vae, "encode", spied_encode)
    monkeypatch.setattr(vae, "decode", lambda z, *args, **kwargs: given.append(z) or decode(z, *args, **kwargs))
    latents = scene.model.encode_video(torch.from_numpy(case.video()))
    frames = scene.model.decode(latents, case.size[0])
    assert frames.shape == (1, *case.size, 3) and frames.dtype == torch.uint8
    torch.testing.assert_close(given[0].flatten(), modes[0].flatten(), rtol=1e-4, atol=1e-5)
    assert modes[0].std() > 0


@torch.no_grad()
def test_locking_is_blending_at_the_attention_call(case):
    scene = Scene(case)
    told, of_source = scene.told
    blend = case.blend or blend_at_call
    plain, seen = scene.predict(scene.latents, told), {}
    with attention_calls(scene, lambda i, k, v: seen.update({i: (k, v)}) or (k, v)) as calls:
        scene.predict(scene.source, of_source)
    layers = len(scene.model.arch.attentions(scene.transformer))
    assert len(calls) == layers * case.calls, "every attention of the video's tokens to themselves is one to lock"

    background = (~scene.inside).nonzero()[:, 0]
    kept, lock = scene.kept(scene.source, background), scene.lock(background)
    rows = torch.cat([scene.source, scene.latents])
    for alpha in (0.0, 0.7, 1.0):

        def blended(i, *kv, alpha=alpha):
            return tuple(blend(x, source, scene, alpha) for x, source in zip(kv, seen[i], strict=True))

        with attention_calls(scene, blended):
            expected = scene.predict(scene.latents, told)
        with lock.forward(Mode.STORED, scene.weight(alpha), kept, scene.tokens, ahead=scene.ahead):
            stored = scene.predict(scene.latents, told)
        with lock.forward(Mode.IN_BATCH, scene.weight(alpha), tokens=scene.tokens, ahead=scene.ahead):
            along = scene.predict(rows, type(told).cat([of_source, told]))[1:]
        assert lock.state.fired.total() == 2 * layers
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(stored, expected, rtol=0, atol=case.tolerance * scale)
        torch.testing.assert_close(along, expected, rtol=0, atol=10 * case.tolerance * scale)
        assert torch.equal(stored, plain) == (alpha == 0)
        assert alpha == 0 or (expected - plain).abs().max() > 1e-4 * scale, "the blend does something"
    with lock.forward(Mode.OFF):
        assert torch.equal(scene.predict(scene.latents, told), plain)
    lock.detach()


def test_the_model_is_left_as_it_was(case):
    pipe = case.make()
    transformers = [t for t in (pipe.transformer, getattr(pipe, "transformer_2", None)) if t is not None]
    expected = stock(case, pipe)
    before = [{name: (type(m), set(vars(m))) for name, m in t.named_modules()} for t in transformers]
    keys = [list(t.state_dict()) for t in transformers]
    out = case.edit(pipe)
    assert [{name: (type(m), set(vars(m))) for name, m in t.named_modules()} for t in transformers] == before
    assert [list(t.state_dict()) for t in transformers] == keys and all(untouched(t) for t in transformers)
    assert torch.equal(stock(case, pipe), expected)
    assert not torch.equal(out.latents, expected)


def test_skipped_layers_are_noticed(case, monkeypatch):
    """A block that is left out: the count of locked projections that ran says so."""
    pipe = case.make()
    model = kvf.KVLockPipeline.from_pipe(pipe).model
    _, attention = model.arch.attentions(model.transformers[0])[-1]
    monkeypatch.setattr(attention, "forward", skipped)
    with pytest.raises(RuntimeError, match="locked projections ran"):
        case.edit(pipe, steps=2)


def skipped(hidden_states, encoder_hidden_states=None, *args, **kwargs):
    """What an attention gives, without one: its inputs; two of them where text goes with the video."""
    return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


@torch.no_grad()
def test_tokens_lie_as_the_model_has_them(case):
    """A change of one token's latents is a change of that row of the first layer's keys, and of no other."""
    scene = Scene(case)
    before = scene.kept(scene.latents)[0, "v"]
    assert before.shape[1] == scene.tokens
    able = scene.model.may_change(torch.ones(case.size, dtype=torch.bool))
    able = project_mask(able, scene.model.geometry).tokens[0].nonzero()[:, 0]
    for token in np.random.default_rng(0).permutation(able)[:6]:
        one = torch.zeros_like(scene.mask.tokens)
        one[0, token] = True
        changed = scene.latents + scene.mask.on_latents(one.float())[:, None]
        after = scene.kept(changed)[0, "v"]
        rows = (after != before).flatten(2).any(2).any(0)
        assert rows.nonzero().flatten().tolist() == [token]


@torch.no_grad()
def test_a_pixel_reaches_the_tokens_that_the_mask_says(case):
    """A token is foreground if any pixel under it is, by counting; and the autoencoder has as many latent frames."""
    scene, rng = Scene(case), np.random.default_rng(3)
    geometry = scene.model.geometry
    pixels = rng.random(case.size) < 1e-3
    pixels[tuple(rng.integers(case.size))] = True
    grid, expected = geometry.token_grid(*case.size), []
    sizes = (scene.source.shape[2] - scene.mask.beside, *scene.source.shape[3:])
    lead = sizes[0] - len({latent_frame(geometry, f) for f in range(case.size[0])})
    for f, y, x in np.argwhere(pixels):
        at = latent_frame(geometry, f) + lead, y // geometry.spatial_stride, x // geometry.spatial_stride
        expected.append(tuple(n // patch for n, patch in zip(at, geometry.patch_size, strict=True)))
    found = project_mask(torch.from_numpy(pixels), geometry).tokens
    assert {tuple(token) for token in found.view(grid).nonzero().tolist()} == set(expected)
    assert tuple(-(-n // p) for n, p in zip(sizes, geometry.patch_size, strict=True)) == grid


def latent_frame(geometry, frame):
    """Which of the latent frames a frame is in: the first alone, where the autoencoder is causal."""
    return -(-int(frame) // geometry.temporal_stride) if geometry.causal else int(frame) // geometry.temporal_stride


def test_whole_edits(case):
    """The source along, kept, and kept in fp8. With the background's latents from it, what may not change has not."""
    pipe, edits = case.make(), {}
    lock = LockConfig.preset("kvlock", background_latents="source", kappa=2)
    with torch.no_grad():
        clean = kvf.KVLockPipeline.from_pipe(pipe).model.encode_video(torch.from_numpy(case.video()))
    for format in ("along", "native", "fp8_e4m3"):
        cache = CacheConfig() if format == "along" else CacheConfig(tier="resident", format=format)
        out = case.edit(pipe, lock=lock, cache=cache, output="latent" if format == "native" else "frames")
        assert out.latents.isfinite().all()
        assert format == "native" or out.frames[0].shape == (*case.size, 3)
        outside = ~out.mask.latents[:, None].expand_as(out.latents)
        torch.testing.assert_close(out.latents[outside], clean.expand_as(out.latents)[outside], rtol=1e-5, atol=1e-5)
        locked = [record for record in out.trace.records if record.alpha > 0]
        assert locked and all(np.isfinite(record.s_star) for record in out.trace.records)
        edits[format] = out.latents
    for format, most in (("native", 1e-4), ("fp8_e4m3", 0.1)):
        assert (edits[format] - edits["along"]).norm() < most * edits["along"].norm()


def test_several_prompts_equal_one_at_a_time(case):
    pipe, prompts = case.make(), [PROMPT, "a green square"]
    lock = LockConfig.preset("kvlock", kappa=2)
    together = case.edit(pipe, prompts, lock=lock)
    for i, prompt in enumerate(prompts):
        alone = case.edit(pipe, prompt, lock=lock)
        torch.testing.assert_close(together.latents[i], alone.latents[0], rtol=1e-3, atol=1e-3)


def test_compiled_blocks_take_one_graph_for_all_alphas(representative, monkeypatch):
    _compile_by(monkeypatch, "aot_eager", representative)


@pytest.mark.large
def test_blocks_compiled_by_inductor(representative, monkeypatch):
    if representative.name not in representatives():
        pytest.skip("another case of the same class of transformer")
    _compile_by(monkeypatch, "inductor", representative)


def _compile_by(monkeypatch, backend, case):
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend=backend, fullgraph=True))
    torch.compiler.reset()
    counters.clear()
    try:
        _compiled(case)
    finally:
        torch.compiler.reset()


@torch.no_grad()
def _compiled(case):
    scene, counts = Scene(case), []
    background = (~scene.inside).nonzero()[:, 0]
    kept, lock = scene.kept(scene.source, background), scene.lock(background)
    for alpha in (0.0, 0.3, 1.0):
        with lock.forward(Mode.STORED, scene.weight(alpha), kept, scene.tokens, ahead=scene.ahead):
            eager = scene.predict(scene.latents, scene.told[0])
        with (
            compiled_blocks([scene.transformer], "regional", scene.model.arch.blocks),
            lock.forward(Mode.STORED, scene.weight(alpha), kept, scene.tokens, ahead=scene.ahead),
        ):
            compiled = scene.predict(scene.latents, scene.told[0])
        scale = max(1.0, eager.abs().max().item())
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=max(1e-4, case.tolerance) * scale)
        counts.append(counters["stats"]["unique_graphs"])
    lock.detach()
    assert counts[0] > 0 and counts[1:] == counts[:1] * 2


def test_the_fast_path_is_the_generic_one(representative):
    """Locked attentions by the prologue, on a source that runs along and on one that is kept."""
    case = representative
    pipe = case.make()
    model = kvf.KVLockPipeline.from_pipe(pipe).model
    attentions = dict(enumerate(model.arch.attentions(model.transformers[0])))
    reason = why_not_fast(model.transformers[0], attentions)
    if reason is not None:
        with pytest.raises(kvf.InputError, match="processors is 'fast', but"):
            case.edit(pipe, processors="fast")
        pytest.skip(reason)
    for config in (CacheConfig(), CacheConfig(tier="resident", format="native")):
        fast, generic = (case.edit(pipe, processors=wish, cache=config).latents for wish in ("fast", "generic"))
        torch.testing.assert_close(fast, generic, rtol=1e-3, atol=1e-3)


def test_foreground_only_is_exact(case):
    pipe = case.make()
    if not hasattr(kvf.KVLockPipeline.from_pipe(pipe).model, "predict_foreground"):
        pytest.skip("the family has no forward of the foreground alone")
    lock = {"alpha": 1.0, "s_star_region": "foreground", "background_latents": "source"}
    whole = case.edit(pipe, lock=paper(**lock))
    alone = case.edit(pipe, lock=paper(**lock, compute="foreground"))
    torch.testing.assert_close(alone.latents, whole.latents, rtol=1e-4, atol=1e-4)
    assert alone.trace.records[0].tokens < whole.mask.tokens.shape[1]
