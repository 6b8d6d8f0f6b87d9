"""The pipeline against diffusers itself, and the lock against its definition."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import kvlock_fast as kvf
from kvlock_fast.config import PRESETS, LockConfig
from kvlock_fast.presets import NEIGHBOURS
from tests.support.locks import paper
from tests.support.tiny import tiny_wan, untouched

pytestmark = pytest.mark.numeric

FRAMES, HEIGHT, WIDTH = 9, 32, 48


def unipc():
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def a_video(frames=FRAMES, height=HEIGHT, width=WIDTH, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def a_mask(frames=FRAMES, height=HEIGHT, width=WIDTH):
    mask = np.zeros((frames, height, width), bool)
    mask[:, : height // 2, 4 : width // 2] = True
    return mask


def call(pipe, prompt="a blue circle", steps=5, lock=None, seed=1, **changes):
    lock_config = kvf.LockConfig.preset(lock) if isinstance(lock, str) else lock or paper()
    arguments = {"source_prompt": "a red circle", "num_inference_steps": steps, "output": "latent"} | changes
    video, mask = arguments.pop("video", a_video()), arguments.pop("mask", a_mask())
    generator = torch.Generator().manual_seed(seed)
    return kvf.KVLockPipeline.from_pipe(pipe)(
        video, mask, prompt=prompt, lock=lock_config, generator=generator, **arguments
    )


def stock(pipe, prompt="a blue circle", steps=5, seed=1, **changes):
    return pipe(
        prompt, height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=steps, output_type="latent",
        generator=torch.Generator().manual_seed(seed), max_sequence_length=12, **changes,
    ).frames  # fmt: skip


OFF = {"alpha": 0.0, "omega": "constant", "s_star": False, "guidance_batching": "separate"}


@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["no-cfg", "cfg"])
@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, unipc], ids=["euler", "unipc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lock_off_is_diffusers_bit_for_bit(scheduler, guidance, dtype):
    pipe = tiny_wan(scheduler())
    pipe.transformer.to(dtype)
    expected = stock(pipe, guidance_scale=guidance)
    for lock in (paper(**OFF), "cfg"):
        out = call(pipe, lock=lock, guidance_scale=guidance)
        assert torch.equal(out.latents, expected.float())
    assert out.trace.forwards == 5 * (1 if guidance == 1.0 else 2)


def test_lock_off_with_two_transformers_is_diffusers_bit_for_bit():
    pipe = tiny_wan(second=True)
    expected = stock(pipe, guidance_scale=4.0, guidance_scale_2=3.0)
    out = call(pipe, lock="cfg", guidance_scale=4.0, guidance_scale_2=3.0)
    assert torch.equal(out.latents, expected)
    assert not torch.equal(out.latents, call(pipe, lock="cfg", guidance_scale=4.0).latents)


def test_expanded_timesteps_are_diffusers_bit_for_bit():
    pipe = tiny_wan()
    pipe.register_to_config(expand_timesteps=True)
    assert torch.equal(call(pipe, lock="cfg").latents, stock(pipe))


def test_a_lock_of_hardly_any_weight_hardly_changes_a_thing():
    """alpha is computed but next to 0 in every step: hooks attached, blending, and still the stock latents."""
    pipe = tiny_wan()
    lock = paper(**{**OFF, "alpha": "dynamic"}, warmup_alpha=0.0, kappa=5, tau=1e30, variance_window=2)
    out = call(pipe, lock=lock)
    assert max(record.alpha for record in out.trace.records) < 1e-20
    assert out.trace.forwards > 10  # the source was run in the steps that could lock
    torch.testing.assert_close(out.latents, stock(pipe), rtol=0, atol=1e-6)


def test_the_model_is_left_as_it_was():
    pipe = tiny_wan()
    expected = stock(pipe)
    before = {name: vars(module).copy() for name, module in pipe.transformer.named_modules()}
    keys = list(pipe.transformer.state_dict())
    call(pipe)
    after = {name: vars(module) for name, module in pipe.transformer.named_modules()}
    assert {name: set(v) for name, v in after.items()} == {name: set(v) for name, v in before.items()}
    assert list(pipe.transformer.state_dict()) == keys
    assert torch.equal(stock(pipe), expected)


def attention_inputs(pipe, monkeypatch):
    """Record K (before RoPE is applied it is rotated alike, so after RoPE) and V entering every self-attention."""
    from diffusers.models.transformers import transformer_wan

    seen, inner = [], transformer_wan.dispatch_attention_fn

    def spy(query, key, value, *args, **kwargs):
        if key.shape[1] == query.shape[1]:
            seen.append((key.clone(), value.clone()))
        return inner(query, key, value, *args, **kwargs)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", spy)
    return seen


@pytest.mark.parametrize("batching", ["separate", "batched"])
def test_alpha_one_hands_the_source_to_the_background_bit_for_bit(monkeypatch, batching):
    pipe = tiny_wan()
    seen = attention_inputs(pipe, monkeypatch)
    lock = paper(alpha=1.0, guidance_batching=batching, layers=(0, 2))
    mask = call(pipe, steps=2, lock=lock).mask.tokens[0]
    layers, step = len(pipe.transformer.blocks), []
    if batching == "batched":
        assert len(seen) == 2 * layers
        step = [[(k[row], v[row]) for row in range(3)] for k, v in seen[:layers]]
    else:
        assert len(seen) == 3 * 2 * layers
        step = [[tuple(x[0] for x in seen[branch * layers + i]) for branch in range(3)] for i in range(layers)]
    for layer, (source, *branches) in enumerate(step):
        for branch in branches:
            for ours, theirs in zip(branch, source, strict=True):
                assert torch.equal(ours[~mask], theirs[~mask]) == (layer in lock.layers)
                if layer > 0:  # layer 0 sees equal noise at step 0: its K and V are equal everywhere
                    assert not torch.isclose(ours[mask], theirs[mask]).all()


def test_foreground_keys_are_the_new_ones_bit_for_bit():
    """The K-norm's own output and what leaves the hook differ on background tokens only."""
    from kvlock_fast.locking.lock import Mode, TransformerLock, blend_weight
    from kvlock_fast.models.wan import WAN

    transformer = tiny_wan().transformer
    inputs = {
        "timestep": torch.tensor([500.0]), "encoder_hidden_states": torch.randn(1, 4, 16), "return_dict": False
    }  # fmt: skip
    foreground = torch.rand(1, 3 * 2 * 3) < 0.5
    new, source = torch.randn(2, 1, 4, 3, 4, 6).unbind(0)
    plain = {}
    lock = TransformerLock(transformer, WAN, layers=(0,))
    with torch.no_grad():
        for name, latents in (("new", new), ("source", source)):
            plain[name] = {}
            with lock.forward(Mode.CAPTURE, kept=plain[name]):
                transformer(latents, **inputs)
        entering = {}
        apply = lock.state.apply
        lock.state.apply = lambda key, x, dim: (apply(key, x, dim), entering.__setitem__(key[1], x.clone()))
        weight = blend_weight(torch.ones(1), foreground)
        with lock.forward(Mode.STORED, weight, {key: value.clone() for key, value in plain["source"].items()}):
            transformer(new, **inputs)
    for kind in ("k", "v"):
        mixed, mine, theirs = entering[kind][0], plain["new"][0, kind][0], plain["source"][0, kind][0]
        assert torch.equal(mixed[foreground[0]], mine[foreground[0]])
        assert torch.equal(mixed[~foreground[0]], theirs[~foreground[0]])


