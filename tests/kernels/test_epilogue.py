"""The step's epilogue: reference and Triton (interpreted) against a simulation of the whole loop in numpy fp64."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kvlock_fast.config import PRESETS, LockConfig
from kvlock_fast.kernels import epilogue, guidance
from kvlock_fast.kernels.epilogue import launch_shipped, launch_step_epilogue, step_epilogue
from kvlock_fast.kernels.epilogue_reference import step_epilogue_reference
from kvlock_fast.kernels.epilogue_state import TRACE_COLUMNS, Schedule, StepState, new_step_state
from kvlock_fast.kernels.guidance import cfg_projection_reference, guided_prediction_reference
from kvlock_fast.kernels.language import HAS_TRITON
from kvlock_fast.kernels.launch import recorded_launches
from kvlock_fast.loop.epilogue import schedule_of
from kvlock_fast.loop.schedule import Controller, VarianceWindow, in_interval
from kvlock_fast.loop.solver import Solver, solver_table

EXAMPLES = settings().max_examples
NAN, INF = float("nan"), float("inf")
triton_only = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
quiet = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, over planted infs
BACKENDS = ["reference", pytest.param("triton", marks=triton_only)]
both = pytest.mark.parametrize("backend", BACKENDS)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclasses.dataclass
class Run:
    """A run's inputs: cond, uncond [steps, B, C, T, H, W]; table [steps, 3, 3 + J]; path [steps + 1, 1, C, T, H, W]."""

    latents: torch.Tensor
    cond: torch.Tensor
    uncond: torch.Tensor | None
    foreground: torch.Tensor
    table: torch.Tensor
    path: torch.Tensor | None
    omega0: list[float]
    schedule: Schedule

    @property
    def steps(self):
        return len(self.table)


def flow_table(steps):
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    table = torch.zeros(steps, 3, 3, dtype=torch.float64)
    table[:, :2, 0] = 1
    table[:, 0, 1], table[:, 1, 1] = -sigmas[:-1], sigmas.diff()
    return table.float()


def multistep_table(steps, history, corrects, seed=0):
    """Random weights of every kind of input, none for what does not exist yet."""
    random = torch.Generator().manual_seed(seed)
    table = torch.randn(steps, 3, 3 + history, generator=random) * 0.4
    table[:, 0, 2:] = 0
    if not corrects:
        table[:, :, 2] = table[:, 2] = 0
    table[0, :, 2] = 0
    for k in range(min(steps, history)):
        table[k, :, 3 + k :] = 0
    return table


def make_run(
    shape=(2, 2, 2, 3, 5),
    steps=3,
    dtype=torch.float32,
    solver="flow",
    guided=True,
    path=False,
    shared=True,
    omega0=5.0,
    seed=0,
    share=0.4,
    **schedule,
):
    """A run whose predictions calm down sample by sample, so that the variance meets every clamp."""
    random = torch.Generator().manual_seed(seed)
    batch, volume = shape[0], shape[2:]

    def normal(*size):
        return torch.randn(size, generator=random)

    calm = torch.tensor([1.0, 0.05, 0.3])[torch.arange(batch) % 3].view(-1, 1, 1, 1, 1)
    cond, uncond = ((normal(steps, *shape) * calm).to(dtype) for _ in range(2))
    foreground = torch.rand(1 if shared else batch, *volume, generator=random) < share
    foreground[:, 0, 0, 0] = True
    table = {
        "flow": lambda: flow_table(steps),
        "two-step": lambda: multistep_table(steps, 1, False),
        "three-step": lambda: multistep_table(steps, 2, False),
        "corrected": lambda: multistep_table(steps, 2, True),
        "corrected-1": lambda: multistep_table(steps, 1, True),
    }[solver]()
    return Run(
        latents=normal(*shape).to(DEVICE),
        cond=cond.to(DEVICE),
        uncond=uncond.to(DEVICE) if guided else None,
        foreground=foreground.to(DEVICE),
        table=table,
        path=normal(steps + 1, 1, *shape[1:]).to(DEVICE) if path else None,
        omega0=omega0 if isinstance(omega0, list) else [omega0] * steps,
        schedule=Schedule(
            **{"tau": 0.4, **{n: x.to(DEVICE) if torch.is_tensor(x) else x for n, x in schedule.items()}}
        ),
    )


