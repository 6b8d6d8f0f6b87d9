"""What Cosmos has of its own: noise on a signal that stays, sigma as the time, its own guidance, a safety checker."""

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlock_fast as kvf
from kvlock_fast.config import LockConfig
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.loop.solver import Solver, solver_table
from kvlock_fast.loop.source import invert, renoise
from kvlock_fast.models import wrap_pipeline
from kvlock_fast.models.cosmos import Cosmos2Model
from kvlock_fast.models.schedulers import EXPLODING, check_scheduler
from tests.families.cases.cosmos import CASES, cosmos, cosmos2_image, cosmos25
from tests.support.conformance import NEGATIVE, PROMPT, SOURCE, Scene
from tests.support.tiny import tiny_wan

BY_NAME = {case.name: case for case in CASES}


def solver(name, steps=6):
    """Of Cosmos 1 or 2, as their pipelines set it up."""
    pipe = cosmos() if name == "cosmos" else cosmos2_image()
    return Solver(pipe.scheduler, steps, torch.device("cpu"), wrap_pipeline(pipe).timesteps_settings(steps, 1, 64, 96))


@pytest.mark.parametrize("name", ["cosmos", "cosmos2"])
def test_a_straight_path_is_followed_exactly(name):
    """With the true clean latent as the prediction, every step lands on x0 + sigma n, and so does the table."""
    ode = solver(name)
    assert ode.prediction == EXPLODING and (ode.signal == 1).all()
    assert ode.sigmas[0] == pytest.approx(80, rel=1e-5) and ode.sigmas[-1] == pytest.approx(0.002, rel=1e-4)
    clean, noise = torch.randn(2, 1, 4, 2, 3, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    x = ode.start(noise) + clean
    assert torch.equal(ode.start(noise), 80 * noise)
    for k in range(6):
        assert torch.equal(ode.predict_clean(k, clean, x), clean)
        of_x, of_v = ode.table[k, 1, :2].double()
        by_table = of_x * x.double() + of_v * clean.double()
        x = ode.step(k, clean, x)
        torch.testing.assert_close(x, clean + ode.sigmas[k + 1] * noise, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(by_table.float(), x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ode.add_noise(k + 1, clean, noise), x, rtol=1e-4, atol=1e-4)
    ode.restart()


@settings(max_examples=20, deadline=None)
@given(steps=st.integers(2, 40), sigma_data=st.sampled_from([0.5, 1.0]), last=st.sampled_from(["zero", "sigma_min"]))
def test_the_table_is_diffusers_own_step(steps, sigma_data, last):
    scheduler = EDMEulerScheduler(sigma_data=sigma_data, final_sigmas_type=last)
    ode = Solver(scheduler, steps, torch.device("cpu"))
    table = solver_table(ode.scheduler).double()
    x, clean = torch.randn(2, 1, 1, 1, 2, 2, generator=torch.Generator().manual_seed(steps)).unbind(0)
    x = ode.start(x)
    for k in range(steps):
        expected = table[k, 1, 0] * x.double() + table[k, 1, 1] * clean.double()
        x = ode.step(k, clean, x)
        torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-4)
        assert table[k, 0].tolist() == [0, 1, 0]


def test_the_source_starts_as_wide_as_the_scheduler_has_it():
    ode = solver("cosmos")
    clean, noise = torch.randn(2, 1, 4, 2, 3, 2).unbind(0)
    path = renoise(clean, noise, ode)
    assert torch.equal(path.start, 80 * noise) and torch.equal(path.at(6), clean)
    torch.testing.assert_close(path.at(2), clean + ode.sigmas[2] * noise)
    with pytest.raises(InputError, match=r"source_path 'invert' cannot start from .*'exploding'"):
        invert(clean, ode, lambda x, k: x)


@pytest.mark.parametrize("name", ["cosmos", "cosmos2-video", "cosmos2.5"])
def test_a_source_of_its_own_folder_is_the_same(tmp_path, name):
    case, seed = BY_NAME[name], lambda: torch.Generator().manual_seed(1)
    pipe = case.make()
    kvf.KVLockPipeline.from_pipe(pipe).invert(
        case.video(), case.mask(), tmp_path, source_prompt=SOURCE, num_inference_steps=case.steps, generator=seed(),
        lock=LockConfig.preset("kvlock"), cache=kvf.CacheConfig(format="native"),
    )  # fmt: skip
    made = case.edit(pipe, cache=kvf.CacheConfig(tier="resident", format="native"))
    for generator in (None, seed()):
        read = case.edit(pipe, cache=kvf.CacheConfig(path=tmp_path), generator=generator)
        assert torch.equal(read.latents, made.latents)


@pytest.mark.parametrize("name", ["cosmos", "cosmos2-image"])
def test_an_edit_by_the_table_is_one_by_the_scheduler(monkeypatch, name):
    case = BY_NAME[name]
    by_table = case.edit(case.make(), lock="kvlock", steps=5)
    monkeypatch.setattr("kvlock_fast.loop.solver._table", lambda *_: None)
    with pytest.warns(InputWarning, match="has no table"):
        by_scheduler = case.edit(case.make(), lock="kvlock", steps=5)
    torch.testing.assert_close(by_table.latents, by_scheduler.latents, rtol=1e-3, atol=1e-3)


def test_guidance_is_what_is_added_beyond_the_conditional():
    model = wrap_pipeline(cosmos())
    cond, uncond = torch.randn(2, 1, 4, 2, 3, 2).unbind(0)
    for scale in (1.5, 4.0, 7.25):
        omega0 = model.omega0(scale)
        expected = cond + scale * (cond - uncond)
        torch.testing.assert_close(uncond + omega0 * (cond - uncond), expected)
        assert torch.equal(model.combine(cond, uncond, omega0), expected)
    assert model.omega0(1.0) == 1.0 and not model.guided(1.0)
    out = BY_NAME["cosmos"].edit(cosmos(), lock=LockConfig.preset("s-star-only"), guidance_scale=4.0, steps=2)
    assert [record.omega for record in out.trace.records] == [5.0, 5.0]


@pytest.mark.parametrize("name", ["cosmos", "cosmos2-image", "cosmos2.5"])
def test_the_time_told_is_of_sigma(monkeypatch, name):
    case = BY_NAME[name]
    pipe = case.make()
    told, plain = [], pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer, "forward", lambda *a, **k: told.append(k["timestep"].clone()) or plain(*a, **k)
    )
    case.edit(pipe, lock="kvlock", steps=3)
    sigmas = Solver(
        pipe.scheduler, 3, torch.device("cpu"), wrap_pipeline(pipe).timesteps_settings(3, *case.size)
    ).sigmas
    of = {"cosmos": lambda s: 0.25 * s.log(), "cosmos2-image": lambda s: s / (s + 1), "cosmos2.5": lambda s: s}[name]
    for k, time in enumerate(told):
        torch.testing.assert_close(time, of(sigmas[k]).expand_as(time))
    assert len(told) == 3


