"""The schedule and the source's path, against their formulas and diffusers' own noise."""

import copy
import math
import warnings

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.loop.graph import choose_capture, why_not_captured
from kvlock_fast.loop.solver import Solver, solver_table
from kvlock_fast.loop.source import invert, renoise
from kvlock_fast.models import wrap_pipeline
from kvlock_fast.models.schedulers import check_scheduler
from tests.pipeline.test_pipeline import call
from tests.support.locks import paper
from tests.support.tiny import COGVIDEOX_SCHEDULE, tiny_wan

pytestmark = pytest.mark.numeric

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "dpm++": lambda: DPMSolverMultistepScheduler(**FLOW),
}


def solver(name, steps=20):
    return Solver(SCHEDULERS[name](), steps, torch.device("cpu"))


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
    """dx/dsigma = x has the solution x0 exp(sigma): errors of the first order halve with the step, others quarter."""
    clean = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    errors = {}
    for method in ("euler", "uni-inv", "heun", "midpoint"):
        for steps in (100, 200):
            ode = Solver(FlowMatchEulerDiscreteScheduler(), steps, torch.device("cpu"))
            ode.sigmas = ode.sigmas.double()
            found = invert(clean, ode, lambda x, k: x.double(), method).start.item()
            errors[method, steps] = abs(found - torch.exp(ode.sigmas[0]).item())
    for method in ("euler", "uni-inv"):
        assert errors[method, 100] / errors[method, 200] == pytest.approx(2, rel=0.1)
    for method in ("heun", "midpoint"):
        assert errors[method, 100] / errors[method, 200] == pytest.approx(4, rel=0.1)