def poison(state):
    """NaN in everything that nothing has been written to."""
    for x in (state.window, state.corrected):
        if x is not None:
            x.fill_(NAN)
    return state


def start(run):
    return poison(new_step_state(run.latents, run.table, run.omega0, run.schedule))


def predictions(run, k):
    return run.cond[k], None if run.uncond is None else run.uncond[k]


def advance(run, state, k, backend):
    step_epilogue(state, *predictions(run, k), run.foreground, run.schedule, run.path, backend)


def result(run, backend, steps=None):
    """The latents after every step, and the last state."""
    state, latents = start(run), []
    for k in range(run.steps if steps is None else steps):
        advance(run, state, k, backend)
        latents.append(state.latents.clone())
    return torch.stack(latents), state


def f64(x):
    return x.detach().cpu().double().numpy()


def simulate(run):
    """The loop in numpy fp64, sample by sample, written from the formulas: latents, x0hat, trace of every step."""
    samples = [simulate_sample(run, b) for b in range(run.latents.shape[0])]
    return tuple(np.stack(column, axis=1) for column in zip(*samples, strict=True))


def simulate_sample(run, b):
    lock, table = run.schedule, f64(run.table)
    inside = run.foreground[b if len(run.foreground) > 1 else 0].cpu().numpy()
    counted = np.ones_like(inside) if lock.detection == "global" else inside
    tau = f64(lock.tau)[b if lock.tau.numel() > 1 else 0] if isinstance(lock.tau, torch.Tensor) else lock.tau
    x, corrected, clean, window = f64(run.latents)[b], None, [], []
    alpha, omega = lock.warmup_alpha if lock.alpha is None else lock.alpha, run.omega0[0]
    latents, trace, ratios = [], [], []
    for k in range(run.steps):
        idle = k < lock.zero_init_steps
        v, s = f64(run.cond[k])[b], 1.0
        if run.uncond is not None:
            u = f64(run.uncond[k])[b]
            if lock.s_star and run.omega0[k] > 1 and not idle:
                where = inside if lock.s_star_region == "foreground" else np.ones_like(inside)
                c_in, u_in = v[:, where], u[:, where]
                s = (c_in * u_in).sum() / ((u_in**2).sum() + 1e-8)
            v = s * u + omega * (v - s * u)
        v = np.zeros_like(v) if idle else v
        rows = [combine(row, [x, v, corrected, *clean[::-1]]) for row in table[k]]
        clean.append(rows[0])
        window += [] if idle else [rows[0]]
        x, corrected = rows[1], rows[2]
        if run.path is not None:
            x = np.where(inside, x, f64(run.path[k + 1, 0]))
        variance = NAN
        last = window[-lock.variance_window :]
        if len(window) >= 2 and lock.reduction == "mean":
            variance = np.var([x[:, counted].mean() for x in last], ddof=1)
        elif len(window) >= 2:
            variance = np.var(last, axis=0, ddof=1)[:, counted].mean()
        latents.append(x)
        trace.append([variance, alpha, omega, s, float(not np.isfinite(x).all())])
        dynamic = k + 1 >= lock.first_dynamic_step and len(window) >= lock.min_predictions
        omega = run.omega0[min(k + 1, run.steps - 1)]
        ratio = variance / max(tau, 1e-12)
        ratios.append(ratio if len(window) >= lock.min_predictions else NAN)
        seen = ratios[k + 1 - lock.alpha_lag] if k + 1 >= lock.alpha_lag else NAN
        if lock.alpha is None:
            alpha = lock.warmup_alpha
            if k + 1 >= lock.first_dynamic_step and not np.isnan(seen):
                alpha = 1.0 if seen >= lock.alpha_snap else min(max(seen, lock.alpha_floor), 1.0)
        if dynamic and lock.dynamic_omega and run.uncond is not None and omega > 1:
            omega = max(omega * min(ratio, lock.b), lock.omega_floor)
    return np.array(latents), np.array(clean), np.array(trace)