def test_a_patch_of_one_latent():
    """Diffusers then returns its tokens transposed, as the bundled model does."""
    geometry = {"patch_size": (1, 1, 1)}
    out = call(tiny_wan(**geometry), lock="kvlock", steps=4)
    assert out.latents.isfinite().all() and out.trace.forwards == 12


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in NEIGHBOURS])
def test_every_preset_edits(preset):
    pipe = tiny_wan()
    out = call(
        pipe, lock=kvf.LockConfig.preset(preset, kappa=3, skip_share=0.0, guidance_skip=False), steps=6, output="frames"
    )
    assert out.frames[0].shape == (FRAMES, HEIGHT, WIDTH, 3) and out.frames[0].dtype == np.uint8
    assert out.latents.isfinite().all() and len(out.trace.records) == 6
    rows = 3 * 2 + 3 * 3 if preset == "paper" else 6 * (3 if kvf.LockConfig.preset(preset).locks else 2)
    assert out.trace.forwards == rows


def test_batched_and_separate_agree():
    pipe = tiny_wan()
    for preset in ("paper", "kvlock"):
        one, two = (
            call(pipe, lock=kvf.LockConfig.preset(preset, guidance_batching=b, kappa=3)).latents
            for b in ("separate", "batched")
        )
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batching", ["separate", "batched"])
def test_several_prompts_equal_one_at_a_time(batching):
    pipe = tiny_wan()
    prompts = ["a blue circle", "a green square moves left", "a dog"]
    lock = paper(kappa=4, tau=0.5, variance_window=3, guidance_batching=batching)
    together = call(pipe, prompts, steps=6, lock=lock)
    for i, prompt in enumerate(prompts):
        alone = call(pipe, prompt, steps=6, lock=lock)
        torch.testing.assert_close(together.latents[i], alone.latents[0], rtol=1e-4, atol=1e-4)
        mine = [r for r in together.trace.records if r.sample == i]
        for a, b in zip(mine, alone.trace.records, strict=True):
            assert a.alpha == pytest.approx(b.alpha, abs=1e-4) and a.omega == pytest.approx(b.omega, abs=1e-3)
            assert a.s_star == pytest.approx(b.s_star, abs=1e-4)
    alphas = {round(r.alpha, 6) for r in together.trace.records if r.step == 5}
    assert len(alphas) == len(prompts)


