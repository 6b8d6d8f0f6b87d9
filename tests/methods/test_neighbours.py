"""The methods that KV-Lock is compared with: each against its own paper's formula, and what it must leave alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlock_fast as kvf
from kvlock_fast.cli import main
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.locking.lock import blend_weight
from kvlock_fast.loop.schedule import rounded_steps, share_of_steps, skipped_steps
from kvlock_fast.loop.solver import Solver
from kvlock_fast.loop.source import shift_latents
from kvlock_fast.methods.fatezero import blend_maps
from kvlock_fast.methods.tokenflow import Flow, keyframes_at
from kvlock_fast.presets import NEIGHBOURS
from tests.pipeline.test_pipeline import a_mask, a_video, call, unipc
from tests.support.locks import paper
from tests.support.tiny import tiny_cogvideox, tiny_wan

STEPS = 6
OF_TEXT = [name for name in NEIGHBOURS if name != "vace"]
FROM_INVERTED = {"source_path": "invert"}


def lock(preset, **changes):
    return LockConfig.preset(preset, **changes)


def clean_of(pipe):
    return kvf.KVLockPipeline.from_pipe(pipe).model.encode_video(torch.from_numpy(a_video()))


@pytest.mark.parametrize("preset", OF_TEXT)
def test_every_neighbour_edits(preset):
    out = call(tiny_wan(unipc()), ["a blue circle", "a dog"], lock=preset, steps=STEPS, output="frames")
    assert all(frames.shape == a_video().shape and frames.dtype == np.uint8 for frames in out.frames)
    assert out.latents.isfinite().all()
    steps = STEPS - skipped_steps(lock(preset), STEPS)
    assert out.trace.steps == steps and len(out.trace) == 2 * steps
    changed = (out.latents - clean_of(tiny_wan())).abs().amax((0, 1))
    assert changed[out.mask.latents[0]].max() > 0.1


@pytest.mark.parametrize("preset", OF_TEXT)
def test_several_prompts_equal_one_at_a_time(preset):
    prompts = ["a blue circle", "a dog"]
    together = call(tiny_wan(), prompts, lock=preset, steps=STEPS).latents
    for i, prompt in enumerate(prompts):
        alone = call(tiny_wan(), prompt, lock=preset, steps=STEPS).latents
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    batches = call(tiny_wan(), prompts, lock=preset, steps=STEPS, cache=CacheConfig(prompts_at_once=1))
    if preset != "flowedit":  # whose batches draw noise of their own
        torch.testing.assert_close(batches.latents, together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", ["flowedit", "tokenflow", "fatezero", "kv-edit", "proedit"])
def test_the_backgrounds_latents_can_be_the_sources(preset):
    out = call(tiny_wan(), lock=lock(preset, background_latents="source"), steps=STEPS)
    outside = ~out.mask.latents[:, None].expand_as(out.latents)
    assert torch.equal(out.latents[outside], clean_of(tiny_wan())[outside])


# Steps that are left out.


@pytest.mark.parametrize("skip", [1, 3])
@pytest.mark.parametrize(
    "scheduler",
    [
        lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        unipc,
        lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        lambda: UniPCMultistepScheduler(prediction_type="epsilon"),
    ],
    ids=["euler", "unipc", "dpm++", "diffusion"],
)
def test_left_out_steps_are_as_diffusers_begins_in_the_middle(scheduler, skip):
    solver = Solver(scheduler(), 8, torch.device("cpu"), skip=skip)
    theirs = scheduler()
    theirs.set_timesteps(8)
    theirs.set_begin_index(skip)
    whole = Solver(scheduler(), 8, torch.device("cpu"))
    assert solver.num_steps == 8 - skip and torch.equal(solver.timesteps, theirs.timesteps[skip:])
    assert torch.equal(solver.sigmas, whole.sigmas[skip:]) and torch.equal(solver.signal, whole.signal[skip:])
    torch.manual_seed(0)
    x = y = torch.randn(1, 2, 1, 2, 2)
    for k, t in enumerate(theirs.timesteps[skip:]):
        velocity = torch.randn_like(x)
        x = solver.step(k, velocity, x)
        y = theirs.step(velocity, t, y, return_dict=False)[0]
        assert torch.equal(x, y)


def test_an_edit_begins_on_the_sources_path():
    """With one step left, of which the background is the source's all along, by hand."""
    pipe = tiny_wan()
    out = call(pipe, lock=lock("cfg", skip_share=0.8), steps=5, guidance_scale=1.0)
    model, solver = kvf.KVLockPipeline.from_pipe(pipe).model, Solver(pipe.scheduler, 5, torch.device("cpu"))
    clean = clean_of(pipe)
    noise = model.draw_noise(clean.shape, torch.Generator().manual_seed(1), torch.device("cpu"))
    x = (1 - solver.sigmas[4]) * clean + solver.sigmas[4] * noise
    with torch.no_grad():
        text = model.encode_prompts(["a blue circle"])
        v = pipe.transformer(x, solver.timesteps[4:], encoder_hidden_states=text).sample
    torch.testing.assert_close(out.latents, x + (solver.sigmas[5] - solver.sigmas[4]) * v, rtol=1e-5, atol=1e-5)
    assert out.trace.steps == 1 and out.trace.records[0].sigma == pytest.approx(float(solver.sigmas[4]))


