"""Solver tables against diffusers' own schedulers: whole runs over fixed random model outputs."""

import copy

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from kvlock_fast.errors import InputError
from kvlock_fast.loop.solver import solver_table

pytestmark = pytest.mark.numeric

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SCHEDULERS = {
    "flow-euler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
    "ddim-eps": lambda: DDIMScheduler(clip_sample=False),
    "ddim-v": lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "ddim-sample": lambda: DDIMScheduler(clip_sample=False, prediction_type="sample"),
    "ddim-zero-snr": lambda: DDIMScheduler(clip_sample=False, **ZERO_SNR),
    "cogvideox-ddim": lambda: CogVideoXDDIMScheduler(clip_sample=False, **ZERO_SNR),
    "unipc-flow": lambda: UniPCMultistepScheduler(**FLOW),
    "unipc-flow-1": lambda: UniPCMultistepScheduler(**FLOW, solver_order=1),
    "unipc-flow-3": lambda: UniPCMultistepScheduler(**FLOW, solver_order=3),
    "unipc-eps": lambda: UniPCMultistepScheduler(),
    "unipc-uncorrected": lambda: UniPCMultistepScheduler(**FLOW, disable_corrector=[0, 1, 7]),
    "dpm++2m-flow": lambda: DPMSolverMultistepScheduler(**FLOW),
    "dpm++2m-flow-heun": lambda: DPMSolverMultistepScheduler(**FLOW, solver_type="heun"),
    "dpm++3m-flow": lambda: DPMSolverMultistepScheduler(**FLOW, solver_order=3),
    "dpm++2m-karras": lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "dpm++2m-flow-to-sigma-min": lambda: DPMSolverMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"),
    "dpm++2m-to-sigma-min": lambda: DPMSolverMultistepScheduler(final_sigmas_type="sigma_min"),
    "dpm++2m-shift-7": lambda: DPMSolverMultistepScheduler(**{**FLOW, "flow_shift": 7.0}),
    "unipc-karras": lambda: UniPCMultistepScheduler(use_karras_sigmas=True),
    "unipc-to-sigma-min": lambda: UniPCMultistepScheduler(final_sigmas_type="sigma_min"),
    "unipc-flow-to-sigma-min": lambda: UniPCMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"),
    "flow-euler-karras": lambda: FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    "flow-euler-beta": lambda: FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True, shift=3.0),
    "dpm++2m-eps": lambda: DPMSolverMultistepScheduler(),
}
# J, and whether there is a corrector, at 50 steps.
MEMORY = {
    "flow-euler": (0, False),
    "ddim-eps": (0, False),
    "unipc-flow": (2, True),
    "unipc-flow-3": (3, True),
    "dpm++2m-flow": (1, False),
    "dpm++3m-flow": (2, False),
}


def ready(name, steps):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(steps)
    return scheduler


def outputs(steps, seed=0):
    noise, *outputs = torch.randn(steps + 1, 2, 4, 3, 5, generator=torch.Generator().manual_seed(seed)).unbind(0)
    return noise, outputs


def theirs(scheduler, x, outputs, dtype=torch.float32):
    """The scheduler's own run; in fp64 it is asked to keep its constants in fp64 too."""
    scheduler = copy.deepcopy(scheduler)
    for constants in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, constants):
            setattr(scheduler, constants, getattr(scheduler, constants).to(dtype))
    x = x.to(dtype)
    for timestep, v in zip(scheduler.timesteps, outputs, strict=True):
        x = scheduler.step(v.to(dtype), timestep, x, return_dict=False)[0]
    return x


def ours(table, x, outputs):
    """A table's run, and every predicted clean latent."""
    corrected, past, clean = torch.full_like(x, float("nan")), [], []
    for rows, v in zip(table, outputs, strict=True):
        given = [x, v, corrected, *past[::-1], *[x * float("nan")] * (rows.shape[1] - 3 - len(past))]
        results = [sum(w * y for w, y in zip(row, given, strict=False) if w != 0) for row in rows]
        x, corrected = results[1], results[2] + torch.zeros_like(x)
        clean.append(results[0])
        past = clean[-(table.shape[2] - 3) :] if table.shape[2] > 3 else []
    return x, clean


