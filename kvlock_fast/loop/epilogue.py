"""What follows a step's forwards: guidance, the solver's step, the variance, and the next alpha and omega.

`DeviceStepper` does it in one operation on state that stays on the device (kernels/epilogue.py), by the solver's table.
`SchedulerStepper` asks diffusers' scheduler, as diffusers does: for unlocked edits, whose bits are then diffusers' own,
and for schedulers that have no table.
"""

import copy
from dataclasses import fields
from typing import Protocol

import torch
from torch import Tensor

from kvlock_fast.config import LockConfig
from kvlock_fast.kernels.epilogue import step_epilogue
from kvlock_fast.kernels.epilogue_reference import cfg_projection_reference, guided_prediction_reference
from kvlock_fast.kernels.epilogue_state import Schedule, StepState, new_step_state
from kvlock_fast.loop.foreground import mix_seam, seam_weights
from kvlock_fast.loop.schedule import (
    Controller,
    VarianceWindow,
    compares_with_source,
    first_dynamic_step,
    fixed_alpha,
    fixed_tau,
    in_interval,
    predictions_to_wait_for,
    window_size,
    zeroed_steps,
)  # fmt: skip
from kvlock_fast.loop.solver import Solver
from kvlock_fast.loop.source import SourcePath
from kvlock_fast.loop.task import Task

ALPHA = 1
"""The column of a trace."""
LEAST_VARIANCE = 1e-12
"""Of the source, where tau follows it: one that does not move at all would divide by zero."""


class Stepper(Protocol):
    """Holds the edit's latents and takes its steps, once their predictions are there."""

    @property
    def latents(self) -> Tensor:
        """[B, C, T, H, W], at the step that comes next."""
        ...

    @property
    def alpha(self) -> Tensor:
        """[B] fp32, of the step that comes next."""
        ...

    @property
    def omega(self) -> Tensor:
        """[B] fp32, of the step that comes next."""
        ...

    @property
    def later_alpha(self) -> Tensor:
        """[B] fp32, of the step after that, where alpha lags."""
        ...

    def advance(self, k: int, source: Tensor | None, cond: Tensor | None, uncond: Tensor | None) -> None:
        """Take step k by the predictions of the source [1, ...] (where tau follows it) and of both branches [B, ...].

        cond is None in the steps whose prediction is taken as 0, uncond in those whose guidance scale is 1.
        """
        ...

    def trace(self) -> Tensor:
        """[steps, B, 5]: variance, alpha, omega, s* and whether the latents hold NaN or inf, of each step."""
        ...


def schedule_of(lock: LockConfig, steps: int, tau: float | Tensor) -> Schedule:
    """The lock's values as the kernels take them; tau: its own, or a tensor that follows the source's variance."""
    same = {f.name: getattr(lock, f.name) for f in fields(Schedule) if hasattr(lock, f.name)}
    return Schedule(**{
        **same,
        "variance_window": window_size(lock, steps),
        "alpha": fixed_alpha(lock),
        "dynamic_omega": lock.omega == "dynamic",
        "tau": tau,
        "min_predictions": predictions_to_wait_for(lock, steps),
        "zero_init_steps": zeroed_steps(lock, steps),
        "first_dynamic_step": first_dynamic_step(lock, steps),
        "s_star_region": lock.projection_region,
    })  # fmt: skip