def test_steps_left_out_must_leave_some():
    with pytest.raises(InputError, match=r"skip_share 0\.9 leaves none of 4 steps"):
        call(tiny_wan(), lock=lock("kv-edit", skip_share=0.9), steps=4)


@pytest.mark.parametrize(
    ("share", "steps", "count"),
    [(0.1, 4, 0), (0.1, 20, 2), (0.1, 50, 5), (0.1, 15, 1), (0.1, 5, 0), (0.143, 28, 4), (0.04, 50, 2), (0.04, 8, 0),
     (0.3, 5, 1), (1 / 3, 6, 2), (0.7, 5, 3), (0.0, 9, 0), (1.0, 9, 9), (0.15, 10, 1), (0.35, 10, 3), (0.16, 10, 2)],
)  # fmt: skip
def test_a_share_is_the_nearest_number_of_steps(share, steps, count):
    """A half rounds down, whatever a float makes of it."""
    assert rounded_steps(share, steps) == count


# KV-Edit.


def test_kv_edit_is_the_same_whole_or_by_the_foreground():
    plain = lock("kv-edit", background_bias=0.0)
    sparse = call(tiny_wan(), lock=plain, steps=STEPS, guidance_scale=5.5)
    full = call(tiny_wan(), lock=replace(plain, compute="full"), steps=STEPS, guidance_scale=5.5)
    torch.testing.assert_close(sparse.latents, full.latents, rtol=1e-4, atol=1e-4)
    computed = {record.tokens for record in sparse.trace}
    assert computed == {int(sparse.mask.tokens.sum())}


@pytest.mark.parametrize("tier", ["resident", "disk"])
def test_kv_edit_from_a_cache(tier, tmp_path):
    along = call(tiny_wan(), lock="kv-edit", steps=STEPS)
    cache = CacheConfig(tier=tier, format="native", root=str(tmp_path))
    torch.testing.assert_close(
        call(tiny_wan(), lock="kv-edit", steps=STEPS, cache=cache).latents, along.latents, rtol=1e-4, atol=1e-4
    )
    named = {"source_prompt": "a red circle", "num_inference_steps": STEPS, "lock": lock("kv-edit")}
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan())
    pipe.invert(a_video(), a_mask(), tmp_path / "c", cache=CacheConfig(format="native"), **named)
    saved = pipe(
        a_video(), a_mask(), prompt="a blue circle", cache=CacheConfig(path=str(tmp_path / "c")), output="latent",
        **named,
    )  # fmt: skip
    torch.testing.assert_close(saved.latents, along.latents, rtol=1e-4, atol=1e-4)
    for other in ({"skip_share": 0.5}, {"source_guidance": None}):
        with pytest.raises(InputError, match="was made with"):
            pipe(a_video(), a_mask(), prompt="a", cache=CacheConfig(path=str(tmp_path / "c")),
                 **{**named, "lock": lock("kv-edit", **other)})  # fmt: skip