class Blurs:
    """A safety checker that finds something in every picture."""

    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return prompt != NEGATIVE

    def check_video_safety(self, frames):
        return np.full_like(frames, 9)


def test_the_safety_checker_has_its_say():
    case, pipe = BY_NAME["cosmos2.5"], cosmos25()
    pipe.safety_checker = Blurs()
    with pytest.raises(InputError, match="prompt 'a dog' was found unsafe"):
        case.edit(pipe, prompt=NEGATIVE)
    out = case.edit(pipe, output="frames", negative_prompt="dark", steps=2)
    assert (out.frames[0] == 9).all() and out.frames[0].shape == (*case.size, 3)
    pipe.safety_checker = None
    with pytest.raises(InputError, match="no safety_checker"):
        kvf.KVLockPipeline.from_pipe(pipe)


def test_what_cannot_be_followed_is_refused(monkeypatch):
    with pytest.raises(InputError, match="noise is not what the model was trained on"):
        kvf.KVLockPipeline.from_pipe(tiny_wan(EDMEulerScheduler()))
    pipe = cosmos()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(InputError, match="noise is not what the model was trained on"):
        kvf.KVLockPipeline.from_pipe(pipe)
    check_scheduler(EDMEulerScheduler())
    shown = cosmos25()
    with pytest.raises(InputError, match="shown a video beside the text"):
        Cosmos2Model(shown)
    padded = cosmos()
    padded.transformer.register_to_config(concat_padding_mask=True)
    monkeypatch.setattr("kvlock_fast.models.cosmos.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs torchvision"):
        kvf.KVLockPipeline.from_pipe(padded)


def test_an_image_is_one_frame():
    scene = Scene(BY_NAME["cosmos2-image"])
    assert scene.model.geometry.one_frame and not Scene(BY_NAME["cosmos2.5"]).model.geometry.one_frame
    video, mask = np.zeros((2, 64, 96, 3), np.uint8), np.ones((2, 64, 96), bool)
    with pytest.raises(InputError, match="the model makes images"):
        kvf.KVLockPipeline.from_pipe(scene.pipe)(video, mask, source_prompt="a cat", prompt=PROMPT)


def test_a_picture_is_held(monkeypatch):
    """In the place of the first frame, at hardly any noise, for the source and both branches; the edit ends on it."""
    case = BY_NAME["cosmos2-video"]
    pipe = case.make()
    seen, plain = [], pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: seen.append(k) or plain(*a, **k))
    out = case.edit(pipe, lock="kvlock", steps=3)
    with torch.no_grad():
        first = wrap_pipeline(pipe).encode_video(torch.from_numpy(case.video()[:1]))
    for call in seen:
        assert torch.equal(call["hidden_states"][:, :4, :1], first.expand(3, -1, -1, -1, -1))
        assert call["condition_mask"].flatten(2).sum(2).flatten().tolist() == [first.shape[3] * first.shape[4]] * 3
        times = call["timestep"][:, 0, :, 0, 0]
        assert torch.allclose(times[:, 0], torch.tensor(1e-4), rtol=1e-3) and (times[:, 1:] > 1e-3).all()
    torch.testing.assert_close(out.latents[:, :, :1], first, rtol=0, atol=0.02)  # sigma ends at 0.002
    only = np.zeros(case.size, bool)
    only[0] = True
    with pytest.raises(InputError, match="mask marks the first frame only"):
        kvf.KVLockPipeline.from_pipe(pipe)(case.video(), only, source_prompt="a cat", prompt=PROMPT)