def test_background_latents_source_ends_at_the_source():
    pipe = tiny_wan()
    out = call(pipe, lock="kvlock")
    clean = kvf.KVLockPipeline.from_pipe(pipe).model.encode_video(torch.as_tensor(a_video()))
    outside = ~out.mask.latents[0].expand(4, -1, -1, -1)
    with torch.no_grad():
        assert torch.equal(out.latents[0][outside], clean[0][outside])
    assert not torch.isclose(out.latents[0][~outside], clean[0][~outside], atol=1e-3).all()


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "uni-inv"])
def test_inversion_and_replay_return_to_the_source(method):
    """Inverting and denoising again with the source prompt, unguided, comes back."""
    pipe = tiny_wan()
    lock = paper(source_path="invert", inversion_solver=method, alpha=0.0, omega="constant", s_star=False)
    out = call(pipe, "a red circle", steps=40, lock=lock, guidance_scale=1.0)
    with torch.no_grad():
        clean = kvf.KVLockPipeline.from_pipe(pipe).model.encode_video(torch.as_tensor(a_video()))
    assert (out.latents - clean).square().mean() < 0.02 * clean.square().mean()
    assert out.trace.forwards == {"euler": 80, "uni-inv": 81}.get(method, 120)


def test_unguided_editing_leaves_the_scale_untouched():
    out = call(tiny_wan(), lock="kvlock", guidance_scale=1.0)
    assert {record.s_star for record in out.trace} == {1.0} and {record.omega for record in out.trace} == {1.0}
    assert out.trace.forwards == 5 * 2


def test_warmup_without_locking_runs_no_source():
    out = call(tiny_wan(), steps=8, lock=paper(warmup_alpha=0.0, kappa=3))
    assert out.trace.forwards == 5 * 2 + 3 * 3
    assert [r.alpha for r in out.trace.records[:5]] == [0.0] * 5
    assert all(r.alpha > 0 for r in out.trace.records[5:])


def test_tau_auto_compares_with_the_source():
    out = call(tiny_wan(), steps=6, lock=paper(tau="auto", kappa=4))
    assert [r.alpha for r in out.trace.records[:2]] == [1.0, 1.0]
    assert all(0 < r.alpha <= 1 for r in out.trace.records)