def test_the_sources_inversion_is_guided_by_itself():
    """The start of the edit by hand: Euler upwards along the guided velocity."""
    pipe, scale, starts = tiny_wan(), 1.5, {}
    for guidance in (None, 1.0, scale):
        changed = lock("cfg", source_guidance=guidance, **FROM_INVERTED)
        starts[guidance] = call(pipe, lock=changed, steps=3, guidance_scale=1.0, negative_prompt="a dog").latents
    assert torch.equal(starts[None], starts[1.0]) and not torch.allclose(starts[None], starts[scale])
    model, solver = kvf.KVLockPipeline.from_pipe(pipe).model, Solver(pipe.scheduler, 3, torch.device("cpu"))
    told, negative, prompt = model.encode_prompts(["a red circle", "a dog", "a blue circle"]).split(1)

    def velocity(x, k, text):
        with torch.no_grad():
            return pipe.transformer(x, solver.timestep_at(k)[None], encoder_hidden_states=text).sample

    x = clean_of(pipe)
    for k in reversed(range(3)):
        c, u = velocity(x, k + 1, told), velocity(x, k + 1, negative)
        x = x + (solver.sigmas[k] - solver.sigmas[k + 1]) * (u + scale * (c - u))
    for k in range(3):
        x = x + (solver.sigmas[k + 1] - solver.sigmas[k]) * velocity(x, k, prompt)
    torch.testing.assert_close(starts[scale], x, rtol=1e-4, atol=1e-4)


# ProEdit.


def test_proedit_without_its_own_is_a_fixed_lock():
    plain = lock("proedit", lock_interval=None, foreground_mix=0.0, latents_shift=0.0)
    fixed = paper(alpha=1.0, omega="constant", s_star=False, **FROM_INVERTED)
    assert plain == fixed
    out = call(tiny_wan(), lock=fixed, steps=STEPS).latents
    for changes in ({"foreground_mix": 0.1}, {"latents_shift": 0.25}, {"lock_interval": (0, 0.5)}):
        other = call(tiny_wan(), lock=lock("s-star-only", s_star=False, **FROM_INVERTED, **changes), steps=STEPS)
        assert not torch.allclose(other.latents, out, atol=1e-3)


def test_the_mix_is_alphas_part_on_the_foreground():
    foreground = torch.tensor([[True, False, True]])
    weight = blend_weight(torch.tensor([1.0, 0.5]), foreground, 0.1)
    torch.testing.assert_close(weight, torch.tensor([[0.1, 1.0, 0.1], [0.05, 0.5, 0.05]]))
    assert torch.equal(blend_weight(torch.ones(1), foreground), torch.tensor([[0.0, 1.0, 0.0]]))


def test_a_mix_of_one_sees_the_source_alone():
    """Then no token's own K and V count: foreground and background are treated alike, whatever the mask."""
    everywhere = lock("s-star-only", s_star=False, foreground_mix=1.0)
    other = a_mask()
    other[:, 16:] = True
    one, two = (call(tiny_wan(), lock=everywhere, steps=STEPS, mask=mask).latents for mask in (a_mask(), other))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_wan, tiny_cogvideox], ids=["wan", "cogvideox"])
def test_proedits_cache_holds_every_token(make, tmp_path):
    along = call(make(), lock="proedit", steps=STEPS)
    batched = call(make(), lock=lock("proedit", guidance_batching="batched"), steps=STEPS)
    torch.testing.assert_close(along.latents, batched.latents, rtol=1e-3, atol=1e-3)
    stored = call(make(), lock="proedit", steps=STEPS, cache=CacheConfig(tier="resident", format="native"))
    torch.testing.assert_close(along.latents, stored.latents, rtol=1e-3, atol=1e-3)
    assert stored.trace.cache["steps"] == share_of_steps(0.5, STEPS)
    assert [record.alpha for record in along.trace] == [1.0] * 3 + [0.0] * 3