def combine(weights, values):
    return sum(w * y for w, y in zip(weights, values, strict=False) if w != 0)


def check(run, backend, tolerance=2e-5):
    latents, state = result(run, backend)
    want, clean, trace = simulate(run)
    np.testing.assert_allclose(f64(latents), want, rtol=0, atol=tolerance * abs(want).max())
    for k in range(max(0, run.steps - len(state.window)), run.steps):
        entry = f64(state.window[k % len(state.window)])
        np.testing.assert_allclose(entry, clean[k], rtol=0, atol=tolerance * abs(clean).max())
    np.testing.assert_allclose(f64(state.trace), trace, rtol=20 * tolerance, atol=1e-6)
    assert state.step.item() == run.steps
    np.testing.assert_allclose(f64(state.variance), trace[-1, :, 0], rtol=20 * tolerance)
    np.testing.assert_allclose(f64(state.s_star), trace[-1, :, 3], rtol=20 * tolerance, atol=1e-6)


MODES = {
    "paper": {},
    "fixed-alpha": {"alpha": 0.5},
    "never-locked": {"alpha": 0.0, "dynamic_omega": False},
    "constant-omega": {"dynamic_omega": False},
    "no-s-star": {"s_star": False},
    "s-star-of-the-foreground": {"s_star_region": "foreground"},
    "detection-everywhere": {"detection": "global"},
    "mean": {"reduction": "mean", "tau": 0.02, "steps": 5},
    "mean-of-everything": {"reduction": "mean", "detection": "global", "tau": 0.02, "shared": False},
    "mean-after-zero-init": {"reduction": "mean", "tau": 0.02, "variance_window": 3, "zero_init_steps": 1, "steps": 7},
    "unguided": {"guided": False},
    "unguided-fixed": {"guided": False, "alpha": 1.0, "dynamic_omega": False},
    "tau-of-the-source": {"tau": torch.tensor([0.3])},
    "tau-per-sample": {"tau": torch.tensor([0.3, 0.002])},
    "still-source": {"tau": torch.zeros(1)},
    "small-tau": {"tau": 1e-4, "b": 0.7},
    "large-tau": {"tau": 100.0},
    "floors": {"tau": 100.0, "alpha_floor": 0.3, "omega_floor": 2.5},
    "snap": {"tau": 0.9, "alpha_snap": 0.5, "steps": 5},
    "lag": {"tau": 0.9, "alpha_lag": 2, "warmup_alpha": 0.2, "steps": 6},
    "lag-after-warm-up": {"tau": 0.9, "alpha_lag": 2, "first_dynamic_step": 3, "alpha_snap": 0.6, "steps": 6},
    "lag-of-a-fixed-alpha": {"alpha": 0.5, "alpha_lag": 2},
    "warm-up": {"first_dynamic_step": 3, "warmup_alpha": 0.25, "steps": 5},
    "always-warm-up": {"first_dynamic_step": 50},
    "wait-for-3": {"min_predictions": 3, "steps": 6, "warmup_alpha": 0.3},
    "wait-for-4-with-lag": {"min_predictions": 4, "alpha_lag": 2, "zero_init_steps": 1, "steps": 8},
    "window-2": {"variance_window": 2, "steps": 4},
    "window-3": {"variance_window": 3, "steps": 6},
    "window-beyond-the-run": {"variance_window": 40},
    "full-window": {"variance_window": 5, "steps": 8},
    "two-stages": {"omega0": [4.0, 3.0, 1.0, 1.0], "steps": 4},
    "late-guidance": {"omega0": [1.0, 0.5, 6.0, 6.0], "steps": 4},
    "low-scale": {"omega0": 0.7},
    "zero-init": {"zero_init_steps": 2, "steps": 5},
    "zero-init-only": {"zero_init_steps": 9},
    "kept-background": {"path": True},
    "kept-background-everywhere": {"path": True, "detection": "global", "s_star": False},
    "own-masks": {"shared": False, "path": True},
    "two-step-solver": {"solver": "two-step"},
    "three-step-solver": {"solver": "three-step", "variance_window": 2, "steps": 5},
    "corrector": {"solver": "corrected", "path": True, "steps": 5},
    "corrector-short-window": {"solver": "corrected", "variance_window": 2, "steps": 5, "guided": False},
    "corrector-1": {"solver": "corrected-1", "zero_init_steps": 1},
}
SHAPES = {
    "one-element": (1, 1, 1, 1, 1),
    "one-sample": (1, 4, 2, 3, 5),
    "three-samples": (3, 2, 1, 5, 7),
    "aligned": (2, 2, 2, 4, 8),
    "aligned-to-8": (2, 2, 1, 3, 8),
    "two-blocks": (1, 2, 3, 19, 23),
    "one-full-block": (1, 1, 4, 16, 16),
    "no-samples": (0, 2, 2, 3, 4),
}


