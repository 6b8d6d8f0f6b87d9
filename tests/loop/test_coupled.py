"""The coupled path: an edit is the source plus a difference, which the difference of two velocities moves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlock_fast as kvf
from kvlock_fast.conditioning import Given
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.loop.solver import Solver
from kvlock_fast.masks import tokens_of
from kvlock_fast.scene import generator_of
from tests.pipeline.test_pipeline import a_mask, a_video, call, unipc
from tests.support.tiny import tiny_cogvideox, tiny_wan

COUPLED = LockConfig(kappa=4, edit_path="coupled", source_noise=1, skip_share=0.0)
NOTHING = {"prompt": "a red circle", "guidance_scale": 1.0}
"""The source's own prompt, unguided: nothing is to change."""


def clean_of(pipe) -> torch.Tensor:
    return kvf.KVLockPipeline.from_pipe(pipe).model.encode_video(torch.from_numpy(a_video()))


@pytest.mark.parametrize("noise", [1, 3, "fresh"])
@pytest.mark.parametrize("background", ["model", "source"])
@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, unipc], ids=["euler", "unipc"])
def test_where_nothing_is_asked_for_nothing_changes(scheduler, background, noise):
    lock = replace(COUPLED, background_latents=background, source_noise=noise)
    pipe = tiny_wan(scheduler())
    out = call(pipe, lock=lock, steps=6, **NOTHING).latents
    clean = clean_of(pipe)
    torch.testing.assert_close(out, clean, rtol=0, atol=1e-4 * float(clean.abs().max()))


def test_a_free_edit_does_change_there():
    pipe = tiny_wan()
    out = call(pipe, lock=LockConfig(kappa=4, edit_path="free"), steps=6, **NOTHING).latents
    assert (out - clean_of(pipe)).abs().max() > 0.1


def test_the_whole_path_in_fp64():
    """delta += dsigma (v_edit - v_src), x = path + delta: by hand, of Euler's steps."""
    pipe, lock = tiny_wan(), replace(COUPLED, alpha=0.0, omega="constant", s_star=False, background_latents="model")
    model = kvf.KVLockPipeline.from_pipe(pipe).model
    out = call(pipe, lock=lock, steps=5, guidance_scale=3.0).latents
    solver, pixels = Solver(pipe.scheduler, 5, torch.device("cpu")), torch.from_numpy(a_mask())
    given = Given(torch.from_numpy(a_video()), pixels, model.project(pixels), 3.0)
    clean, sigmas = clean_of(pipe).double(), solver.sigmas.double()
    noise = model.draw_noise(clean.shape, torch.Generator().manual_seed(1), clean.device).double()
    told = {text: model.condition([text], given) for text in ("a red circle", "a blue circle", "")}
    delta = torch.zeros_like(clean)
    for k in range(5):
        source = (1 - sigmas[k]) * clean + sigmas[k] * noise
        v = {
            text: model.predict(0, (source + (delta if text != "a red circle" else 0)).float(), solver.timesteps[k], of)
            for text, of in told.items()
        }
        guided = v[""].double() + 3.0 * (v["a blue circle"].double() - v[""].double())
        delta = delta + (sigmas[k + 1] - sigmas[k]) * (guided - v["a red circle"].double())
    torch.testing.assert_close(out.double(), clean + delta, rtol=0, atol=1e-4 * float(clean.abs().max()))


def test_a_diffusion_model_is_coupled_too():
    pipe = tiny_cogvideox("2b")
    assert isinstance(pipe.scheduler, DDIMScheduler) or "DDIM" in type(pipe.scheduler).__name__
    clip = {"video": a_video(9, 32, 48), "mask": a_mask(9, 32, 48)}
    out = call(pipe, lock=COUPLED, steps=6, **clip, **NOTHING).latents
    clean = kvf.KVLockPipeline.from_pipe(pipe).model.encode_video(torch.from_numpy(clip["video"]))
    torch.testing.assert_close(out, clean, rtol=0, atol=1e-3 * float(clean.abs().max()))


@pytest.mark.parametrize("noise", [2, "fresh"])
def test_tiers_and_batches_draw_the_same_noise(tmp_path, noise):
    lock, prompts = replace(COUPLED, source_noise=noise), ["a dog", "a cat"]
    tiers = {
        tier: CacheConfig(tier=tier, format="native", root=str(tmp_path))
        for tier in ("lockstep", "resident", "host", "disk")
    }
    edits = [call(tiny_wan(), lock=lock, steps=6, prompt=prompts, cache=cache).latents for cache in tiers.values()]
    again = call(tiny_wan(), lock=lock, steps=6, prompt=prompts, cache=tiers["disk"]).latents  # found, not made
    alone = call(tiny_wan(), lock=lock, steps=6, prompt="a cat").latents
    for other in (*edits[1:], again, torch.cat([edits[0][:1], alone])):
        torch.testing.assert_close(other, edits[0], rtol=0, atol=2e-4)