def test_frames_are_padded_and_cut_back():
    with pytest.warns(UserWarning, match="7 frames padded to 9"):
        out = call(tiny_wan(), video=a_video(7), mask=a_mask(7), output="frames")
    assert out.frames[0].shape[0] == 7
    with pytest.warns(UserWarning, match="7 frames trimmed to 5"):
        out = call(tiny_wan(), video=a_video(7), mask=a_mask(7), output="frames", frames_policy="trim")
    assert out.frames[0].shape[0] == 5
    with pytest.raises(kvf.InputError, match="7 frames"):
        call(tiny_wan(), video=a_video(7), mask=a_mask(7), frames_policy="error")


def test_a_size_the_model_cannot_take_is_resized():
    with pytest.warns(UserWarning, match="size 31x50 is not a multiple of 16x16: working at 32x48"):
        out = call(tiny_wan(), video=a_video(5, 31, 50), mask=a_mask(5, 31, 50), output="frames")
    assert out.frames[0].shape == (5, 32, 48, 3)


@pytest.mark.filterwarnings("ignore::kvlock_fast.errors.InputWarning")
@pytest.mark.parametrize("kind", ["as it is", "trimmed", "a list at another size", "tensors"])
def test_composite_frames_are_those_of_the_function(kind):
    """The model's frames are the same either way, and of a size and length that may be others than the source's."""
    video, mask = a_video(7), a_mask(7)[:1] if kind == "trimmed" else a_mask(7)
    given = {"video": video, "mask": mask}
    if kind == "a list at another size":
        given = {"video": list(video), "mask": mask[0], "height": 16, "width": 32}
    if kind == "tensors":
        given = {"video": torch.from_numpy(video), "mask": torch.from_numpy(mask)}
    more = {"output": "frames", "steps": 2, "frames_policy": "trim" if kind == "trimmed" else "pad", **given}
    [raw] = call(tiny_wan(), **more).frames
    [out] = call(tiny_wan(), composite=True, **more).frames
    count = 5 if kind == "trimmed" else 7
    whole = np.broadcast_to(mask, (7, HEIGHT, WIDTH))[:count]
    assert out.shape == (count, HEIGHT, WIDTH, 3)
    assert np.array_equal(out[~whole], video[:count][~whole]) and (out[whole] != video[:count][whole]).mean() > 0.5
    assert np.array_equal(out, kvf.composite(video[:count], raw, whole))


@pytest.mark.parametrize("batching", ["separate", "batched"])
def test_an_all_foreground_mask_warns_and_runs_unlocked(batching):
    lock = kvf.LockConfig.preset("s-star-only", s_star=False, guidance_batching=batching)
    mask = np.ones((FRAMES, HEIGHT, WIDTH), bool)
    with pytest.warns(UserWarning, match="every token"):
        out = call(tiny_wan(), mask=mask, steps=2, lock=lock)
    torch.testing.assert_close(out.latents, stock(tiny_wan(), steps=2), rtol=1e-4, atol=1e-5)