def test_midpoint_is_rf_solvers_taylor_step():
    """x + h v + h^2 / 2 (v_mid - v) / (h / 2), where the velocity depends on x and on sigma."""
    ode = Solver(FlowMatchEulerDiscreteScheduler(shift=3.0), 5, torch.device("cpu"))
    ode.sigmas = ode.sigmas.double()

    def velocity(x, sigma):
        return torch.sin(3 * x) + sigma * x

    def predict(x, k):
        whole = int(k)
        sigma = ode.sigmas[whole] if whole == k else (ode.sigmas[whole] + ode.sigmas[whole + 1]) / 2
        return velocity(x, sigma)

    ode.slope = lambda k, prediction, sample: prediction
    x = clean = torch.randn(1, 2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in reversed(range(5)):
        low, high = ode.sigmas[k + 1], ode.sigmas[k]
        h, v = high - low, velocity(x, low)
        derivative = (velocity(x + h / 2 * v, low + h / 2) - v) / (h / 2)
        x = x + h * v + h**2 / 2 * derivative
    torch.testing.assert_close(invert(clean, ode, predict, "midpoint").start, x)


def test_uni_inversion_is_undone_by_eulers_steps():
    """Up and down again comes back with an error of the second order, where Euler's inversion has the first."""
    clean, errors = torch.linspace(-1, 1, 9, dtype=torch.float64).view(1, 1, 1, 3, 3), {}
    for method in ("euler", "uni-inv"):
        for steps in (100, 200):
            ode = Solver(FlowMatchEulerDiscreteScheduler(), steps, torch.device("cpu"))
            ode.sigmas, ode.slope = ode.sigmas.double(), lambda k, prediction, sample: prediction
            x = invert(clean, ode, lambda x, k: torch.sin(3 * x), method).start
            for k in range(steps):
                x = ode.drop(k, x, torch.sin(3 * x))
            errors[method, steps] = (x - clean).abs().max()
    assert errors["euler", 100] / errors["euler", 200] == pytest.approx(2, rel=0.2)
    assert errors["uni-inv", 100] / errors["uni-inv", 200] == pytest.approx(4, rel=0.2)


def test_a_diffusion_has_no_midpoint():
    with pytest.raises(InputError, match=r"inversion_solver 'midpoint' follows a flow, .* type is 'epsilon'"):
        invert(torch.ones(1, 1, 1, 1, 1), diffusion("ddim-eps", 4), lambda x, k: x, "midpoint")


def test_runs_do_not_meet():
    scheduler = SCHEDULERS["unipc"]()
    before = scheduler.timesteps.clone()
    first = Solver(scheduler, 7, torch.device("cpu"))
    first.step(0, torch.ones(1, 2), torch.ones(1, 2))
    assert torch.equal(scheduler.timesteps, before) and scheduler.step_index is None


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
DIFFUSION = {
    "ddim-eps": lambda: DDIMScheduler(clip_sample=False),
    "ddim-v": lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"),
    "ddim-sample": lambda: DDIMScheduler(clip_sample=False, prediction_type="sample"),
    "ddim-zero-snr": lambda: DDIMScheduler(prediction_type="v_prediction", **ZERO_SNR),
    "cogvideox": lambda: CogVideoXDDIMScheduler(**COGVIDEOX_SCHEDULE),
    "cogvideox-clipping-on-paper": lambda: CogVideoXDDIMScheduler(),
    "unipc-eps": lambda: UniPCMultistepScheduler(),
    "unipc-v": lambda: UniPCMultistepScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
    "dpm++-eps": lambda: DPMSolverMultistepScheduler(),
    "dpm++-v-to-sigma-min": lambda: DPMSolverMultistepScheduler(
        prediction_type="v_prediction", final_sigmas_type="sigma_min"
    ),
}


def diffusion(name, steps=20):
    return Solver(DIFFUSION[name](), steps, torch.device("cpu"))


def what_is_predicted(ode, k, clean, noise):
    """By a model that knows both."""
    a, b = ode.signal[k], ode.sigmas[k]
    return {"epsilon": noise, "v_prediction": a * noise - b * clean, "sample": clean}[ode.prediction]


@pytest.mark.parametrize("name", list(DIFFUSION))
def test_a_diffusions_path_is_followed_exactly(name):
    """With the true prediction at every step, every solver follows a x0 + b n to where it ends."""
    clean, noise = torch.randn(2, 1, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    ode = diffusion(name)
    torch.testing.assert_close(ode.signal**2 + ode.sigmas**2, torch.ones(21))
    source = renoise(clean, noise, ode)
    x = source.at(0)
    for k in range(ode.num_steps):
        torch.testing.assert_close(x, source.at(k), rtol=1e-3, atol=1e-3)
        predicted = what_is_predicted(ode, k, clean, noise)
        if ode.signal[k] > 0.05:  # before, a prediction of the noise says little of the clean latent in fp32
            torch.testing.assert_close(ode.predict_clean(k, predicted, source.at(k)), clean, rtol=1e-3, atol=1e-3)
        x = ode.step(k, predicted, x)
    torch.testing.assert_close(x, ode.add_noise(20, clean, noise), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", list(DIFFUSION))
def test_renoising_a_diffusion_is_the_schedulers_own(name):
    clean, noise = torch.randn(2, 1, 4, 3, 5, 6).unbind(0)
    ode, scheduler = diffusion(name, 10), DIFFUSION[name]()
    scheduler.set_timesteps(10)
    for k in range(10):
        theirs = scheduler.add_noise(clean, noise, scheduler.timesteps[k : k + 1])
        torch.testing.assert_close(renoise(clean, noise, ode).at(k), theirs, rtol=1e-3, atol=1e-3)


@given(st.sampled_from(list(DIFFUSION) + list(SCHEDULERS)), st.integers(1, 40), st.integers(0, 99))
def test_x0hat_is_the_tables_and_diffusers_own(name, steps, seed):
    ode = Solver({**DIFFUSION, **SCHEDULERS}[name](), steps, torch.device("cpu"))
    x, prediction = torch.randn(2, 1, 4, 1, 3, 2, generator=torch.Generator().manual_seed(seed)).unbind(0)
    scheduler = copy.deepcopy(ode.scheduler)
    table = solver_table(scheduler)
    for k, timestep in enumerate(scheduler.timesteps):
        found = ode.predict_clean(k, prediction, x)
        scale = float(found.abs().max())
        torch.testing.assert_close(
            found, table[k, 0, 0] * x + table[k, 0, 1] * prediction, rtol=1e-4, atol=1e-4 * scale
        )
        if "ddim" in name or "cogvideox" in name:
            theirs = scheduler.step(prediction, timestep, x, return_dict=False)[1]
            torch.testing.assert_close(found, theirs.float(), rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["ddim-eps", "ddim-v", "cogvideox", "dpm++-eps"])
def test_inversion_of_a_diffusion_converges_in_its_order(name):
    """For latents of variance s^2, the ODE scales x by sqrt(a^2 s^2 + b^2): ddim's error halves, heun's quarters."""
    clean, s2 = torch.ones(1, 1, 1, 1, 1), 0.25
    errors = {}
    for method in ("euler", "heun"):
        for steps in (50, 100):
            ode = diffusion(name, steps)
            ode.signal, ode.sigmas = ode.signal.double(), ode.sigmas.double()

            def predict(x, k, ode=ode):
                a, b = ode.signal[k], ode.sigmas[k]
                best = a * s2 / (a * a * s2 + b * b) * x
                noise = b / (a * a * s2 + b * b) * x
                return noise if ode.prediction == "epsilon" else a * noise - b * best

            spread = (ode.signal**2 * s2 + ode.sigmas**2).sqrt()
            path = invert(clean.double(), ode, predict, method).path.flatten()
            errors[method, steps] = (path - spread / spread[-1]).abs().max().item()
    assert errors["euler", 50] / errors["euler", 100] == pytest.approx(2, rel=0.2)
    assert errors["heun", 50] / errors["heun", 100] == pytest.approx(4, rel=0.3)
    assert errors["heun", 100] < errors["euler", 100] / 5


def test_ddim_goes_up_as_it_came_down():
    """With one noise prediction for all steps, inversion is the steps backwards."""
    ode = diffusion("ddim-eps", 25)
    clean, noise = torch.randn(2, 1, 4, 2, 3, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    path = invert(clean, ode, lambda x, k: noise)
    x = path.start
    for k in range(25):
        torch.testing.assert_close(x, path.at(k), rtol=1e-4, atol=1e-4)
        x = ode.step(k, noise, x)
    torch.testing.assert_close(x, clean, rtol=1e-3, atol=1e-3)


def test_where_there_is_no_timestep_it_is_the_cleanest():
    for name, expected in (("ddim-eps", 0), ("cogvideox", 0), ("dpm++-eps", 0)):
        ode = diffusion(name, 10)
        assert ode.timestep_at(10) == expected and ode.timestep_at(9) == ode.timesteps[9]
        assert ode.timestep_at(10).dtype == ode.timesteps.dtype
    assert math.isclose(float(solver("euler", 10).timestep_at(10)), 0.0)


REFUSED_DIFFUSION = {
    "adds noise": (
        CogVideoXDPMScheduler(),
        None,
        r"adds noise at every step.*CogVideoXDDIMScheduler.from_config\(pipe",
    ),
    "a flow's model": (
        DDIMScheduler(),
        True,
        "type 'epsilon'.*the model predicts a flow's velocity: use flow matching",
    ),
    "no flow's model": (
        FlowMatchEulerDiscreteScheduler(),
        False,
        "the model was not trained on a flow: use epsilon or v_prediction or sample, by one of DDIMScheduler, ",
    ),
    "half a flow": (UniPCMultistepScheduler(use_flow_sigmas=True), None, "type 'epsilon'.*not flow matching"),
    "sde": (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), False, "adds noise at every step"),
}


@pytest.mark.parametrize("name", list(REFUSED_DIFFUSION))
def test_schedulers_of_another_kind_are_refused(name):
    scheduler, flow, message = REFUSED_DIFFUSION[name]
    with pytest.raises(InputError, match=message):
        check_scheduler(scheduler, flow)


def test_schedules_that_cannot_be_are_refused():
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match=r"begins at pure noise .rescale_betas_zero_snr=True.*'epsilon' says nothing"):
        Solver(DDIMScheduler(**ZERO_SNR), 5, cpu)
    with pytest.raises(InputError, match="CogVideoXDDIMScheduler cannot make 1001 steps"):
        Solver(CogVideoXDDIMScheduler(), 1001, cpu)
    with pytest.raises(InputError, match=r"source_path 'invert' cannot start from .* 'sample'"):
        invert(torch.zeros(1, 1, 1, 1, 1), diffusion("ddim-sample"), lambda x, k: x)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EulerDiscreteScheduler(), r"EulerDiscreteScheduler .*its sigmas begin at 1\d.*, and a flow's at 1"),
        (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler .*15 timesteps and 16 sigmas for 8 steps"),
        (FlowMatchLCMScheduler(), "FlowMatchLCMScheduler .*leaves the line"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "adds noise at every step"),
        (DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"), "adds noise at every step"),
    ],
    ids=["euler-eps", "heun", "lcm", "reversed", "stochastic", "sde"],
)
def test_other_schedulers_are_refused(scheduler, message):
    with pytest.raises(InputError, match=message):
        check_scheduler(scheduler, True)


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
    background = ~out.mask.latents[:, None].expand_as(out.latents)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        plain = call(pipe, lock="cfg", steps=6).latents  # unlocked: every scheduler is called itself
    assert not torch.equal(plain[background], out.latents[background])
    with pytest.raises(InputError, match=r"graph is .on., .*scheduler's own steps"):
        solver = Solver(pipe.scheduler, 5, torch.device("cpu"))
        choose_capture("on", torch.device("cuda"), why_not_captured(wrap_pipeline(pipe), paper(), solver))


REVERSED = {"reversed": {}, "its own sigmas": {"sigmas": [0.0, 0.1, 0.3, 0.45, 0.8]}}


@pytest.mark.parametrize("settings", list(REVERSED.values()), ids=list(REVERSED))
def test_reversed_time_goes_the_same_line(settings):
    """Sigma from noise to data, the model predicting x0 - n, as Mochi: by the scheduler, by the table, and upwards."""
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True, shift=1.0)
    settings = {name: [1 - s for s in values] for name, values in settings.items()}  # which the scheduler turns round
    ode = Solver(scheduler, 5, torch.device("cpu"), settings)
    check_scheduler(scheduler, "reversed")
    assert ode.prediction == "reversed_flow" and ode.table is not None and ode.num_steps == 5
    clean, noise = torch.randn(2, 1, 4, 3, 5, 6).unbind(0)
    source = renoise(clean, noise, ode)
    x = source.at(0)
    for k in range(ode.num_steps):
        torch.testing.assert_close(x, source.at(k), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ode.predict_clean(k, clean - noise, x), clean, rtol=1e-4, atol=1e-4)
        by_table = ode.table[k, :, 0, None] * x.flatten() + ode.table[k, :, 1, None] * (clean - noise).flatten()
        torch.testing.assert_close(by_table[0], clean.flatten(), rtol=1e-4, atol=1e-4)
        x = ode.step(k, clean - noise, x)
        torch.testing.assert_close(by_table[1], x.flatten(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x, clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(invert(clean, ode, lambda x, k: clean - noise).start, source.at(0), rtol=1e-4, atol=1e-4)
    assert ode.timestep_at(5) == pytest.approx(1000)


def test_the_direction_of_time_is_the_models():
    forwards, backwards = (FlowMatchEulerDiscreteScheduler(invert_sigmas=x) for x in (False, True))
    with pytest.raises(InputError, match=r"invert_sigmas=True is not supported: the model counts from data to noise"):
        check_scheduler(backwards, True)
    with pytest.raises(InputError, match=r"invert_sigmas=False is not supported: the model counts from noise to data"):
        check_scheduler(forwards, "reversed")


@pytest.mark.parametrize("steps", [2, 4, 9])
def test_a_shift_by_resolution_is_the_pipelines_own(steps):
    """Sigmas and mu as pipelines give them; without a mu the shift would be a guess."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    sigmas = [1 - i / steps * 0.9 for i in range(steps)]
    ode = Solver(scheduler, steps, torch.device("cpu"), {"sigmas": sigmas, "mu": 0.8})
    theirs = copy.deepcopy(scheduler)
    theirs.set_timesteps(sigmas=sigmas, mu=0.8, device="cpu")
    assert torch.equal(ode.timesteps, theirs.timesteps) and torch.equal(ode.sigmas, theirs.sigmas)
    assert torch.equal(ode.table, solver_table(theirs))
    with pytest.raises(InputError, match="use_dynamic_shifting=True"):
        Solver(scheduler, steps, torch.device("cpu"))
    check_scheduler(scheduler, True, shifts=True)
    with pytest.raises(InputError, match="cannot make 1 steps: its sigmas are not finite"):
        Solver(scheduler, 1, torch.device("cpu"), {"sigmas": [1.0], "mu": 0.8})  # stretched to a terminal by 0 / 0
