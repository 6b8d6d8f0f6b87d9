"""The guider and the blocks for diffusers' modular pipelines, against diffusers' own and KVLockPipeline."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.guiders import ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22Blocks
from hypothesis import given
from hypothesis import strategies as st

import kvlock_fast as kvf
from kvlock_fast.integrations.guider import lock_of
from kvlock_fast.integrations.modular import KVLockWan22Blocks
from tests.families.cases.hunyuan_video15 import tiny_hunyuan15
from tests.support.tiny import tiny_wan, untouched

STEPS, SIZE = 5, (9, 32, 64)
SAID = dict(source_prompt="a red circle", prompt="a blue square", negative_prompt="dark")
COMPONENTS = ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler")


def drawn(seed):
    return torch.randn(1, 4, 3, 4, 8, generator=torch.Generator().manual_seed(seed))


def video_and_mask():
    video = torch.randint(0, 256, (*SIZE, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[2:6, 8:24, 16:40] = True
    return video, mask


def modular(blocks, pipe, **guiders):
    """A modular pipeline of the parts of another."""
    made = blocks().init_pipeline()
    parts = {name: getattr(pipe, name) for name in COMPONENTS if getattr(pipe, name, None) is not None}
    made.update_components(**parts, **guiders)
    if "boundary_ratio" in made.config:
        made.update_components(boundary_ratio=pipe.config.boundary_ratio)
    made.set_progress_bar_config(disable=True)
    return made


def edited(pipe, **more):
    video, mask = video_and_mask()
    return pipe(video=video, mask=mask, **SAID, num_inference_steps=STEPS, latents=drawn(1), max_sequence_length=12,
                output="latents", **more)  # fmt: skip


def generated(pipe):
    return pipe(prompt="a blue square", negative_prompt="dark", num_inference_steps=STEPS, height=32, width=64,
                num_frames=9, latents=drawn(1), max_sequence_length=12, output="latents")  # fmt: skip


SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, solver_order=2
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("preset", ["kvlock", "paper", "fixed-alpha", "cfg-zero-star", "variance-kv"])
def test_a_modular_pipeline_edits_as_kvlock_pipeline(preset, scheduler):
    pipe = tiny_wan(scheduler=SCHEDULERS[scheduler]())
    fields = dict(kappa=4, variance_window=3, guidance_batching="separate")
    video, mask = video_and_mask()
    wanted = kvf.KVLockPipeline.from_pipe(pipe)(
        video, mask, **SAID, num_inference_steps=STEPS, guidance_scale=4.0, latents=drawn(1),
        lock=kvf.LockConfig.preset(preset, **fields).in_own_loop(), cache=kvf.CacheConfig(tier="lockstep"),
        output="latent",
    )  # fmt: skip
    made = modular(kvf.KVLockWanBlocks, pipe, guider=kvf.KVLockGuidance(4.0, lock=dict(preset=preset, **fields)))
    got = edited(made)
    torch.testing.assert_close(got, wanted.latents, rtol=0, atol=1e-4)
    assert untouched(pipe.transformer)


def test_two_transformers_take_turns_under_one_schedule():
    pipe, fields = tiny_wan(second=True), dict(kappa=4, variance_window=3, guidance_batching="separate")
    video, mask = video_and_mask()
    wanted = kvf.KVLockPipeline.from_pipe(pipe)(
        video, mask, **SAID, num_inference_steps=STEPS, guidance_scale=4.0, guidance_scale_2=3.0, latents=drawn(1),
        lock=kvf.LockConfig.preset("kvlock", **fields).in_own_loop(), cache=kvf.CacheConfig(tier="lockstep"),
        output="latent",
    )  # fmt: skip
    guiders = {
        name: kvf.KVLockGuidance(scale, lock=dict(preset="kvlock", **fields))
        for name, scale in (("guider", 4.0), ("guider_2", 3.0))
    }
    got = edited(modular(KVLockWan22Blocks, pipe, **guiders))
    torch.testing.assert_close(got, wanted.latents, rtol=0, atol=1e-4)
    assert untouched(pipe.transformer) and untouched(pipe.transformer_2)


@pytest.mark.parametrize("settings", [{}, {"start": 0.3}, {"stop": 0.5}], ids=str)
def test_unlocked_it_is_diffusers_guidance_bit_for_bit(settings):
    settings = {"guidance_scale": 4.0, **settings}
    pipe = tiny_wan()
    stock = generated(modular(WanBlocks, pipe, guider=ClassifierFreeGuidance(**settings)))
    ours = generated(modular(WanBlocks, pipe, guider=kvf.KVLockGuidance(lock="cfg", **settings)))
    assert torch.equal(ours, stock)
    edit = edited(modular(kvf.KVLockWanBlocks, pipe, guider=kvf.KVLockGuidance(lock="cfg", **settings)))
    assert torch.equal(edit, stock)


@pytest.mark.parametrize("settings", [{"enabled": False}, {"guidance_scale": 1.0}, {"guidance_scale": 0.5}], ids=str)
@pytest.mark.parametrize("lock", ["cfg", "kvlock"])
def test_without_guidance_it_is_as_in_diffusers(settings, lock):
    """Of the guiders alone: diffusers' text encoding for Wan cannot do without negative prompts."""
    cond, uncond = torch.randn(2, 1, 4, 3, 4, 8)
    said = []
    for guider in (ClassifierFreeGuidance(**settings), kvf.KVLockGuidance(lock=lock, **settings)):
        guider.set_state(0, STEPS, torch.tensor(900.0))
        state = BlockState(latents=drawn(2), text=cond, negative=uncond)
        batches = guider.prepare_inputs_from_block_state(state, {"given": ("text", "negative")})
        for batch in batches:
            batch.noise_pred = batch.given
        said.append([len(batches), guider(batches)[0]])
    assert said[0][0] == said[1][0] == (2 if settings.get("guidance_scale") == 0.5 else 1)
    assert torch.equal(said[0][1], said[1][1])