class DeviceStepper:
    """Steps without host reads: step number, alpha, omega, window and the solver's coefficients are device tensors."""

    def __init__(self, task: Task, solver: Solver, source: SourcePath, omega0: list[float]):
        """omega0: the guidance scale of each step."""
        lock, steps = task.lock, solver.num_steps
        assert solver.table is not None
        self.solver, self.lock, self.source, self.guided = solver, lock, source, task.negative is not None
        self.foreground = task.mask.latents.contiguous()
        self.path = source.path if lock.keeps_background else None
        self.seam = seam_weights(task.mask, lock)
        self.source_window, tau = None, fixed_tau(lock)
        if compares_with_source(lock):
            tau = torch.ones(1, device=solver.sigmas.device)
            region = torch.ones_like(self.foreground) if lock.detection == "global" else self.foreground
            self.source_window = VarianceWindow(window_size(lock, steps), region, lock.reduction)
        self.schedule = schedule_of(lock, steps, tau)
        self.state = new_step_state(_start(task, source), solver.table, omega0, self.schedule)
        self.coupling = None
        if lock.coupled:
            self.coupling = Coupling(lock, solver, source.path, self.foreground)

    @property
    def latents(self) -> Tensor:
        """[B, C, T, H, W] fp32, at the step that comes next."""
        return self.state.latents

    @property
    def alpha(self) -> Tensor:
        """[B] fp32, of the step that comes next."""
        return self.state.alpha

    @property
    def omega(self) -> Tensor:
        """[B] fp32, of the step that comes next."""
        return self.state.omega

    @property
    def later_alpha(self) -> Tensor:
        """[B] fp32, of the step after that, where alpha lags."""
        return self.state.alpha if self.state.later_alpha is None else self.state.later_alpha

    def advance(self, k: int, source: Tensor | None, cond: Tensor | None, uncond: Tensor | None) -> None:
        """Take step k by the predictions of the source [1, ...] (where tau follows it) and of both branches [B, ...].

        cond is None in the steps whose prediction is taken as 0, uncond in those whose guidance scale is 1.
        """
        if self.source_window is not None and source is not None:
            variance = self.source_window.push(self.solver.predict_clean(k, source, self.source.at(k)))
            if variance is not None and isinstance(self.schedule.tau, Tensor):
                self.schedule.tau.copy_(variance.clamp_min(LEAST_VARIANCE))
        cond = torch.zeros_like(self.latents) if cond is None else _by_rows(cond)
        # By a scale of 1 the other branch does not count: any will do, and the schedule goes on as of a guided step.
        uncond = (cond if self.guided else None) if uncond is None else _by_rows(uncond)
        path = self.path if self.seam is None else None
        step_epilogue(self.state, cond, uncond, self.foreground, self.schedule, path)
        latents = self.state.latents
        if self.coupling is not None:
            moved = latents + self.coupling.correction(source)
            latents = moved if path is None else torch.where(self.foreground[:, None], moved, latents)
        if self.seam is not None and self.path is not None:
            latents = mix_seam(latents, self.path.index_select(0, self.state.step)[0], self.seam)
        if latents is not self.state.latents:
            self.state.latents.copy_(latents)
            bad = (~latents.isfinite()).flatten(1).any(1).float()  # the epilogue counted other latents
            self.state.trace[..., -1].index_copy_(0, self.state.step.long() - 1, bad[None])

    def trace(self) -> Tensor:
        """[steps, B, 5]: variance, alpha, omega, s* and whether the latents hold NaN or inf, of each step."""
        trace = self.state.trace.clone()
        trace[[k for k in range(len(trace)) if not in_interval(self.lock.lock_interval, len(trace), k)], :, ALPHA] = 0
        return trace

    def tensors(self) -> dict[str, Tensor]:
        """All that `advance` reads and writes, by name (but for the source's window); the mask as a copy."""
        own = {"foreground": self.foreground.clone(), "path": self.path, "seam": self.seam}
        named = {**vars(self.state), **own}
        if self.coupling is not None:
            named |= {f"source {name}": x for name, x in vars(self.coupling.state).items()}
            named |= {"source path": self.coupling.path, "source volume": self.coupling.volume}
        return {name: x for name, x in named.items() if x is not None}

    def use(self, tensors: dict[str, Tensor]) -> None:
        """Read and write these instead."""
        self.state = StepState(**{f.name: tensors[f.name] for f in fields(StepState) if f.name in tensors})
        self.foreground, self.path, self.seam = tensors["foreground"], tensors.get("path"), tensors.get("seam")
        if self.coupling is not None:
            held = {f.name: tensors.get(f"source {f.name}") for f in fields(StepState)}
            self.coupling.state = StepState(**{name: x for name, x in held.items() if x is not None})
            self.coupling.path, self.coupling.volume = tensors["source path"], tensors["source volume"]


class Coupling:
    """The source's own steps, which a coupled edit follows: x_{k+1} += path_{k+1} - step(path_k, v_src).

    A step is linear, so the difference to the source is stepped along the difference of the velocities, and all that
    the source's steps get wrong cancels. Its state is a run of one sample, set back to the path after each step.
    """

    def __init__(self, lock: LockConfig, solver: Solver, path: Tensor, volume: Tensor):
        """path: [T + 1, 1, C, T, H, W]; volume: bool [1, T, H, W], any."""
        assert solver.table is not None
        self.path, self.volume, steps = path, torch.ones_like(volume), solver.num_steps
        self.schedule = Schedule(
            variance_window=2, alpha=1.0, dynamic_omega=False, s_star=False, zero_init_steps=zeroed_steps(lock, steps)
        )
        self.state = new_step_state(path[0], solver.table, 1.0, self.schedule)

    def correction(self, prediction: Tensor | None) -> Tensor:
        """The difference [1, C, T, H, W] between the path and the source's step; prediction: its own, None for 0."""
        prediction = torch.zeros_like(self.state.latents) if prediction is None else _by_rows(prediction)
        step_epilogue(self.state, prediction, None, self.volume, self.schedule)
        there = self.path.index_select(0, self.state.step)[0]
        difference = there - self.state.latents
        self.state.latents.copy_(there)
        return difference


