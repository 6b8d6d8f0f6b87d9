"""Edits with CogVideoX: off against diffusers itself, steps against their formulas, every kind of model and tier."""

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import kvlock_fast as kvf
from kvlock_fast.cache import layout
from kvlock_fast.config import PRESETS, CacheConfig, LockConfig
from kvlock_fast.errors import InputWarning
from kvlock_fast.loop import solver
from kvlock_fast.loop.schedule import asks_source, can_lock
from kvlock_fast.models.cogvideox import CogVideoXModel
from kvlock_fast.planning.find_model import from_pipeline
from kvlock_fast.presets import NEIGHBOURS
from kvlock_fast.report import token_preview
from tests.pipeline.test_pipeline import FRAMES, HEIGHT, WIDTH, Spy, a_mask, a_video, call, latent_of, text_of
from tests.support.locks import paper
from tests.support.tiny import COGVIDEOX_KINDS, COGVIDEOX_SCHEDULE, tiny_cogvideox, tiny_wan, untouched

KINDS = list(COGVIDEOX_KINDS)
TEXT = 7


def stock(pipe, prompt="a blue circle", steps=5, seed=1, **changes):
    """diffusers' own latents, as [B, C, T, h, w] fp32."""
    frames = pipe(
        prompt, height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=steps, output_type="latent",
        generator=torch.Generator().manual_seed(seed), max_sequence_length=TEXT, **changes,
    ).frames  # fmt: skip
    return frames.transpose(1, 2).float()


def half(pipe):
    """As people run it: all but the autoencoder in bf16."""
    pipe.transformer.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    return pipe


def unipc():
    return UniPCMultistepScheduler(prediction_type="v_prediction")