def test_unlocked_of_two_guiders():
    pipe = tiny_wan(second=True)
    stock, ours = (
        generated(
            modular(
                Wan22Blocks, pipe, guider=kind(guidance_scale=4.0, **more), guider_2=kind(guidance_scale=3.0, **more)
            )
        )
        for kind, more in ((ClassifierFreeGuidance, {}), (kvf.KVLockGuidance, {"lock": "cfg"}))
    )
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("zero_steps", [0, 2])
def test_s_star_is_diffusers_own(zero_steps):
    """In a modular pipeline that only generates, against ClassifierFreeZeroStarGuidance."""
    pipe = tiny_wan()
    stock = generated(modular(WanBlocks, pipe, guider=ClassifierFreeZeroStarGuidance(4.0, zero_init_steps=zero_steps)))
    lock = dict(preset="cfg-zero-star", zero_init_share=zero_steps / STEPS)
    ours = generated(modular(WanBlocks, pipe, guider=kvf.KVLockGuidance(4.0, lock=lock)))
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)


def test_the_second_of_two_guiders_counts_the_steps_of_the_run():
    pipe = tiny_wan(second=True)
    stock, ours = (
        modular(Wan22Blocks, pipe, guider=make(4.0), guider_2=make(3.0))
        for make in (
            lambda scale: ClassifierFreeZeroStarGuidance(scale, zero_init_steps=1),
            lambda scale: kvf.KVLockGuidance(scale, lock=dict(preset="cfg-zero-star", zero_init_share=1 / STEPS)),
        )
    )
    expected = generated(stock)
    for _ in range(2):
        torch.testing.assert_close(generated(ours), expected, rtol=0, atol=1e-5)
        assert ours.guider_2.schedule.step == STEPS > ours.guider.schedule.step > 0


def test_what_the_second_of_two_guiders_saw_ends_with_the_run():
    lock = dict(preset="paper", reduction="elements", tau=0.1, variance_window=2, kappa=3)
    guider = kvf.KVLockGuidance(4.0, lock=lock)
    said = []
    for batch in (1, 1, 2):
        generator, predictions = torch.Generator().manual_seed(0), []
        for step in range(2, 5):
            guider.set_state(step, 5, torch.tensor(900.0 - 100 * step))
            guider._latents = torch.randn(1, 4, 1, 2, 2, generator=generator).expand(batch, -1, -1, -1, -1)
            cond, uncond = torch.randn(2, 1, 4, 1, 2, 2, generator=generator).expand(2, batch, -1, -1, -1, -1)
            predictions.append(guider.forward(cond, uncond).pred[:1])
        said.append(torch.stack(predictions))
        assert guider.schedule.step == 5 and guider.schedule.variance.shape == (batch,)
    assert torch.equal(said[0], said[1])
    torch.testing.assert_close(said[2], said[0])