def test_a_cache_of_the_background_alone_is_refused(tmp_path):
    given = {"source_prompt": "a red circle", "num_inference_steps": 4}
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan())
    pipe.invert(a_video(), a_mask(), tmp_path / "c", lock=lock("proedit", foreground_mix=0.0), **given)
    with pytest.raises(InputError, match=r"holds the background's tokens only, and foreground_mix 0\.1 needs"):
        pipe(a_video(), a_mask(), prompt="a", lock=lock("proedit"), cache=CacheConfig(path=tmp_path / "c"), **given)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 5), st.floats(0, 1), st.integers(0, 10**6))
def test_the_shift_is_adain_on_the_foreground(channels, frames, side, ratio, seed):
    random = np.random.default_rng(seed)
    start, fresh = (random.normal(mean, scale, (1, channels, frames, side, side)) for mean, scale in ((2, 3), (0, 1)))
    inside = random.random((1, frames, side, side)) < 0.5
    inside[0, 0, 0, :2] = True
    shifted = shift_latents(*(torch.from_numpy(x).float() for x in (start, fresh)), torch.from_numpy(inside), ratio)
    assert torch.equal(shifted[:, :, ~inside[0]], torch.from_numpy(start).float()[:, :, ~inside[0]])
    for c in range(channels):
        x, n = start[0, c][inside[0]], fresh[0, c][inside[0]]
        moved = n.std() * (x - x.mean()) / x.std() + n.mean()
        np.testing.assert_allclose(shifted[0, c][torch.from_numpy(inside[0])], (1 - ratio) * x + ratio * moved,
                                   rtol=1e-3, atol=1e-3)  # fmt: skip


# FlowEdit.


@pytest.mark.parametrize("batching", ["separate", "batched"])
def test_flowedit_with_equal_prompts_is_the_source_bit_for_bit(batching):
    pipe = tiny_wan(unipc())
    equal = lock("flowedit", source_guidance=None, noise_samples=2, guidance_batching=batching)
    out = call(pipe, "a red circle", lock=equal, steps=STEPS, guidance_scale=4.0)
    assert torch.equal(out.latents, clean_of(pipe))


def test_flowedit_is_the_papers_algorithm():
    """In fp64, from diffusers' transformer and sigmas alone: n_avg = 2, n_max = 4 of 6 steps, n_min = 2."""
    pipe, scales = tiny_wan(), (1.5, 5.5)
    ours = lock("flowedit", skip_share=2 / 6, free_share=2 / 6, noise_samples=2)
    out = call(pipe, lock=ours, steps=6, guidance_scale=scales[1], negative_prompt="a dog")
    model, scheduler = kvf.KVLockPipeline.from_pipe(pipe).model, FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    source, negative, prompt = model.encode_prompts(["a red circle", "a dog", "a blue circle"]).double().split(1)
    x_src = clean_of(pipe).double()
    random = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(x_src.shape, generator=random).double()  # noqa: E731
    transformer = pipe.transformer.double()

    @torch.no_grad()
    def v(x, i, text, scale):
        def said(text):
            return transformer(x, scheduler.timesteps[i : i + 1], encoder_hidden_states=text).sample

        return said(negative) + scale * (said(text) - said(negative))

    z, x_tar = x_src.clone(), None
    for i in range(2, 6):
        t, after = scheduler.sigmas[i].double(), scheduler.sigmas[i + 1].double()
        if i < 4:
            total = 0
            for _ in range(2):
                z_src = (1 - t) * x_src + t * draw()
                total = total + v(z + z_src - x_src, i, prompt, scales[1]) - v(z_src, i, source, scales[0])
            z = z + (after - t) * total / 2
        else:
            if x_tar is None:
                x_tar = z + (1 - t) * x_src + t * draw() - x_src
            x_tar = x_tar + (after - t) * v(x_tar, i, prompt, scales[1])
    torch.testing.assert_close(out.latents.double(), x_tar, rtol=1e-4, atol=1e-4)