def test_a_named_cache_keeps_its_noises(tmp_path):
    lock = replace(COUPLED, source_noise=3)
    pipeline = kvf.KVLockPipeline.from_pipe(tiny_wan())
    seed = torch.Generator().manual_seed(1)
    steps = {"num_inference_steps": 6, "source_prompt": "a red circle"}
    native = CacheConfig(format="native")
    pipeline.invert(a_video(), a_mask(), tmp_path / "c", lock=lock, generator=seed, cache=native, **steps)
    kept = call(tiny_wan(), lock=lock, steps=6, cache=CacheConfig(path=str(tmp_path / "c"))).latents
    torch.testing.assert_close(kept, call(tiny_wan(), lock=lock, steps=6).latents, rtol=0, atol=2e-4)
    for other in (replace(lock, source_noise=2), LockConfig(kappa=4, edit_path="free")):
        with pytest.raises(kvf.InputError, match="source_noise"):
            call(tiny_wan(), lock=other, steps=6, cache=CacheConfig(path=str(tmp_path / "c")))


def test_noises_of_a_seed_do_not_meet_those_of_another():
    drawn = [torch.randn(8, generator=generator_of(seed, i)) for seed in range(4) for i in range(1, 5)]
    drawn += [torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert len({tuple(x.tolist()) for x in drawn}) == len(drawn)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"source_noise": 2, "edit_path": "free"}, "source_noise 2 needs edit_path 'coupled'"),
        (
            {"source_noise": "fresh", "edit_path": "coupled", "source_path": "invert"},
            "source_noise 'fresh' does not go",
        ),
        (
            {"edit_path": "coupled", "latents_shift": 0.5, "source_path": "invert"},
            "latents_shift 0.5 needs",
        ),
        ({"source_noise": 0, "edit_path": "coupled"}, "source_noise"),
        ({"source_noise": "new", "edit_path": "coupled"}, "source_noise"),
        ({"edit_path": "tied"}, "edit_path must be one of free, coupled"),
    ],
)
def test_what_does_not_go_together(values, message):
    with pytest.raises(ValueError, match=message):
        LockConfig(**values)


@pytest.mark.parametrize(
    "values, coupled, noises",
    [
        ({}, True, 3),
        ({"source_path": "invert"}, True, 1),
        ({"source_noise": "fresh"}, True, "fresh"),
        ({"edit_path": "free"}, False, 1),
        ({"alpha": 0.0, "omega": "constant", "s_star": False}, True, 3),  # the background is still kept
        ({"alpha": 0.0, "omega": "constant", "s_star": False, "background_latents": "model"}, False, 1),
    ],
)
def test_what_an_edit_is_where_its_path_is_not_said(values, coupled, noises):
    lock = LockConfig(**values)
    assert (lock.coupled, lock.noises) == (coupled, noises)
    assert lock.as_dict()["edit_path"] == ("coupled" if coupled else "free")
    assert noises == "fresh" or not lock.in_own_loop().coupled


@given(st.integers(0, 2**31 - 1), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_tokens_of_latents_by_brute_force(seed, time, height, width):
    mask = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(seed)) < 0.1
    mask[0, -1, -1, -1] = True
    tokens = tokens_of(mask, (time, height, width)).view(1, -1, -(-4 // height), -(-6 // width))
    for t, y, x in np.ndindex(*tokens.shape[1:]):
        under = mask[0, t * time : (t + 1) * time, y * height : (y + 1) * height, x * width : (x + 1) * width]
        assert tokens[0, t, y, x] == under.any()


@pytest.mark.parametrize("path", ["coupled", "free"])
def test_an_edit_changes_no_latent_outside_of_the_mask(path):
    pipe, mask = tiny_wan(), np.zeros_like(a_mask())
    mask[:, 9:12, 9:12] = True  # one latent of the four of its token
    out = call(pipe, lock=LockConfig(kappa=4, edit_path=path), steps=4, mask=mask)
    assert int(out.mask.tokens.sum()) * 4 == 4 * int(out.mask.latents.sum())
    changed = (out.latents != clean_of(pipe)).any(1)
    assert torch.equal(changed, out.mask.latents)