BAD_CALLS = {
    "empty mask": ({"mask": np.zeros((FRAMES, HEIGHT, WIDTH), bool)}, "mask is empty"),
    "mask dtype": ({"mask": np.ones((FRAMES, HEIGHT, WIDTH), np.uint8)}, "mask must be bool"),
    "mask frames": ({"mask": np.ones((3, HEIGHT, WIDTH), bool)}, r"\(3, 32, 48\)"),
    "mask size": ({"mask": np.ones((FRAMES, 8, 8), bool)}, r"\(9, 8, 8\)"),
    "video dtype": ({"video": a_video().astype(np.float32)}, "video must be uint8"),
    "no frames": ({"video": a_video(0)}, r"\(0, 32, 48, 3\)"),
    "no frames in a list": ({"video": []}, "video must be uint8"),
    "steps": ({"steps": 0}, "num_inference_steps .* 0"),
    "guidance": ({"guidance_scale": float("nan")}, "guidance_scale .* nan"),
    "prompt": ({"prompt": []}, "prompt"),
    "layer": ({"lock": paper(layers=(7,))}, "layer 7, but the model has layers 0 to 2"),
    "steps beyond reason": ({"steps": 10**9}, "num_inference_steps .* 1000000000"),
    "guidance 2": ({"guidance_scale_2": 3.0}, "guidance_scale_2 is 3.0, but the model has no low-noise stage"),
    "video of another kind": ({"video": 5}, "video must be uint8 .* got int"),
    "video dtype of torch": ({"video": torch.zeros(5, 32, 48, 3, dtype=torch.bfloat16)}, "torch.bfloat16"),
    "frames of two sizes": ({"video": [np.zeros((4, 4, 3)), np.zeros((5, 4, 3))]}, "different shapes"),
    "prompt of another kind": ({"prompt": 5}, "prompt must be a text .* got 5"),
    "negative prompt": ({"negative_prompt": ["a"]}, "negative_prompt must be a text"),
    "cache": ({"cache": "disk"}, "cache must be a CacheConfig, got 'disk'"),
    "output": ({"output": "pil"}, "output must be frames or latent, got 'pil'"),
    "composite of latents": ({"composite": True}, "composite=True needs frames, got output='latent'"),
    "noise of another kind": ({"latents": np.zeros(3)}, "latents must be a torch.Tensor, got ndarray"),
    "too many frames": ({"video": a_video(261, 16, 16), "mask": a_mask(261, 16, 16)}, "at most 253 frames"),
    "too wide": ({"width": 2000}, "32x2000 are too many .* 1024x1024"),
    "latents": ({"latents": torch.zeros(1, 4, 1, 1, 1)}, r"latents must be \(1, 4, 3, 4, 6\)"),
    "nan": ({"latents": torch.full((1, 4, 3, 4, 6), float("nan"))}, "NaN or inf at step 0"),
}


@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_bad_calls_say_what_is_wrong(name):
    changes, message = BAD_CALLS[name]
    with pytest.raises(kvf.InputError, match=message):
        call(tiny_wan(), **changes)


def test_skipped_or_hidden_layers_are_refused():
    pipe = tiny_wan()
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(kvf.InputError, match="fused projections"):
        call(pipe)
    pipe = tiny_wan()
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(kvf.InputError, match=r"FirstBlockCacheConfig.* disable_cache\(\)"):
        call(pipe)


def test_hooks_that_do_not_fire_are_noticed(monkeypatch):
    pipe = tiny_wan()
    block = pipe.transformer.blocks[1]
    monkeypatch.setattr(block, "forward", lambda hidden_states, *args, **kwargs: hidden_states)
    with pytest.raises(RuntimeError, match="4 of 6 locked projections ran"):
        call(pipe)
    assert untouched(pipe.transformer)


def test_no_warnings_on_clean_input():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call(tiny_wan(), steps=2)


def test_a_lock_must_be_a_config():
    with pytest.raises(kvf.InputError, match=r"lock must be a LockConfig, .* got 'paper'"):
        kvf.KVLockPipeline.from_pipe(tiny_wan())(a_video(), a_mask(), source_prompt="", prompt="a", lock="paper")


def test_a_mask_that_trimming_empties_is_named():
    mask = np.zeros((7, HEIGHT, WIDTH), bool)
    mask[6] = True
    with pytest.raises(kvf.InputError, match="5 frames that frames_policy='trim' keeps"):
        call(tiny_wan(), video=a_video(7), mask=mask, frames_policy="trim")


class Spy:
    """Records what the transformer is asked (step's timestep, latents, texts) and answered."""

    def __init__(self, monkeypatch, pipe):
        self.calls, inner = [], pipe.transformer.forward

        def forward(*args, **kwargs):
            out = inner(*args, **kwargs)
            asked = (kwargs["timestep"].flatten()[0].item(), kwargs["hidden_states"], kwargs["encoder_hidden_states"])
            self.calls.append((*asked, out[0]))
            return out

        monkeypatch.setattr(pipe.transformer, "forward", forward)