@pytest.mark.parametrize("guidance", [1.0, 6.0], ids=["no-cfg", "cfg"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_lock_off_is_diffusers_bit_for_bit(kind, dtype, guidance):
    pipe = tiny_cogvideox(kind)
    pipe = half(pipe) if dtype == "bf16" else pipe
    expected = stock(pipe, guidance_scale=guidance)
    off = paper(alpha=0.0, omega="constant", s_star=False)
    for lock in (off, "cfg"):
        out = call(pipe, lock=lock, guidance_scale=guidance)
        assert torch.equal(out.latents, expected)
    assert out.trace.forwards == 5 * (1 if guidance == 1.0 else 2)
    assert not torch.equal(expected, stock(pipe, guidance_scale=guidance + 1))  # guidance 1 is none, 2 is some


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("scheduler", [unipc, lambda: DDIMScheduler(**COGVIDEOX_SCHEDULE)], ids=["unipc", "ddim"])
def test_other_schedulers_are_diffusers_bit_for_bit(scheduler, dtype):
    pipe = tiny_cogvideox("5b", scheduler())
    pipe = half(pipe) if dtype == "bf16" else pipe
    expected = stock(pipe, guidance_scale=4.0, negative_prompt="a dog", steps=7)
    assert torch.equal(call(pipe, lock="cfg", guidance_scale=4.0, negative_prompt="a dog", steps=7).latents, expected)


def test_the_bits_hang_on_one_call_for_both_branches():
    """And on the order of its rows: what is compared above could come out wrong."""
    pipe = tiny_cogvideox()
    asked = []
    spied = pipe.transformer.forward
    pipe.transformer.forward = lambda **inputs: asked.append(inputs["encoder_hidden_states"]) or spied(**inputs)
    call(pipe, lock="cfg", steps=1, negative_prompt="a dog")
    torch.testing.assert_close(asked[0], torch.stack([text_of(pipe, "a dog"), text_of(pipe, "a blue circle")]))


def test_a_lock_of_hardly_any_weight_hardly_changes_a_thing():
    pipe = tiny_cogvideox("5b")
    lock = paper(warmup_alpha=0.0, kappa=5, tau=1e30, variance_window=2, omega="constant", s_star=False)
    out = call(pipe, lock=lock, guidance_scale=5.0)
    assert max(record.alpha for record in out.trace.records) < 1e-20 and out.trace.forwards > 10
    torch.testing.assert_close(out.latents, stock(pipe, guidance_scale=5.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["native", "bf16", "fp8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("tier", ["resident", "host", "disk"])
def test_every_tier_and_format(tmp_path, tier, format):
    kind = {"resident": "2b", "host": "5b", "disk": "1.5"}[tier]
    pipe, arguments = tiny_cogvideox(kind), {"prompt": ["a dog", "a cat"], "guidance_scale": 3.0}
    every = LockConfig(guidance_skip=False)
    along = call(pipe, lock=every, **arguments)
    cache = CacheConfig(tier=tier, format=format, root=str(tmp_path))
    kept = call(pipe, lock=every, cache=cache, **arguments)
    assert kept.trace.forwards == 5 + 5 * 4 and along.trace.forwards == 5 * 5
    error = ((kept.latents - along.latents).norm() / along.latents.norm()).item()
    assert error < {"native": 1e-5, "bf16": 1e-2, "fp8_e4m3": 3e-2, "int8": 1e-2, "int4": 1e-1}[format]
    assert kept.trace.cache["tier"] == tier and kept.trace.cache["format"] == format


@pytest.mark.parametrize("compute", ["full", "foreground"])
@pytest.mark.parametrize("tier", ["resident", "host", "disk"])
def test_scales_that_tokens_share(monkeypatch, tmp_path, tier, compute):
    """As in long sequences; a saved source says so, and one that was made before is read as it is."""
    lock = paper(alpha=1.0, s_star_region="foreground", background_latents="source", compute=compute)
    pipe, arguments = tiny_cogvideox("5b"), {"lock": lock, "prompt": ["a dog", "a cat"]}
    cache = CacheConfig(tier=tier, root=str(tmp_path))
    along, alone = call(pipe, **arguments), call(pipe, cache=cache, **arguments)
    monkeypatch.setattr(layout, "LONG", 1)
    shared = call(pipe, cache=cache, **arguments)
    assert not torch.equal(shared.latents, alone.latents)
    for kept in (alone, shared):
        assert (kept.latents - along.latents).norm() < 0.03 * along.latents.norm()
    again = call(pipe, cache=cache, **arguments)
    assert torch.equal(again.latents, shared.latents)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in NEIGHBOURS])
def test_every_preset_edits(preset):
    lock = LockConfig.preset(preset, kappa=3)
    out = call(tiny_cogvideox("1.5"), lock=lock, steps=6, output="frames")
    assert out.frames[0].shape == (FRAMES, HEIGHT, WIDTH, 3) and out.latents.isfinite().all()
    steps = out.trace.steps
    of_source = sum(asks_source(lock) or can_lock(lock, steps, k) for k in range(steps))
    guided = sum(record.omega != 1 for record in out.trace)
    assert out.trace.forwards == of_source + steps + guided


@pytest.mark.parametrize(
    "scheduler",
    [unipc, lambda: DPMSolverMultistepScheduler(prediction_type="v_prediction"), DDIMScheduler(**COGVIDEOX_SCHEDULE)],
    ids=["unipc", "dpm++", "ddim"],
)
def test_a_table_edits_as_the_scheduler_itself(monkeypatch, scheduler):
    pipe = tiny_cogvideox("5b", scheduler() if callable(scheduler) else scheduler)
    by_table = call(pipe, lock="kvlock", guidance_scale=4.0, steps=6)
    monkeypatch.setattr(solver, "_table", lambda *_: None)
    with pytest.warns(InputWarning, match="has no table"):
        by_scheduler = call(pipe, lock="kvlock", guidance_scale=4.0, steps=6)
    torch.testing.assert_close(by_table.latents, by_scheduler.latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_batched_and_separate_agree(kind):
    one, two = (
        call(tiny_cogvideox(kind), lock=LockConfig.preset("kvlock", guidance_batching=batching, kappa=3)).latents
        for batching in ("separate", "batched")
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batching", ["separate", "batched"])
def test_several_prompts_equal_one_at_a_time(batching):
    pipe = tiny_cogvideox("5b")
    prompts = ["a blue circle", "a green square moves left", "a dog"]
    lock = paper(kappa=4, tau=0.5, variance_window=3, guidance_batching=batching)
    together = call(pipe, prompts, steps=6, lock=lock)
    for i, prompt in enumerate(prompts):
        alone = call(pipe, prompt, steps=6, lock=lock)
        torch.testing.assert_close(together.latents[i], alone.latents[0], rtol=1e-4, atol=1e-4)
        mine = [r for r in together.trace.records if r.sample == i]
        for a, b in zip(mine, alone.trace.records, strict=True):
            assert a.alpha == pytest.approx(b.alpha, abs=1e-4) and a.s_star == pytest.approx(b.s_star, abs=1e-4)


def test_every_step_sees_the_formulas(monkeypatch):
    """Rows of each forward, s*, x0hat, alpha, omega and DDIM's step recomputed by hand in fp64."""
    pipe, prompt = tiny_cogvideox("2b"), "a blue circle"
    lock = paper(background_latents="source", s_star_region="foreground", kappa=3, tau=0.5, variance_window=2)
    clean, texts = latent_of(pipe), [text_of(pipe, p) for p in ("a red circle", "a dog", prompt)]
    spy = Spy(monkeypatch, pipe)
    out = call(pipe, prompt, lock=lock, guidance_scale=4.0, negative_prompt="a dog")
    noise = torch.randn(1, 3, 4, 4, 6, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    inside = out.mask.latents[0].expand(4, -1, -1, -1)
    kept = pipe.scheduler.alphas_cumprod.double()
    timesteps = [999, 799, 599, 399, 199]
    a = torch.stack([*kept[timesteps].sqrt(), torch.ones(()).double()])
    b = (1 - a**2).sqrt()
    history, x = [], torch.where(inside, noise, a[0] * clean + b[0] * noise).double()[0]
    for k, ((timestep, rows, text, answer), record) in enumerate(zip(spy.calls, out.trace, strict=True)):
        assert timestep == timesteps[k] == record.timestep and record.sigma == pytest.approx(b[k].item(), abs=1e-6)
        torch.testing.assert_close(text, torch.stack(texts))
        rows, answer = rows.transpose(1, 2).double(), answer.transpose(1, 2).double()
        torch.testing.assert_close(rows[0], (a[k] * clean + b[k] * noise)[0].double(), rtol=1e-4, atol=1e-5)
        for row in rows[1:]:
            torch.testing.assert_close(row, x, rtol=1e-4, atol=1e-5)
        _, u, c = answer
        s_star = (c * u)[inside].sum() / (u[inside].square().sum() + 1e-8)
        assert record.s_star == pytest.approx(s_star.item(), rel=1e-4)
        variance = torch.stack(history[-2:]).var(0)[inside].mean() if k >= 2 else None
        omega = 4.0 if variance is None else 4.0 * min(variance.item() / 0.5, 2.0)
        assert record.omega == pytest.approx(omega, rel=1e-3)
        assert record.alpha == pytest.approx(1.0 if variance is None else min(variance.item() / 0.5, 1.0), rel=1e-3)
        v = s_star * u + omega * (c - s_star * u)
        history.append(a[k] * x - b[k] * v)
        after = a[k + 1] * history[-1] + b[k + 1] * (b[k] * x + a[k] * v)
        x = torch.where(inside, after, (a[k + 1] * clean + b[k + 1] * noise)[0].double())
    torch.testing.assert_close(out.latents[0].double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_background_latents_source_ends_at_the_source(kind):
    pipe = half(tiny_cogvideox(kind))
    out, clean = call(pipe, lock="kvlock"), latent_of(pipe)
    outside = ~out.mask.latents[0].expand(4, -1, -1, -1)
    assert torch.equal(out.latents[0][outside], clean[0][outside])
    assert not torch.isclose(out.latents[0][~outside], clean[0][~outside], atol=1e-3).all()


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_inversion_and_replay_return_to_the_source(method):
    """The closer the more steps there are: of DDIM, four times as many leave a fourth of the way."""
    pipe, clean = tiny_cogvideox("5b"), latent_of(tiny_cogvideox("5b"))
    lock = paper(source_path="invert", inversion_solver=method, alpha=0.0, omega="constant", s_star=False)
    away = {}
    for steps in (10, 40):
        out = call(pipe, "a red circle", steps=steps, lock=lock, guidance_scale=1.0)
        assert out.trace.forwards == steps * (2 if method == "euler" else 3)
        away[steps] = ((out.latents - clean).norm() / clean.norm()).item()
    assert away[40] < 0.5 and away[10] / away[40] > 2.5, away


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_longer_than_the_window(kind):
    """In stretches, their positions those of a short clip; a window as long as the clip changes nothing."""
    pipe = tiny_cogvideox(kind)
    long = {"video": a_video(33), "mask": a_mask(33), "steps": 3, "lock": "kvlock", "guidance_scale": 3.0}
    whole = call(pipe, **long)
    assert torch.equal(call(pipe, clip_frames=40, **long).latents, whole.latents)
    along, kept = (
        call(pipe, clip_frames=17, clip_overlap=4, cache=cache, **long)
        for cache in (CacheConfig(), CacheConfig(tier="resident", format="native"))
    )
    assert along.latents.shape == whole.latents.shape and not torch.equal(along.latents, whole.latents)
    torch.testing.assert_close(kept.latents, along.latents, rtol=1e-4, atol=1e-4)


def test_the_preview_shows_the_tokens_over_a_frame():
    """Of 1.5's: frame 0 and its lead-in in the first row of tokens, then two latent frames in each."""
    geometry = CogVideoXModel(tiny_cogvideox("1.5")).geometry
    for frame in (0, 1, 4, 5, 8):
        mask = np.zeros((9, 32, 48), bool)
        mask[frame, 20, 20] = True
        view = token_preview.view_tokens(a_video(), mask, geometry, None, "pad")
        assert view.tokens.shape == (2, 2, 3) and view.tokens.sum() == 1
        assert [bool(view.tokens_over(i)[1, 1]) for i in range(9)] == [(i > 0) == (frame > 0) for i in range(9)]


def test_frames_are_padded_to_what_the_autoencoder_decodes():
    """Five frames would be two latent ones, of which it makes eight frames."""
    with pytest.warns(InputWarning, match="5 frames padded to 9"):
        out = call(tiny_cogvideox(), video=a_video(5), mask=a_mask(5), output="frames", steps=2)
    assert out.frames[0].shape[0] == 5 and out.latents.shape[2] == 3
    with pytest.warns(InputWarning, match="15 frames trimmed to 9, a multiple of 8 plus 1"):
        call(tiny_cogvideox(), video=a_video(15), mask=a_mask(15), steps=1, frames_policy="trim")


def test_an_inverted_source_is_edited(tmp_path):
    pipe = tiny_cogvideox("2b")
    lock = LockConfig.preset("kvlock", source_path="invert")
    along = call(pipe, lock=lock)
    kept = call(pipe, lock=lock, cache=CacheConfig(tier="disk", format="native", root=str(tmp_path)))
    torch.testing.assert_close(kept.latents, along.latents, rtol=1e-4, atol=1e-4)


def test_odd_latent_frames_of_15_have_a_lead_in():
    """As diffusers' image-to-video pipeline has it: the first latent frame once more in front, dropped at the end."""
    pipe = tiny_cogvideox("1.5")
    model = CogVideoXModel(pipe)
    for frames in (1, 9, 17):
        video = torch.from_numpy(a_video(frames))
        with torch.no_grad():
            latents, own = model.encode_video(video), pipe.vae.encode(video.permute(3, 0, 1, 2)[None] / 127.5 - 1)
        own = own.latent_dist.mode() * 0.7
        lead = own.shape[2] % 2
        assert latents.shape[2] == own.shape[2] + lead and torch.equal(latents[:, :, lead:], own)
        assert torch.equal(latents[:, :, 0], own[:, :, 0])
        with torch.no_grad():
            decoded, expected = model.decode(latents, frames), pipe.vae.decode(own / 0.7).sample
        assert decoded.shape == (1, frames, 32, 48, 3)
        expected = ((expected + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 4, 1)
        assert (decoded - expected).abs().max() <= 1


def test_tiled_decoding_leaves_the_autoencoder_as_it_was():
    pipe = tiny_cogvideox()
    latents = torch.randn(1, 4, 3, 4, 6)
    with torch.no_grad():
        one, two = (CogVideoXModel(pipe).decode(latents, 9, tiled=tiled) for tiled in (False, True))
    assert one.shape == two.shape == (1, 9, 32, 48, 3) and not pipe.vae.use_tiling


def test_a_saved_folder_is_loaded(tmp_path):
    pipe = tiny_cogvideox("1.5")
    pipe.save_pretrained(tmp_path / "model")
    loaded = kvf.KVLockPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    assert torch.equal(call(loaded.pipe).latents, call(pipe).latents)
    assert {"wan", "cogvideox"} <= set(kvf.capabilities()["families"])


def test_the_scheduler_of_the_larger_checkpoints(tmp_path):
    """It adds noise: from a folder DDIM takes its place, and a pipeline that is there is not touched."""
    pipe = tiny_cogvideox("5b", CogVideoXDPMScheduler(**{**COGVIDEOX_SCHEDULE, "timestep_spacing": "leading"}))
    with pytest.raises(kvf.InputError, match=r"CogVideoXDPMScheduler adds noise .* CogVideoXDDIMScheduler.from_config"):
        call(pipe)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.warns(InputWarning, match="CogVideoXDPMScheduler adds noise at every step: taking CogVideoXDDIM"):
        loaded = kvf.KVLockPipeline.from_pretrained(tmp_path / "model").pipe
    assert torch.equal(call(loaded).latents, call(tiny_cogvideox("5b")).latents)
    pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    assert torch.equal(call(pipe).latents, call(loaded).latents)


def test_a_cache_is_made_and_edited(tmp_path):
    pipe = kvf.KVLockPipeline.from_pipe(tiny_cogvideox("1.5"))
    arguments = {"source_prompt": "a red circle", "num_inference_steps": 5}
    lock = LockConfig.preset("kvlock", guidance_skip=False)
    generator = torch.Generator().manual_seed(1)
    pipe.invert(a_video(), a_mask(), tmp_path / "cache", generator=generator, lock=lock, **arguments,
                cache=CacheConfig(format="native"))  # fmt: skip
    cache = CacheConfig(path=str(tmp_path / "cache"))
    edits = [
        pipe(a_video(), a_mask(), prompt="a blue circle", lock=lock, output="latent", cache=used, **arguments, **more)
        for used, more in ((cache, {}), (CacheConfig(), {"generator": torch.Generator().manual_seed(1)}))
    ]
    torch.testing.assert_close(edits[0].latents, edits[1].latents, rtol=1e-4, atol=1e-4)
    assert edits[0].trace.forwards == 5 * 2
    for other, reason in ((tiny_wan(), "family"), (tiny_cogvideox("5b"), "model")):
        with pytest.raises(kvf.InputError, match=f"was made with.*{reason}"):
            kvf.KVLockPipeline.from_pipe(other)(
                a_video(), a_mask(), prompt="a", output="latent", cache=cache, **arguments
            )


def test_a_cache_of_another_family_is_refused(tmp_path):
    arguments = {"source_prompt": "a red circle", "num_inference_steps": 5}
    kvf.KVLockPipeline.from_pipe(tiny_wan()).invert(a_video(), a_mask(), tmp_path / "cache", **arguments)
    with pytest.raises(kvf.InputError, match=r"was made with .*family wan, not cogvideox"):
        kvf.KVLockPipeline.from_pipe(tiny_cogvideox())(
            a_video(), a_mask(), prompt="a", cache=CacheConfig(path=str(tmp_path / "cache")), **arguments
        )


def test_the_model_is_left_as_it_was():
    pipe = tiny_cogvideox("5b")
    expected = stock(pipe)
    keys = list(pipe.transformer.state_dict())
    call(pipe)
    assert untouched(pipe.transformer) and list(pipe.transformer.state_dict()) == keys
    assert torch.equal(stock(pipe), expected)


def test_skipped_or_hidden_layers_are_refused(monkeypatch):
    pipe = tiny_cogvideox()
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(kvf.InputError, match="fused projections"):
        call(pipe)
    pipe = tiny_cogvideox()
    block = pipe.transformer.transformer_blocks[1]
    monkeypatch.setattr(
        block, "forward", lambda hidden_states, encoder_hidden_states, **_: (hidden_states, encoder_hidden_states)
    )
    with pytest.raises(RuntimeError, match="4 of 6 locked projections ran"):
        call(pipe)
    assert untouched(pipe.transformer)


REFUSED = {
    "flow": (
        lambda: call(tiny_cogvideox(scheduler=FlowMatchEulerDiscreteScheduler())),
        "FlowMatchEulerDiscreteScheduler .* as the model was not trained on a flow",
    ),
    "ddim for wan": (lambda: call(tiny_wan(DDIMScheduler())), "the model predicts a flow's velocity"),
    "image to video": (lambda: call(tiny_cogvideox("5b", in_channels=8)), "takes an image beside the text"),
    "too wide": (
        lambda: call(tiny_cogvideox("1.5"), width=112),
        "9 frames of 32x112 are too many for this model: it takes at most 48x64",
    ),
    "layer": (
        lambda: call(tiny_cogvideox(), lock=paper(layers=(3,))),
        "layer 3, but the model has layers 0 to 2",
    ),
    "latents": (
        lambda: call(tiny_cogvideox("1.5"), latents=torch.zeros(1, 4, 3, 4, 6)),
        r"latents must be \(1, 4, 4, 4, 6\), got \(1, 4, 3, 4, 6\)",
    ),
    "guidance 2": (lambda: call(tiny_cogvideox(), guidance_scale_2=3.0), "the model has no low-noise stage"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_bad_calls_say_what_is_wrong(name):
    run, message = REFUSED[name]
    with pytest.raises(kvf.InputError, match=message):
        run()


def test_a_scheduler_that_is_changed_later_is_checked_again():
    pipe = kvf.KVLockPipeline.from_pipe(tiny_cogvideox())
    pipe.pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(kvf.InputError, match="not trained on a flow"):
        pipe(a_video(), a_mask(), source_prompt="", prompt="a")


def test_a_model_that_embeds_an_ofs_is_given_diffusers_own(monkeypatch):
    pipe, given = tiny_cogvideox("1.5", ofs_embed_dim=8), []
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda **kw: given.append(kw["ofs"]) or forward(**kw))
    assert call(pipe, steps=2).latents.isfinite().all()
    assert {tuple(ofs.tolist()) for ofs in given} == {(2.0,)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_planner_knows_the_model(kind):
    pipe = tiny_cogvideox(kind)
    size, model = from_pipeline(pipe), CogVideoXModel(pipe)
    assert size.family == "cogvideox" and size.text_tokens == TEXT
    for frames in (1, 9, 17):
        assert size.geometry.token_grid(frames, 32, 48) == model.geometry.token_grid(frames, 32, 48)
    assert size.geometry == model.geometry


@pytest.mark.parametrize("size", [(16, 32), (48, 32), (64, 80)], ids=str)
@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_other_sizes_than_the_models_own(kind, size):
    """Bit for bit too: positions follow the size."""
    height, width = size
    pipe = tiny_cogvideox(kind)
    mask = np.zeros((FRAMES, height, width), bool)
    mask[:, : height // 2, : width // 2] = True
    out = call(pipe, lock="cfg", steps=2, video=a_video(FRAMES, height, width), mask=mask, guidance_scale=3.0)
    expected = pipe(
        "a blue circle", height=height, width=width, num_frames=FRAMES, num_inference_steps=2, guidance_scale=3.0,
        output_type="latent", generator=torch.Generator().manual_seed(1), max_sequence_length=TEXT,
    )  # fmt: skip
    assert torch.equal(out.latents, expected.frames.transpose(1, 2))