@both
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_every_mode_follows_the_loop(mode, backend):
    check(make_run(**mode), backend)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "dpm++": lambda: DPMSolverMultistepScheduler(**FLOW),
}


# Triton takes the reference's steps, tested below; here once more over whole runs, with --all.
@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=(triton_only, pytest.mark.large))])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("preset", [*PRESETS, "auto-tau"])
def test_presets_take_the_controllers_and_the_schedulers_steps(preset, scheduler, backend):
    """The loop's own parts beside the epilogue, over the same predictions."""
    changes = {"tau": "auto"} if preset == "auto-tau" else {}
    lock = LockConfig.preset("paper" if changes else preset, kappa=3, **changes)
    run = make_run(path=lock.background_latents == "source", steps=5)
    solver, tau = Solver(SCHEDULERS[scheduler](), run.steps, run.latents.device), torch.ones(1, device=DEVICE)
    controller = Controller(lock, run.steps, len(run.latents), run.foreground)
    source = VarianceWindow(max(2, min(lock.variance_window, run.steps)), run.foreground, lock.reduction)
    schedule = schedule_of(lock, run.steps, tau if lock.tau == "auto" else lock.tau)
    run = dataclasses.replace(run, table=solver_table(solver.scheduler), schedule=schedule)
    state, latents, inside = start(run), run.latents, run.foreground[:, None]
    for k in range(run.steps):
        alpha, omega, s = controller.alpha(k), controller.omega(k, run.omega0[k]), controller.ones
        locks = in_interval(lock.lock_interval, run.steps, k)  # the epilogue's alpha is not read in other steps
        torch.testing.assert_close((state.alpha * locks, state.omega), (alpha, omega), rtol=1e-3, atol=1e-5)
        variance, v = controller.no_variance, torch.zeros_like(latents)
        if k >= run.schedule.zero_init_steps:
            cond, uncond = predictions(run, k)
            s = cfg_projection_reference(cond, uncond) if lock.s_star else s
            v = guided_prediction_reference(cond, uncond, omega, s)
            theirs = 0.3 * run.cond[k, :1]
            observed = source.push(theirs)
            if observed is not None:
                tau.copy_(observed)
            variance = controller.observe(solver.predict_clean(k, v, latents), theirs)
        latents = solver.step(k, v, latents)
        latents = latents if run.path is None else torch.where(inside, latents, run.path[k + 1])
        advance(run, state, k, backend)
        torch.testing.assert_close(state.latents, latents, rtol=1e-4, atol=1e-4 * float(latents.abs().max()))
        torch.testing.assert_close(state.variance, variance, rtol=1e-3, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(state.trace[k, :, 3], s, rtol=1e-4, atol=1e-6)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("solver", ["flow", "corrected"])
def test_every_dtype_is_computed_in_fp32(solver, dtype, backend):
    check(make_run(dtype=dtype, solver=solver, path=True), backend)


@both
@pytest.mark.parametrize("shape", [s for s in SHAPES.values() if s[0]], ids=[n for n, s in SHAPES.items() if s[0]])
def test_every_shape_follows_the_loop(shape, backend):
    check(make_run(shape=shape, steps=3, path=True, shared=False), backend)


@both
def test_no_samples_are_no_work(backend):
    _, state = result(make_run(shape=SHAPES["no-samples"]), backend, steps=1)
    assert state.latents.shape == SHAPES["no-samples"]


@st.composite
def runs(draw):
    window = draw(st.integers(2, 7))
    return make_run(
        shape=tuple(draw(st.integers(1, most)) for most in (2, 2, 3, 5, 5)),
        steps=draw(st.integers(1, 4)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        solver=draw(st.sampled_from(["flow", "two-step", "corrected"])),
        guided=draw(st.booleans()),
        path=draw(st.booleans()),
        shared=draw(st.booleans()),
        omega0=draw(st.sampled_from([1.0, 1.5, 7.0])),
        seed=draw(st.integers(0, 99)),
        share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        tau=draw(st.sampled_from([0.05, 1.0])),
        b=draw(st.sampled_from([0.5, 2.0])),
        variance_window=window,
        alpha=draw(st.sampled_from([None, None, 0.5])),
        dynamic_omega=draw(st.booleans()),
        s_star=draw(st.booleans()),
        s_star_region=draw(st.sampled_from(["all", "foreground"])),
        detection=draw(st.sampled_from(["global", "foreground"])),
        first_dynamic_step=draw(st.integers(0, 4)),
        zero_init_steps=draw(st.integers(0, 2)),
        alpha_lag=draw(st.integers(1, 2)),
        reduction=draw(st.sampled_from(["elements", "mean"])),
        min_predictions=2 + draw(st.integers(0, 1)) * (window > 2),
    )


@given(runs())
@settings(max_examples=2 * EXAMPLES, deadline=None)
def test_any_run_follows_the_loop(run):
    """s* of a few elements may divide by nearly nothing, and a run of few steps amplify it: the reference decides."""
    latents, _ = result(run, "reference")
    want, _, trace = simulate(run)
    scale = max(1.0, float(abs(trace[..., 3]).max()))
    np.testing.assert_allclose(f64(latents), want, rtol=0, atol=1e-4 * scale * (1 + abs(want).max()))


@triton_only
@given(runs())
@settings(max_examples=EXAMPLES // 2, deadline=None)
def test_triton_takes_the_references_step_in_any_run(run):
    """From the same state: one step's rounding, none that adds up."""
    state = start(run)
    for k in range(run.steps):
        mine = clone(state)
        advance(run, state, k, "reference")
        advance(run, mine, k, "triton")
        for name, want, got in tensors(state, mine):
            largest = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * (1 + largest), equal_nan=True, msg=name)


def clone(state):
    return StepState(*(x if x is None else x.clone() for x in vars(state).values()))


def tensors(*states):
    """(name, tensor of each state), of those that are there."""
    for name in vars(states[0]):
        values = [getattr(state, name) for state in states]
        if values[0] is not None:
            yield name, *values


@both
@pytest.mark.parametrize("solver", ["flow", "corrected"])
def test_the_same_bits_every_run(solver, backend):
    run = make_run(shape=(1, 2, 3, 19, 23), solver=solver, path=True, steps=3)
    (first, a), (second, b) = result(run, backend), result(run, backend)
    assert torch.equal(first, second)
    for name, x, y in tensors(a, b):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7)), name