def latent_of(pipe):
    with torch.no_grad():
        return kvf.KVLockPipeline.from_pipe(pipe).model.encode_video(torch.as_tensor(a_video()))


def text_of(pipe, prompt):
    with torch.no_grad():
        return kvf.KVLockPipeline.from_pipe(pipe).model.encode_prompts([prompt])[0]


def test_every_step_sees_the_formulas(monkeypatch):
    """Rows of each forward: the source re-noised, the edit twice; s*, x0hat and the step recomputed by hand in fp64."""
    pipe, prompt = tiny_wan(FlowMatchEulerDiscreteScheduler(shift=2.0)), "a blue circle"
    lock = paper(background_latents="source", s_star_region="foreground", kappa=3, tau=0.5, variance_window=2)
    clean, texts = latent_of(pipe), [text_of(pipe, p) for p in ("a red circle", "a dog", prompt)]
    spy = Spy(monkeypatch, pipe)
    out = call(pipe, prompt, lock=lock, guidance_scale=4.0, negative_prompt="a dog")
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    inside = out.mask.latents[0].expand(4, -1, -1, -1)
    sigmas = [record.sigma for record in out.trace] + [0.0]
    history, x = [], torch.where(inside, noise, (1 - sigmas[0]) * clean + sigmas[0] * noise).double()[0]
    for k, ((timestep, rows, text, answer), record) in enumerate(zip(spy.calls, out.trace, strict=True)):
        assert timestep == pytest.approx(1000 * sigmas[k], rel=1e-6)
        for row, expected in zip(text, texts, strict=True):
            torch.testing.assert_close(row, expected)
        torch.testing.assert_close(rows[0], ((1 - sigmas[k]) * clean + sigmas[k] * noise)[0])
        for row in rows[1:]:
            torch.testing.assert_close(row.double(), x, rtol=1e-4, atol=1e-5)
        _, u, c = answer.double()
        s_star = (c * u)[inside].sum() / (u[inside].square().sum() + 1e-8)
        assert record.s_star == pytest.approx(s_star.item(), rel=1e-4)
        dynamic = k >= 2 and len(history) >= 2
        variance = torch.stack(history[-2:]).var(0)[inside].mean() if dynamic else None
        omega = 4.0 * min(variance.item() / 0.5, 2.0) if dynamic else 4.0
        assert record.omega == pytest.approx(omega, rel=1e-3)
        assert record.alpha == pytest.approx(min(variance.item() / 0.5, 1.0) if dynamic else 1.0, rel=1e-3)
        guided = s_star * u + omega * (c - s_star * u)
        history.append(x - sigmas[k] * guided)
        path = (1 - sigmas[k + 1]) * clean + sigmas[k + 1] * noise
        x = torch.where(inside, x + (sigmas[k + 1] - sigmas[k]) * guided, path[0].double())
    torch.testing.assert_close(out.latents[0].double(), x, rtol=1e-4, atol=1e-4)