class SchedulerStepper:
    """By diffusers' scheduler, a step at a time."""

    def __init__(self, task: Task, solver: Solver, source: SourcePath, omega0: list[float]):
        """omega0: the guidance scale of each step."""
        solver.restart()
        self.task, self.solver, self.source, self.omega0 = task, solver, source, omega0
        self.controller = Controller(task.lock, solver.num_steps, task.batch, task.mask.latents)
        self.latents = self._as_diffusers(_start(task, source))
        self.alpha = self.controller.alpha(0)
        self._trace: list[Tensor] = []
        self._taken = 0
        self.source_solver = copy.deepcopy(solver) if task.lock.coupled else None

    def advance(self, k: int, source: Tensor | None, cond: Tensor | None, uncond: Tensor | None) -> None:
        """Take step k, as `DeviceStepper.advance` does."""
        task, controller, solver = self.task, self.controller, self.solver
        omega = controller.omega(k, self.omega0[k], task.guided(self.omega0[k]))
        if cond is None:
            prediction, s_star, variance = torch.zeros_like(self.latents), controller.ones, controller.no_variance
            controller.skip()
        else:
            at = self.latents, solver.sigmas[k]
            prediction, s_star = guide(task, cond, uncond, omega, self.omega0[k], *at)
            clean = solver.predict_clean(k, prediction, self.latents)
            source_clean = None if source is None else solver.predict_clean(k, source, self.source.at(k))
            variance = controller.observe(clean, source_clean)
        latents = solver.step(k, prediction, self.latents)
        if self.source_solver is not None:  # as `Coupling`
            there = self.source.at(k)
            own = torch.zeros_like(there) if source is None else source.float()
            latents = latents + self.source.at(k + 1) - self.source_solver.step(k, own, there)
        self.latents = self._as_diffusers(keep_background(task, latents, self.source.at(k + 1)))
        bad = (~self.latents.isfinite()).flatten(1).any(1).float()
        self._trace.append(torch.stack([variance, self.alpha, omega, s_star, bad], dim=-1))
        self.alpha = controller.alpha(k + 1)
        self._taken = k + 1

    def _as_diffusers(self, latents: Tensor) -> Tensor:
        """In the dtype that the family's pipeline keeps them in, where its bits are wanted."""
        return latents.to(self.task.latents_dtype) if self.task.lock.stock else latents

    @property
    def omega(self) -> Tensor:
        """As DeviceStepper's."""
        omega0 = self.omega0[self._taken]
        return self.controller.omega(self._taken, omega0, self.task.guided(omega0))

    @property
    def later_alpha(self) -> Tensor:
        """As DeviceStepper's."""
        return self.controller.alpha(self._taken + 1)

    def trace(self) -> Tensor:
        """[steps, B, 5], as DeviceStepper's."""
        return torch.stack(self._trace)


def new_stepper(task: Task, solver: Solver, source: SourcePath, omega0: list[float]) -> Stepper:
    """On the device, unless diffusers' own bits are wanted or its scheduler has no table."""
    return stepper_kind(task.lock, solver)(task, solver, source, omega0)


def stepper_kind(lock: LockConfig, solver: Solver) -> type[DeviceStepper] | type[SchedulerStepper]:
    """Which of the two takes an edit's steps."""
    return SchedulerStepper if lock.stock or solver.table is None else DeviceStepper


def _by_rows(x: Tensor) -> Tensor:
    """With T, H, W contiguous: where a patch is a single latent, diffusers returns its tokens transposed."""
    return x if x[:1, :1].is_contiguous() else x.contiguous()


def _start(task: Task, source: SourcePath) -> Tensor:
    """The latents before step 0."""
    if task.lock.coupled:
        return source.at(0).expand(task.batch, -1, -1, -1, -1)
    return keep_background(task, source.start.expand(task.batch, -1, -1, -1, -1), source.at(0))


def keep_background(task: Task, latents: Tensor, source_latent: Tensor) -> Tensor:
    """The background of the source's path, where the lock keeps it; else the latents as they are."""
    if not task.lock.keeps_background:
        return latents
    weights = seam_weights(task.mask, task.lock)
    if weights is not None:
        return mix_seam(latents, source_latent.to(latents.dtype), weights)
    return torch.where(task.mask.latents[:, None], latents, source_latent.to(latents.dtype))


def guide(
    task: Task, cond: Tensor, uncond: Tensor | None, omega: Tensor, omega0: float, latents: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """The guided prediction at these latents and s*: eps = s* eps_u + omega (eps_c - s* eps_u)."""
    lock, ones = task.lock, torch.ones_like(omega)
    if not lock.stock:  # in fp32, or the scheduler would round the latents to the model's dtype
        cond, uncond = cond.float(), None if uncond is None else uncond.float()
    if uncond is None or lock.stock_guidance or not task.guided(omega0):
        # In the order of diffusers, whose bits they then are.
        return task.combine(cond, uncond, omega0, latents, sigma), ones
    s_star = ones
    if lock.s_star:
        where = task.mask.latents[:, None] if lock.projection_region == "foreground" else None
        c, u = (x if where is None else torch.where(where, x, 0.0) for x in (cond, uncond))
        s_star = cfg_projection_reference(c, u)
    return guided_prediction_reference(cond, uncond, omega, s_star), s_star
