"""The locked denoising loop.

One screen, one line a formula: where the source is (source.py), how much to lock (controller.py), the forwards under
the lock (forwards.py), guidance (kernels/guidance.py), the ODE's step (solvers.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kvlock_fast.controller import Controller
from kvlock_fast.forwards import Forwards, Predictor, Task
from kvlock_fast.kernels.guidance import cfg_projection_reference, guided_prediction_reference
from kvlock_fast.solvers import FlowSolver
from kvlock_fast.source import SourcePath
from kvlock_fast.source_pass import StoredSource
from kvlock_fast.trace import Recorder


def denoise(
    task: Task,
    predict: Predictor,
    source: SourcePath,
    stored: StoredSource | None,
    solver: FlowSolver,
    recorder: Recorder,
    progress: Callable[[int], None],
) -> Tensor:
    """The edit's clean latents [B, C, T, H, W]; `progress(k)` is called after step k.

    source: where the source is at each step; stored: its keys and values, for the steps that they cover. The solver
    starts over.
    """
    solver.restart()
    forwards, lock = Forwards(task, predict), task.lock
    controller = Controller(lock, solver.num_steps, task.batch, task.mask.token_latents)
    latents = source.start.expand(task.batch, -1, -1, -1, -1)
    latents = _keep_background(task, latents, source.at(0))
    recorder.begin()
    for k in range(solver.num_steps):
        omega0 = task.guidance[predict.stage(k)]
        alpha, omega = controller.alpha(k), controller.omega(k, omega0, task.guided(omega0))
        if k < lock.zero_init_steps:  # CFG-Zero*: the first predictions are 0, and say nothing of x0
            prediction, s_star, variance = torch.zeros_like(latents), controller.ones, controller.no_variance
        else:
            needs = controller.can_lock(k), controller.source_window is not None
            v_source, v_cond, v_uncond = _velocities(k, latents, alpha, forwards, source, stored, *needs)
            prediction, s_star = _guide(task, v_cond, v_uncond, omega, omega0)
            clean = solver.predict_clean(k, prediction, latents)
            source_clean = None if v_source is None else solver.predict_clean(k, v_source, source.at(k))
            variance = controller.observe(clean, source_clean)
        latents = solver.step(k, prediction, latents)
        latents = _keep_background(task, latents, source.at(k + 1))
        recorder.step(variance, alpha, omega, s_star, latents)
        progress(k)
    return latents


def _velocities(
    k: int,
    latents: Tensor,
    alpha: Tensor,
    forwards: Forwards,
    source: SourcePath,
    stored: StoredSource | None,
    locks: bool,
    compares: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Of the source (None where nobody asks), conditional, unconditional (None without guidance)."""
    if not (locks or compares):
        return None, *forwards.unlocked(k, latents)
    if stored is None or not stored.covers(k, locks, compares):
        return forwards.run_along(k, latents, source.at(k), alpha)
    if not locks:
        return stored.predictions[k], *forwards.unlocked(k, latents)
    with stored.store.read(stored.slots[k]) as kept:
        return stored.predictions.get(k), *forwards.from_kept(k, latents, kept, alpha)


def _keep_background(task: Task, latents: Tensor, source_latent: Tensor) -> Tensor:
    """Under background_latents="source", the background of the source's path; else the latents as they are."""
    if task.lock.background_latents == "model":
        return latents
    return torch.where(task.mask.token_latents[:, None], latents, source_latent.to(latents.dtype))


def _guide(task: Task, cond: Tensor, uncond: Tensor | None, omega: Tensor, omega0: float) -> tuple[Tensor, Tensor]:
    """The guided prediction and s*: eps = s* eps_u + omega (eps_c - s* eps_u)."""
    lock, ones = task.lock, torch.ones_like(omega)
    if not lock.stock:  # in fp32, or the scheduler would round the latents to the model's dtype
        cond, uncond = cond.float(), None if uncond is None else uncond.float()
    if uncond is None:
        return cond, ones
    if lock.stock_guidance or not task.guided(omega0):  # in the order of diffusers, whose bits they then are
        return uncond + omega0 * (cond - uncond), ones
    s_star = ones
    if lock.s_star:
        where = task.mask.token_latents[:, None] if lock.s_star_region == "foreground" else None
        c, u = (x if where is None else torch.where(where, x, 0.0) for x in (cond, uncond))
        s_star = cfg_projection_reference(c, u)
    return guided_prediction_reference(cond, uncond, omega, s_star), s_star