def test_inversion_runs_the_source_prompt_up_the_schedule(monkeypatch):
    pipe = tiny_wan()
    clean, source = latent_of(pipe), text_of(pipe, "a red circle")
    spy = Spy(monkeypatch, pipe)
    out = call(pipe, lock=kvf.LockConfig.preset("cfg", source_path="invert"), steps=3)
    sigmas = [record.sigma for record in out.trace] + [0.0]
    x = clean
    for k, (timestep, latents, text, answer) in zip((2, 1, 0), spy.calls[:3], strict=True):
        assert timestep == pytest.approx(1000 * sigmas[k + 1])
        torch.testing.assert_close(latents, x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(text[0], source)
        x = x + (sigmas[k] - sigmas[k + 1]) * answer
    torch.testing.assert_close(spy.calls[3][1], x, rtol=1e-4, atol=1e-5)  # where the edit starts


def test_zeroed_steps_predict_nothing():
    pipe = tiny_wan()
    lock = paper(zero_init_share=2 / 6, kappa=6, tau=0.01)
    out = call(pipe, steps=6, lock=lock)
    assert [record.variance is None for record in out.trace] == [True, True, True, False, False, False]
    noise = torch.randn(out.latents.shape, generator=torch.Generator().manual_seed(1))
    pipe.transformer.to(torch.bfloat16)
    out = call(pipe, steps=2, lock=LockConfig.preset("cfg-zero-star", zero_init_share=1.0))
    assert torch.equal(out.latents, noise)


@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["no-cfg", "cfg"])
@pytest.mark.parametrize("preset", ["kvlock", "variance-kv"])
def test_a_half_precision_model_ends_at_the_source_too(preset, guidance):
    pipe = tiny_wan()
    pipe.transformer.to(torch.bfloat16)
    lock = kvf.LockConfig.preset(preset, background_latents="source")
    out = call(pipe, lock=lock, guidance_scale=guidance)
    outside = ~out.mask.latents[0].expand(4, -1, -1, -1)
    assert torch.equal(out.latents[0][outside], latent_of(pipe)[0][outside])


@pytest.mark.parametrize("batching", ["separate", "batched"])
def test_two_transformers_are_locked_in_turn(batching):
    pipe = tiny_wan(second=True)
    lock = kvf.LockConfig.preset("kvlock", guidance_batching=batching)
    out = call(pipe, lock=lock, guidance_scale=4.0, guidance_scale_2=1.0, steps=6)
    low = [record for record in out.trace if record.timestep < 500]
    assert 0 < len(low) < 6 and {(r.omega, r.s_star) for r in low} == {(1.0, 1.0)}
    assert {r.omega for r in out.trace if r.timestep >= 500 and r.step < 2} == {4.0}
    with pytest.raises(kvf.InputError, match=r"guidance_scale_2 is 4.0, but guidance_scale 1.0 turns guidance off"):
        call(pipe, guidance_scale=1.0, guidance_scale_2=4.0)


def test_a_refused_second_transformer_leaves_no_hooks():
    pipe = tiny_wan(second=True)
    pipe.transformer_2.fuse_qkv_projections()
    with pytest.raises(kvf.InputError, match="fused projections"):
        call(pipe)
    pipe.transformer_2.unfuse_qkv_projections()
    assert untouched(pipe.transformer)
    call(pipe)


def test_kept_keys_are_the_backgrounds_alone():
    from kvlock_fast.locking.lock import Mode, TransformerLock
    from kvlock_fast.models.wan import WAN

    transformer = tiny_wan().transformer
    background = torch.tensor([1, 4, 5])
    lock = TransformerLock(transformer, WAN, background=background)
    inputs = {"timestep": torch.tensor([5.0]), "encoder_hidden_states": torch.zeros(1, 2, 16), "return_dict": False}
    kept = {}
    with torch.no_grad(), lock.forward(Mode.CAPTURE, kept=kept):
        transformer(torch.randn(1, 4, 1, 4, 6), **inputs)
    assert {x.shape for x in kept.values()} == {(1, 3, 24)} and len(kept) == 6
    lock.detach()


def test_a_window_longer_than_the_run_takes_no_memory():
    call(tiny_wan(), lock=paper(variance_window=10**12, kappa=10**12), steps=3)


def test_a_compiled_wrapper_is_refused_but_compiled_blocks_work():
    pipe = tiny_wan()
    expected = call(pipe, steps=2).latents
    whole = pipe.transformer
    pipe.transformer = torch.compile(whole, backend="eager")
    with pytest.raises(kvf.InputError, match=r"wrapped by torch.compile"):
        call(pipe, steps=2)
    pipe.transformer = whole
    whole.compile_repeated_blocks(backend="eager")
    torch.testing.assert_close(call(pipe, steps=2).latents, expected)


def test_an_error_on_the_way_leaves_no_hooks():
    pipe = tiny_wan()

    def stop(stage, done, total):
        if stage == "denoise" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(pipe, progress=stop)
    assert untouched(pipe.transformer)