@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 10**6), st.floats(1.1, 9))
def test_a_guided_prediction_by_diffusers_closed_form(batch, size, seed, scale):
    cond, uncond = torch.randn(2, batch, 2, 1, size, 3, generator=torch.Generator().manual_seed(seed))
    guider = kvf.KVLockGuidance(scale, lock="s-star-only")
    guider.set_state(0, 4, torch.tensor(900.0))
    s_star = cfg_zero_star_scale(cond.flatten(1), uncond.flatten(1)).view(-1, 1, 1, 1, 1)
    expected = s_star * uncond + scale * (cond - s_star * uncond)
    torch.testing.assert_close(guider.forward(cond, uncond).pred, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(guider.schedule.s_star, s_star.flatten(), rtol=1e-4, atol=1e-5)


PAIRS = {
    "cfg": (ClassifierFreeGuidance(4.0), kvf.KVLockGuidance(4.0, lock="cfg"), 0),
    "s-star": (
        ClassifierFreeZeroStarGuidance(4.0, zero_init_steps=0),
        kvf.KVLockGuidance(4.0, lock="s-star-only"),
        1e-4,
    ),
}


@pytest.mark.parametrize(("theirs", "ours", "tolerance"), PAIRS.values(), ids=PAIRS)
def test_in_a_pipeline_with_a_guider_that_is_not_modular(theirs, ours, tolerance):
    """HunyuanVideo 1.5, in the place of its own."""
    pipe, made = tiny_hunyuan15(), []
    for guider in (theirs, ours):
        pipe.guider = guider
        made.append(pipe("a red circle", negative_prompt="dark", height=32, width=32, num_frames=5,
                         num_inference_steps=3, generator=torch.Generator().manual_seed(0),
                         output_type="latent").frames)  # fmt: skip
    torch.testing.assert_close(made[1], made[0], rtol=0, atol=tolerance)
    assert made[0].isfinite().all()


def test_alone_its_scale_follows_the_variance_of_everything():
    pipe, seen = tiny_wan(), []

    class Watched(kvf.KVLockGuidance):
        def forward(self, pred_cond, pred_uncond=None):
            seen.append((self._latents - self._timestep / 1000 * super().forward(pred_cond, pred_uncond).pred,
                         float(self.schedule._controller.omega(self._step, 4.0))))  # fmt: skip
            return type("Output", (tuple,), {})([seen[-1][0] * 0 + pred_cond])

    lock = dict(preset="paper", reduction="elements", warmup_alpha=1.0, tau=0.1, variance_window=3, kappa=3)
    generated(modular(WanBlocks, pipe, guider=Watched(4.0, lock=lock)))
    clean = torch.stack([x for x, _ in seen])
    for step, (_, omega) in enumerate(seen):
        expected = 4.0
        if step >= STEPS - 3:
            variance = float(clean[max(0, step - 3) : step].double().var(0, unbiased=True).mean())
            expected = 4.0 * min(2.0, variance / 0.1)
        assert omega == pytest.approx(expected, rel=1e-4)


def test_where_latents_are_not_shown_omega_must_be_constant():
    tensors = torch.randn(2, 1, 2, 1, 2, 2)
    guider = kvf.KVLockGuidance(4.0)
    guider.set_state(0, 4, torch.tensor(900.0))
    guider.prepare_inputs({"encoder_hidden_states": (tensors[0], tensors[1])})
    with pytest.raises(kvf.InputError, match=r"does not show its guider.*'s-star-only'"):
        guider.forward(*tensors)


@torch.no_grad()
def test_an_error_in_the_loop_leaves_nothing():
    pipe, calls = tiny_wan(), []
    guider = kvf.KVLockGuidance(4.0)
    made = modular(kvf.KVLockWanBlocks, pipe, guider=guider)

    def fail(*args):
        calls.append(1)
        if len(calls) == 5:  # of the second step the conditional branch
            raise ArithmeticError("planned")

    handle = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="planned"):
        edited(made)
    handle.remove()
    assert untouched(pipe.transformer) and guider.run is None
    assert edited(made).isfinite().all()


