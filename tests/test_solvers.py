"""The schedule and the source's path, against their formulas and diffusers' own noise."""

import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from test_pipeline import call
from tiny import tiny_wan

import kvlock_fast as kvf
from kvlock_fast.denoise import why_not_captured
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.graph import choose_capture
from kvlock_fast.models import wrap_pipeline
from kvlock_fast.solvers import FlowSolver
from kvlock_fast.source import invert, renoise

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "dpm++": lambda: DPMSolverMultistepScheduler(**FLOW),
}


def solver(name, steps=20):
    return FlowSolver(SCHEDULERS[name](), steps, torch.device("cpu"))


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_a_straight_path_is_followed_exactly(name):
    """With the true velocity n - x0 at every step, every solver goes down the line between n and x0."""
    clean, noise = torch.randn(2, 1, 4, 3, 5, 6).unbind(0)
    ode = solver(name)
    source = renoise(clean, noise, ode)
    x = source.at(0)
    for k in range(ode.num_steps):
        torch.testing.assert_close(x, source.at(k), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ode.predict_clean(k, noise - clean, x), clean, rtol=1e-4, atol=1e-4)
        x = ode.step(k, noise - clean, x)
    torch.testing.assert_close(x, clean, rtol=1e-4, atol=1e-4)
    assert torch.equal(source.at(ode.num_steps), clean)


def test_renoising_is_the_schedulers_own():
    clean, noise = torch.randn(2, 1, 4, 3, 5, 6).unbind(0)
    scheduler = SCHEDULERS["euler"]()
    scheduler.set_timesteps(10)
    ode = solver("euler", 10)
    for k in range(10):
        theirs = scheduler.scale_noise(clean, scheduler.timesteps[k : k + 1], noise)
        torch.testing.assert_close(renoise(clean, noise, ode).at(k), theirs)


def test_inversion_converges_in_its_order():
    """dx/dsigma = x has the solution x0 exp(sigma): euler's error halves with the step, heun's quarters."""
    clean = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    errors = {}
    for method in ("euler", "heun"):
        for steps in (100, 200):
            ode = FlowSolver(FlowMatchEulerDiscreteScheduler(), steps, torch.device("cpu"))
            ode.sigmas = ode.sigmas.double()
            found = invert(clean, ode, lambda x, k: x.double(), method).start.item()
            errors[method, steps] = abs(found - torch.exp(ode.sigmas[0]).item())
    assert errors["euler", 100] / errors["euler", 200] == pytest.approx(2, rel=0.1)
    assert errors["heun", 100] / errors["heun", 200] == pytest.approx(4, rel=0.1)


def test_runs_do_not_meet():
    scheduler = SCHEDULERS["unipc"]()
    before = scheduler.timesteps.clone()
    first = FlowSolver(scheduler, 7, torch.device("cpu"))
    first.step(0, torch.ones(1, 2), torch.ones(1, 2))
    assert torch.equal(scheduler.timesteps, before) and scheduler.step_index is None


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(), "DDIMScheduler .prediction type 'epsilon'.*its steps cannot be taken"),
        (UniPCMultistepScheduler(), "UniPCMultistepScheduler .prediction type 'epsilon'.*not flow matching"),
        (EulerDiscreteScheduler(), r"EulerDiscreteScheduler .*its sigmas begin at 1\d.*, and a flow's at 1"),
        (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler .*15 timesteps and 16 sigmas for 8 steps"),
        (FlowMatchLCMScheduler(), "FlowMatchLCMScheduler .*leaves the line"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "adds noise at every step"),
        (DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"), "adds noise at every step"),
    ],
    ids=["ddim", "unipc-eps", "euler-eps", "heun", "lcm", "reversed", "stochastic", "sde"],
)
def test_other_schedulers_are_refused(scheduler, message):
    with pytest.raises(InputError, match=message):
        FlowSolver(scheduler, 5, torch.device("cpu"))


class PlainFlow:
    """A scheduler of somebody's own: no base class, no config, nothing but what a loop calls."""

    def set_timesteps(self, steps, device=None):
        self.sigmas = torch.linspace(1, 0, steps + 1, device=device) ** 1.5
        self.timesteps = 1000 * self.sigmas[:-1]
        self.index = 0

    def step(self, v, timestep, x, return_dict=True):
        a, b = self.sigmas[self.index : self.index + 2]
        self.index += 1
        return (x + (b - a) * v,)


class Euler(FlowMatchEulerDiscreteScheduler):
    """diffusers' own under a name that nobody knows."""


def test_an_unknown_scheduler_that_follows_the_flow_is_called_itself():
    known = call(tiny_wan()).latents
    with pytest.warns(InputWarning, match="scheduler Euler has no table of its steps: it is called itself"):
        unknown = call(tiny_wan(Euler(shift=3.0))).latents
    torch.testing.assert_close(unknown, known, rtol=1e-5, atol=1e-5)
    pipe = tiny_wan()
    pipe.scheduler = PlainFlow()
    with pytest.warns(InputWarning, match="scheduler PlainFlow has no table"):
        out = call(pipe, lock="kvlock", steps=6)
    assert out.latents.isfinite().all()
    background = ~out.mask.token_latents[:, None].expand_as(out.latents)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        plain = call(pipe, lock="cfg", steps=6).latents  # unlocked: every scheduler is called itself
    assert not torch.equal(plain[background], out.latents[background])
    with pytest.raises(InputError, match=r"graph is .on., .*scheduler's own steps"):
        solver = FlowSolver(pipe.scheduler, 5, torch.device("cpu"))
        choose_capture("on", torch.device("cuda"), why_not_captured(wrap_pipeline(pipe), kvf.LockConfig(), solver))