@both
def test_a_still_sample_of_a_still_source_is_calm(backend):
    """0 / 0 would be NaN: neither has moved, so nothing needs to be locked."""
    run = make_run(tau=torch.zeros(1), guided=False)
    run.cond.zero_()
    _, state = result(run, backend)
    assert (state.variance < 1e-13).all() and (state.alpha < 0.1).all()


@triton_only
@pytest.mark.parametrize("mode", ["paper", "s-star-of-the-foreground", "corrector", "own-masks", "mean"])
def test_many_blocks_and_partial_sums_add_up(mode, monkeypatch):
    """As with large latents: every program has several blocks, every sum several turns."""
    monkeypatch.setattr(epilogue, "BLOCK", 16)
    monkeypatch.setattr(epilogue, "SUM_BLOCK", 2)
    monkeypatch.setattr(guidance, "BLOCK", 8)
    monkeypatch.setattr(guidance, "MOST_PROGRAMS", 3)
    check(make_run(**MODES[mode] | {"shape": (2, 2, 2, 3, 7), "steps": 3}), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["paper", "corrector", "unguided"])
def test_one_captured_graph_serves_every_step(mode):
    run = make_run(**MODES[mode])
    want, _ = result(run, "triton")
    cond, uncond = run.cond[0].clone(), None if run.uncond is None else run.uncond[0].clone()
    state, graph = start(run), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_epilogue(state, cond, uncond, run.foreground, run.schedule, run.path)
    for k in range(run.steps):
        cond.copy_(run.cond[k])
        if uncond is not None:
            uncond.copy_(run.uncond[k])
        graph.replay()
        assert torch.equal(state.latents, want[k])