def test_a_config_comes_back(tmp_path):
    lock = kvf.LockConfig.preset("kvlock", layers=(0, 2), tau=0.05)
    guider = kvf.KVLockGuidance(3.0, lock=lock, stop=0.9)
    guider.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "guider_config.json").read_text())["lock"]["layers"] == [0, 2]
    again = kvf.KVLockGuidance.from_pretrained(tmp_path)
    assert (
        again.lock.as_dict() == guider.lock.as_dict() == lock.in_own_loop().as_dict()
        and again.guidance_scale == 3.0
        and again._stop == 0.9
    )
    assert guider.new(guidance_scale=2.0).lock.as_dict() == guider.lock.as_dict()
    assert lock_of("paper") == kvf.LockConfig.preset("paper", edit_path="free")
    assert lock_of({}) == kvf.LockConfig(edit_path="free") == lock_of("kvlock")


def test_several_prompts_share_one_noise_and_source():
    pipe = tiny_wan()
    made = modular(kvf.KVLockWanBlocks, pipe, guider=kvf.KVLockGuidance(4.0))
    video, mask = video_and_mask()
    prompts = ["a blue square", "a green circle"]

    def run(prompt, latents):
        return made(video=video, mask=mask, source_prompt="a red circle", prompt=prompt,
                    negative_prompt=["dark"] * len(prompt), num_inference_steps=STEPS, latents=latents,
                    max_sequence_length=12, output="latents")  # fmt: skip

    both = run(prompts, drawn(1).expand(2, -1, -1, -1, -1))
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(run([prompt], drawn(1)), both[i : i + 1], rtol=0, atol=1e-5)
    assert not torch.allclose(both[0], both[1])


def test_frames_come_out():
    made = modular(kvf.KVLockWanBlocks, tiny_wan(), guider=kvf.KVLockGuidance(4.0))
    video, mask = video_and_mask()
    frames = made(video=list(video.numpy()), mask=mask.numpy(), **SAID, num_inference_steps=2, max_sequence_length=12,
                  generator=torch.Generator().manual_seed(0), output="videos")  # fmt: skip
    assert frames.shape == (1, *SIZE, 3)


def test_the_blocks_guiders_are_ours_from_the_start():
    assert isinstance(kvf.KVLockWanBlocks().init_pipeline().guider, kvf.KVLockGuidance)
    two = KVLockWan22Blocks().init_pipeline()
    assert [two.guider.guidance_scale, two.guider_2.guidance_scale] == [4.0, 3.0]
    assert "source_prompt" in kvf.KVLockWanBlocks().doc


BAD = {
    "guider": (
        dict(guider=ClassifierFreeGuidance()),
        {},
        "guider must be a KVLockGuidance, got ClassifierFreeGuidance",
    ),
    "path": (
        dict(guider=kvf.KVLockGuidance(lock=dict(source_path="invert"))),
        {},
        "source_path must be 'renoise'.*'invert'",
    ),
    "compute": (dict(guider=kvf.KVLockGuidance(lock=dict(compute="foreground"))), {}, "compute 'foreground'"),
    "mask": ({}, dict(mask=torch.zeros(SIZE, dtype=torch.bool)), "mask is empty"),
    "video": ({}, dict(video=torch.zeros(9, 32, 64)), "video must be uint8"),
    "text": ({}, dict(source_prompt=["a", "b"]), "source_prompt must be a text"),
}


@pytest.mark.parametrize(("parts", "given", "message"), BAD.values(), ids=BAD)
def test_bad_input(parts, given, message):
    pipe = tiny_wan()
    made = modular(kvf.KVLockWanBlocks, pipe, **{"guider": kvf.KVLockGuidance(4.0), **parts})
    video, mask = video_and_mask()
    with pytest.raises(kvf.InputError, match=message):
        made(**{"video": video, "mask": mask, **SAID, **given}, num_inference_steps=2, max_sequence_length=12)
    assert untouched(pipe.transformer)


@pytest.mark.parametrize(
    ("lock", "message"), [("kvlok", "unknown preset 'kvlok'"), (3, "got int"), ({"alfa": 1}, "'alfa'")]
)
def test_bad_locks(lock, message):
    with pytest.raises(kvf.InputError, match=rf"lock.*{message}"):
        kvf.KVLockGuidance(lock=lock)