FACTOR, ROUNDING = 2.0, 2.0**-20
"""A table may be no further from the truth than this many times the scheduler's own fp32 run, and eight units in the
last place of fp32, which the sum over a row and the noise's own rounding take.
"""


def relative(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


@pytest.mark.parametrize("steps", [50, 11, 2, 1])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_is_the_schedulers_own(name, steps):
    scheduler = ready(name, steps)
    noise, predictions = outputs(len(scheduler.timesteps))
    found, _ = ours(solver_table(scheduler), noise, predictions)
    exact = theirs(scheduler, noise, predictions, torch.float64)
    own = relative(theirs(scheduler, noise, predictions), exact)
    assert relative(found, exact) <= FACTOR * own + ROUNDING


@given(st.sampled_from(list(SCHEDULERS)), st.integers(1, 40), st.integers(0, 99))
def test_a_run_of_any_length_is_the_schedulers_own(name, steps, seed):
    scheduler = ready(name, steps)
    noise, predictions = outputs(len(scheduler.timesteps), seed)
    found, _ = ours(solver_table(scheduler), noise, predictions)
    exact = theirs(scheduler, noise, predictions, torch.float64)
    own = relative(theirs(scheduler, noise, predictions), exact)
    assert relative(found, exact) <= FACTOR * own + ROUNDING


@pytest.mark.parametrize("name", MEMORY)
def test_a_table_remembers_what_it_needs_and_no_more(name):
    table = solver_table(ready(name, 50))
    history, corrects = MEMORY[name]
    assert table.dtype == torch.float32 and table.shape == (50, 3, 3 + history)
    assert table[:, 1, 2].any() == corrects == table[:, 2].any()
    assert not table[0, :, 2:].any()
    assert not table[:, 0, 2:].any()


@pytest.mark.parametrize("name", ["flow-euler", "unipc-flow", "dpm++2m-flow"])
def test_x0hat_of_a_flow_is_the_latents_less_sigma_v(name):
    scheduler = ready(name, 20)
    table = solver_table(scheduler)
    torch.testing.assert_close(table[:, 0, 0], torch.ones(20))
    torch.testing.assert_close(table[:, 0, 1], -scheduler.sigmas[:-1])


def test_x0hat_of_ddim_is_the_schedulers_own():
    scheduler = ready("ddim-eps", 9)
    noise, predictions = outputs(9)
    _, clean = ours(solver_table(scheduler), noise, predictions)
    x = noise
    for timestep, v, mine in zip(scheduler.timesteps, predictions, clean, strict=True):
        x, want = scheduler.step(v, timestep, x, return_dict=False)
        assert relative(mine, want) <= 1e-5


def test_the_scheduler_is_left_alone():
    scheduler = ready("unipc-flow", 5)
    before = scheduler.sigmas.clone()
    solver_table(scheduler)
    assert scheduler.step_index is None and scheduler.last_sample is None and torch.equal(scheduler.sigmas, before)
    assert scheduler.sigmas.dtype == torch.float32


REFUSED = {
    "unknown": (DDPMScheduler, {}, "DDPMScheduler has no table"),
    "clipping": (DDIMScheduler, {}, "clip_sample=True"),
    "thresholding": (DPMSolverMultistepScheduler, {**FLOW, "thresholding": True}, "thresholding=True"),
    "stochastic": (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, "stochastic_sampling=True"),
    "sde": (DPMSolverMultistepScheduler, {**FLOW, "algorithm_type": "sde-dpmsolver++"}, "sde-dpmsolver"),
    "noise-space": (UniPCMultistepScheduler, {"predict_x0": False}, "predict_x0=False"),
    "not-finite": (UniPCMultistepScheduler, {**FLOW, "solver_type": "bh1"}, "not finite"),
}


@pytest.mark.parametrize(("kind", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_table_is_refused(kind, settings, message):
    scheduler = kind(**settings)
    scheduler.set_timesteps(5)
    with pytest.raises(InputError, match=message):
        solver_table(scheduler)


def test_a_scheduler_on_its_way_is_refused():
    scheduler = ready("unipc-flow", 5)
    scheduler.step(torch.ones(1, 2), scheduler.timesteps[0], torch.ones(1, 2))
    with pytest.raises(InputError, match="taken a step"):
        solver_table(scheduler)