LAUNCHES = {
    "guided": ({}, ["_projection_partials_kernel", "_update_kernel", "_schedule_kernel"]),
    "corrected": (
        {"solver": "corrected", "path": True},
        ["_projection_partials_kernel", "_update_kernel", "_schedule_kernel"],
    ),
    "no-s-star": ({"s_star": False}, ["_update_kernel", "_schedule_kernel"]),
    "unguided": ({"guided": False}, ["_update_kernel", "_schedule_kernel"]),
}


@triton_only
@pytest.mark.parametrize(("mode", "kernels"), LAUNCHES.values(), ids=LAUNCHES)
def test_a_step_is_at_most_three_launches(mode, kernels):
    run = make_run(**mode)
    with recorded_launches() as launches:
        advance(run, start(run), 0, "triton")
    assert [launch.name for launch in launches] == kernels


@triton_only
@pytest.mark.parametrize("architecture", [80, 90])
def test_what_ships_can_be_listed_without_a_gpu(architecture):
    with recorded_launches(dry_run_for=architecture) as launches:
        launch_shipped(architecture)
    assert {launch.name for launch in launches} == {"_projection_partials_kernel", "_update_kernel", "_schedule_kernel"}


class NoHostReads(TorchDispatchMode):
    """Refuses what would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")
        assert not any(word in func.__name__ for word in waits), f"{func} reads from the device"
        return func(*args, **(kwargs or {}))


IMPLEMENTATIONS = {
    "reference": step_epilogue_reference,
    "triton": launch_step_epilogue,
}


@both
@pytest.mark.parametrize(
    "mode", ["paper", "corrector", "zero-init", "unguided", "tau-per-sample", "two-stages", "mean"]
)
def test_nothing_is_read_by_the_host(mode, backend):
    run = make_run(**MODES[mode])
    state = start(run)
    for k in range(2):
        with NoHostReads():
            IMPLEMENTATIONS[backend](state, *predictions(run, k), run.foreground, run.schedule, run.path)


@quiet
@both
@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
def test_bad_latents_are_marked_in_their_step_and_sample(bad, backend):
    run = make_run(steps=4, s_star=False, dynamic_omega=False)
    run.cond[2, 1, 0, 0, 0, 0] = bad
    _, state = result(run, backend)
    marks = state.trace[:, :, TRACE_COLUMNS.index("non_finite")]
    assert marks.tolist() == [[0, 0], [0, 0], [0, 1], [0, 1]]
    assert state.variance[0].isfinite() and state.trace[3, 0].isfinite().all()


@quiet
@both
@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
def test_a_bad_background_stays_out_of_what_the_foreground_decides(bad, backend):
    """Predictions of the background do not count for the variance, for s* of the foreground, nor for kept latents."""
    run = make_run(path=True, s_star_region="foreground", shared=False)
    clean = [result(run, backend)]
    outside = ~run.foreground[:, None].expand(run.latents.shape)
    for x in (*run.cond, *run.uncond):
        x[outside] = bad
    latents, state = result(run, backend)
    assert torch.equal(latents, clean[0][0])
    assert torch.equal(state.trace.nan_to_num(7), clean[0][1].trace.nan_to_num(7))
    assert (state.trace[:, :, 4] == 0).all()


@both
def test_zero_init_reads_no_prediction(backend):
    run = make_run(zero_init_steps=2, steps=4)
    want, before = result(run, backend)
    run.cond[:2] = NAN
    run.uncond[:2] = NAN
    got, after = result(run, backend)
    assert torch.equal(got, want) and torch.equal(after.trace.nan_to_num(7), before.trace.nan_to_num(7))


@both
def test_inputs_are_left_alone(backend):
    run = make_run(path=True, solver="corrected", tau=torch.tensor([0.3]))
    kept = [run.cond, run.uncond, run.foreground, run.path, run.schedule.tau]
    before = [x.clone() for x in kept]
    state = start(run)
    table, omega0 = state.table.clone(), state.omega0.clone()
    advance(run, state, 0, backend)
    assert all(torch.equal(x, y) for x, y in zip(kept, before, strict=True))
    assert torch.equal(state.table, table) and torch.equal(state.omega0, omega0)


@both
def test_predictions_may_lie_in_one_batched_output(backend):
    """Halves of a forward over both branches, more channels than the latents have, and a row of the source in front."""
    run = make_run()
    joined = torch.full((1 + 4, 5, *run.latents.shape[2:]), NAN, device=DEVICE)
    want, _ = result(run, backend)
    state = start(run)
    for k in range(run.steps):
        cond, uncond = joined[1:, :2].split(2)
        cond.copy_(run.cond[k])
        uncond.copy_(run.uncond[k])
        assert not cond.is_contiguous()
        step_epilogue(state, cond, uncond, run.foreground, run.schedule, backend=backend)
        assert torch.equal(state.latents, want[k])


@triton_only
def test_a_call_after_the_last_step_does_nothing():
    run = make_run(steps=3, path=True)
    _, state = result(run, "triton")
    after = clone(state)
    advance(run, after, 2, "triton")
    for name, x, y in tensors(state, after):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7)), name


def test_the_state_starts_as_the_schedule_says():
    run = make_run(steps=4, omega0=[3.0, 2.0, 2.0, 2.0], warmup_alpha=0.25, solver="corrected", variance_window=2)
    state = start(run)
    assert state.alpha.tolist() == [0.25, 0.25] and state.omega.tolist() == [3.0, 3.0]
    assert state.window.shape[0] == 3 and state.corrected.shape == state.latents.shape and state.history == 2
    assert state.trace.shape == (4, 2, 5) and state.trace.isnan().all() and state.variance.isnan().all()
    assert torch.equal(state.latents, run.latents) and state.latents.data_ptr() != run.latents.data_ptr()
    assert start(make_run(alpha=0.5)).alpha.tolist() == [0.5, 0.5] and start(make_run()).corrected is None


def replaced(state, **changes):
    return dataclasses.replace(state, **changes)


MISFITS = {
    "prediction-shape": ({"cond": torch.ones(2, 2, 2, 3, 4)}, r"cond .*2, 2, 2, 3, 4"),
    "prediction-dtypes": ({"uncond": torch.ones(2, 2, 2, 3, 5, dtype=torch.float16)}, "uncond .*float16"),
    "integers": ({"cond": torch.ones(2, 2, 2, 3, 5, dtype=torch.int32)}, "cond .*int32"),
    "strided": ({"cond": torch.ones(2, 2, 2, 5, 3).mT, "uncond": None}, "cond must be contiguous along T, H, W"),
    "mask-dtype": ({"foreground": torch.ones(1, 2, 3, 5)}, "foreground must be bool"),
    "mask-batch": ({"foreground": torch.ones(3, 2, 3, 5, dtype=torch.bool)}, "foreground must be bool .2 or 1"),
    "mask-shape": ({"foreground": torch.ones(1, 2, 3, 4, dtype=torch.bool)}, r"foreground .*1, 2, 3, 4"),
    "path-length": ({"source_path": torch.ones(3, 1, 2, 2, 3, 5)}, r"source_path .*3, 1, 2, 2, 3, 5"),
    "tau": ({"schedule": Schedule(tau=torch.ones(3))}, r"tau must be \[1\] or \[2\], got \(3,\)"),
    "window": (
        {"schedule": Schedule(variance_window=9), "entries": 2},
        "window must hold at least 3 predictions, got 2",
    ),
    "trace": ({"trace": torch.ones(2, 2, 5)}, r"trace .*2, 2, 5"),
    "reduction": ({"schedule": Schedule(reduction="mean")}, "made for another reduction than 'mean'"),
    "step": ({"step": torch.zeros(1)}, "step must be contiguous torch.int32"),
    "table": ({"table": torch.zeros(3, 2, 3)}, r"table .*3, 2, 3"),
    "half-latents": ({"latents": torch.ones(2, 2, 2, 3, 5).half()}, "latents .*float16"),
    "backend": ({"backend": "abacus"}, "unknown backend 'abacus'"),
}


@pytest.mark.parametrize(("changes", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused(changes, message):
    run = make_run()
    state, changes = start(run), dict(changes)
    if "entries" in changes:
        state = replaced(state, window=state.window[: changes.pop("entries")])
    state = replaced(state, **{name: changes.pop(name) for name in list(changes) if hasattr(state, name)})
    cond, uncond = predictions(run, 0)
    arguments = dict(cond=cond, uncond=uncond, foreground=run.foreground, schedule=run.schedule, source_path=None)
    with pytest.raises(ValueError, match=message):
        step_epilogue(state, **(arguments | changes))


@pytest.mark.parametrize(
    "setting",
    [
        {"variance_window": 1},
        {"detection": "all"},
        {"s_star_region": "half"},
        {"reduction": "sum"},
        {"min_predictions": 11},
    ],
    ids=str,
)
def test_a_bad_schedule_is_refused(setting):
    with pytest.raises(ValueError, match=str(next(iter(setting.values())))):
        Schedule(**setting)


def test_scales_of_another_length_are_refused():
    with pytest.raises(ValueError, match="3 of them, got 2"):
        new_step_state(make_run().latents, flow_table(3), [1.0, 2.0], Schedule())


@both
@pytest.mark.parametrize("mode", ["paper", "corrector", "unguided", "tau-per-sample", "mean"])
def test_opcheck(mode, backend, monkeypatch):
    run = make_run(**MODES[mode])
    calls = []
    operator = torch.ops.kvlock_fast.step_epilogue.default
    monkeypatch.setattr("kvlock_fast.kernels.epilogue._step_epilogue_op", lambda *a: calls.append(a))
    advance(run, start(run), 0, backend)
    torch.library.opcheck(operator, calls[0], test_utils=("test_schema", "test_faketensor"))


@both
@pytest.mark.parametrize("mode", ["paper", "corrector", "unguided"])
def test_compiled_equals_eager(mode, backend):
    run = make_run(**MODES[mode])

    def step(state, cond, uncond):
        step_epilogue(state, cond * 1, uncond, run.foreground, run.schedule, run.path, backend)
        return state.latents + 0, state.alpha * 2

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager_state, compiled_state = start(run), start(run)
    for k in range(2):
        want, got = step(eager_state, *predictions(run, k)), compiled(compiled_state, *predictions(run, k))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    for name, x, y in tensors(eager_state, compiled_state):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7)), name