def test_flowedit_samples_to_the_end_where_all_steps_are_free():
    """Then it is sampling from the source's noisy latent."""
    free = call(tiny_wan(), lock=lock("flowedit", free_share=1.0), steps=STEPS)
    plain = call(tiny_wan(), lock=lock("cfg", skip_share=lock("flowedit").skip_share), steps=STEPS)
    torch.testing.assert_close(free.latents, plain.latents, rtol=1e-4, atol=1e-4)


# TokenFlow.


def test_tokenflow_of_one_frame_is_plain_attention():
    """Every token of an image is its own nearest neighbour."""
    video, mask = a_video(frames=1), a_mask(frames=1)
    shown = {"steps": STEPS, "video": video, "mask": mask}
    out = call(tiny_wan(), lock=lock("tokenflow", inject_share=0.0), **shown).latents
    plain = call(tiny_wan(), lock=lock("cfg", **FROM_INVERTED), **shown).latents
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
    longer = call(tiny_wan(), lock=lock("tokenflow", inject_share=0.0), steps=STEPS).latents
    assert not torch.allclose(
        longer, call(tiny_wan(), lock=lock("cfg", **FROM_INVERTED), steps=STEPS).latents, atol=1e-3
    )


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention64(q, k, v):
    """[N, H, D] in fp64; the output and the maps [H, N, M]."""
    maps = softmax(np.einsum("nhd,mhd->hnm", q, k) / np.sqrt(q.shape[-1]))
    return np.einsum("hnm,mhd->nhd", maps, v), maps


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 7), st.booleans(), st.integers(0, 10**6))
def test_tokenflow_is_the_public_codes_formula(frames, each, stride, step, inject, seed):
    random = np.random.default_rng(seed)
    q, k, v = random.normal(size=(3, 2, frames * each, 2, 4))
    hidden = random.normal(size=(2, frames * each, 3))
    keys = keyframes_at(step, frames, stride)
    assert len(set(keys)) == len(keys) == -(-frames // stride)
    assert all(start <= key < start + stride for start, key in zip(range(0, frames, stride), keys, strict=True))
    flow = Flow(frames, each, stride, keys, inject)
    out = flow(*(torch.from_numpy(x) for x in (q, k, v, hidden))).numpy()
    np.testing.assert_allclose(out[0], attention64(q[0], k[0], v[0])[0])
    at = [slice(f * each, (f + 1) * each) for f in range(frames)]
    chosen = np.concatenate([np.arange(frames * each)[at[key]] for key in keys])
    row = 0 if inject else 1
    extended = attention64(q[row][chosen], k[row][chosen], v[1][chosen])[0]
    unit = hidden[0] / np.linalg.norm(hidden[0], axis=-1, keepdims=True)
    for f in range(frames):
        for p in range(each):
            token = f * each + p
            near = {}
            for place, key in enumerate(keys):
                best = max(range(each), key=lambda i: unit[token] @ unit[key * each + i])
                near[key] = extended[place * each + best]
            group = f // stride
            expected = near[keys[group]]
            if group:
                own, before = (abs(f - (g * stride + stride // 2)) for g in (group, group - 1))
                w = 1 / (1 + np.exp(-before / (own + before)))
                expected = w * near[keys[group]] + (1 - w) * near[keys[group - 1]]
            np.testing.assert_allclose(out[1, token], expected, rtol=1e-5, atol=1e-6)


# FateZero.


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
def test_fatezero_blends_maps(tokens, edits, heads, seed):
    """The maps written out, in fp64."""
    random = np.random.default_rng(seed)
    q, k, v = random.normal(size=(3, 1 + edits, tokens, heads, 4))
    foreground = random.random((1, tokens)) < 0.5
    out = blend_maps(*(torch.from_numpy(x) for x in (q, k, v)), None, torch.from_numpy(foreground)).numpy()
    of_source, source_maps = attention64(q[0], k[0], v[0])
    np.testing.assert_allclose(out[0], of_source)
    for i in range(1, 1 + edits):
        maps = np.where(foreground[0][None, :, None], attention64(q[i], k[i], v[i])[1], source_maps)
        np.testing.assert_allclose(out[i], np.einsum("hnm,mhd->nhd", maps, v[i]))


def test_fatezero_without_a_foreground_is_the_source():
    """All maps the source's: where values are too, so is what comes out."""
    q, k, v = torch.randn(3, 3, 6, 2, 4)
    v = v[:1].expand(3, -1, -1, -1)
    out = blend_maps(q, k, v, None, torch.zeros(1, 6, dtype=torch.bool))
    assert torch.allclose(out[1:], out[:1].expand(2, -1, -1, -1), atol=1e-6)


@pytest.mark.parametrize("method", ["fatezero", "tokenflow"])
def test_without_injection_or_with_an_edit_that_is_the_source(method):
    plain = call(tiny_wan(), lock=lock("cfg", **FROM_INVERTED), steps=STEPS).latents
    if method == "fatezero":
        none = call(tiny_wan(), lock=lock("fatezero", inject_share=0.0), steps=STEPS).latents
        torch.testing.assert_close(none, plain, rtol=1e-4, atol=1e-4)
    much = call(tiny_wan(), lock=lock(method, inject_share=1.0), steps=STEPS).latents
    assert not torch.allclose(much, plain, atol=1e-3)


@pytest.mark.parametrize("method", ["fatezero", "tokenflow"])
def test_processors_are_put_back(method, monkeypatch):
    pipe = tiny_wan()
    before = {name: id(p) for name, p in pipe.transformer.attn_processors.items()}
    call(pipe, lock=method, steps=2)
    assert {name: id(p) for name, p in pipe.transformer.attn_processors.items()} == before
    monkeypatch.setattr("kvlock_fast.methods.attention_loop.attend", None)
    monkeypatch.setattr(f"kvlock_fast.methods.{method}.attend", None)
    with pytest.raises(TypeError):
        call(pipe, lock=method, steps=2)
    assert {name: id(p) for name, p in pipe.transformer.attn_processors.items()} == before


# VACE.


def test_vace_runs_its_own_model_unlocked():
    from tests.families.cases.wan_kin import CASES

    case = next(case for case in CASES if case.name == "wan-vace")
    out = case.edit(case.make(), lock="vace")
    assert torch.equal(out.latents, case.edit(case.make(), lock="cfg").latents)
    assert out.trace.forwards == 2 * case.steps


# What cannot be.


@pytest.mark.parametrize(
    "make, preset, said",
    [
        (tiny_wan, "vace", "the model is of the family wan, and the lock is for 'wan-vace' only"),
        (tiny_cogvideox, "flowedit", "the method 'flowedit' cannot edit here: it follows a flow's velocity"),
        (tiny_cogvideox, "tokenflow", "'tokenflow' cannot edit here: .* the model is of the family cogvideox"),
        (tiny_cogvideox, "fatezero", "'fatezero' cannot edit here: .* the model is of the family cogvideox"),
    ],
)
def test_models_that_a_method_cannot_have(make, preset, said):
    with pytest.raises(InputError, match=said):
        call(make(), lock=preset, steps=STEPS)


@pytest.mark.parametrize("preset", ["flowedit", "tokenflow", "fatezero"])
def test_what_does_not_go_with_a_method(preset, tmp_path):
    with pytest.raises(InputError, match="clip_frames does not go with the method"):
        call(tiny_wan(), lock=preset, steps=STEPS, clip_frames=5, clip_overlap=1)
    with pytest.raises(InputError, match="compile 'regional' does not go with the method"):
        call(tiny_wan(), lock=preset, steps=STEPS, compile="regional")
    with pytest.raises(InputError, match="nothing to keep"):
        kvf.KVLockPipeline.from_pipe(tiny_wan()).invert(
            a_video(), a_mask(), tmp_path, source_prompt="a", lock=lock(preset)
        )
    for name, value in (("alpha", 0.5), ("s_star", True), ("omega", "dynamic"), ("zero_init_share", 0.5)):
        with pytest.raises(ValueError, match=f"^{name} {value!r} does not go with the method '{preset}'"):
            lock(preset, **{name: value})


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"method": "magic"},
            "method must be one of lock, flowedit, tokenflow, fatezero, apg, rfsolver, uniedit, got 'magic'",
        ),
        ({"skip_share": 1.0}, "skip_share must be at least 0 and less than 1, got 1.0"),
        ({"lock_interval": (0, 1.5)}, "lock_interval must be two shares of the steps"),
        ({"foreground_mix": float("nan")}, "foreground_mix must be between 0 and 1, got nan"),
        ({"keyframe_stride": 0}, "keyframe_stride must be a whole number of at least 1, got 0"),
        ({"source_guidance": -2}, "source_guidance must be at least 0, got -2"),
        ({"source_guidance": 2.0}, "source_guidance 2.0 needs source_path 'invert'"),
        ({"foreground_mix": 0.5, "compute": "foreground"}, "foreground_mix 0.5 does not go with compute 'foreground'"),
        ({"family": ""}, "family must be a name, got ''"),
    ],
)
def test_bad_values(changes, said):
    with pytest.raises(ValueError) as caught:
        paper(**changes)
    assert str(caught.value).startswith(said)


OUR_LOOP = {"edit_path": "coupled"}, {"source_noise": 2}, {"skip_share": 0.5}


@pytest.mark.parametrize("changes", [*NEIGHBOURS, *OUR_LOOP], ids=str)
def test_loops_of_other_people_refuse_them(changes):
    pipe, foreground = tiny_wan(), torch.tensor([True, False] * 9)
    asked = lock(changes) if isinstance(changes, str) else LockConfig(**changes)
    said = r"which only KVLockPipeline has|only KVLockPipeline (computes|couples)|draws the source's noise itself"
    with pytest.raises(InputError, match=said):
        kvf.attach(pipe.transformer, foreground, lock=asked, num_steps=4)
    assert not lock("kvlock").neighbour_values and "source_guidance" in lock("kv-edit").neighbour_values


def test_the_command_line_takes_them(tmp_path, capsys):
    files = ["--source", "no.mp4", "--mask", "box:1,1,8,8", "--source-prompt", "a", "--prompt", "b"]
    output = ["--output", str(tmp_path / "o.mp4")]
    assert main(["edit", *files, *output, "--preset", "flowedit", "--noise-samples", "0"]) == 2
    assert "noise_samples must be a whole number of at least 1, got 0" in capsys.readouterr().err
    assert main(["profile", "--preset", "tokenflow", "--config", "demo", "--output", str(tmp_path / "p")]) == 2
    assert "a profile is of a locked edit" in capsys.readouterr().err


def test_the_mix_by_the_fast_path_and_in_stretches():
    """The source's K and V of every token, by the kernel's own reference; and of each stretch."""
    plain, fast = (call(tiny_wan(), lock="proedit", steps=4, processors=p).latents for p in ("generic", "fast"))
    torch.testing.assert_close(plain, fast, rtol=1e-4, atol=1e-4)
    longer, where = np.concatenate([a_video(), a_video(seed=1)])[:17], a_mask(17)
    out = call(tiny_wan(), lock="proedit", steps=4, video=longer, mask=where, clip_frames=9, clip_overlap=4)
    assert out.latents.isfinite().all() and out.latents.shape[2] == 5
