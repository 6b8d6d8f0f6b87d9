"""KV-Lock (arXiv 2603.09657) in plain torch: the specification that every other way of running a step is tested with.

Lockstep only: the source is row 0 of every batch. No kernel, no cache, no graph, no stretches; two hooks a layer.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.loop.schedule import fixed_alpha, fixed_tau
from kvlock_fast.loop.solver import Solver
from kvlock_fast.loop.task import Task
from kvlock_fast.models.base import PipelineModel


@torch.no_grad()
def denoise_reference(task: Task, model: PipelineModel, path: Tensor, start: Tensor, solver: Solver) -> Tensor:
    """Denoise B samples, locked to the source.

    Args:
        task: prompts, mask and lock; the lock's tau a number, its alpha_lag 1, no halo.
        model: one whose self-attentions hold the video's tokens alone.
        path: where the source is at each step, [T + 1, 1, C, t, h, w] fp32.
        start: where the edit starts, [1, C, t, h, w] fp32.
        solver: the scheduler's steps.

    Returns:
        The clean latents [B, C, t, h, w] fp32.
    """
    lock, steps, batch = task.lock, solver.num_steps, task.batch
    inside = task.mask.latents[:, None]  # [1, 1, t, h, w], the foreground
    seen = inside if lock.detection == "foreground" else torch.ones_like(inside)
    branches = [x for x in (task.negative, task.prompt) if x is not None]
    texts = Conditioning.cat([task.source_prompt, *branches])
    x = torch.where(inside, start, path[0]) if lock.keeps_background else start
    x = path[0] if lock.coupled else x
    x, predictions = x.expand(batch, -1, -1, -1, -1), []
    fixed, ratio = fixed_alpha(lock), torch.ones(batch)
    least = min(lock.min_predictions, max(2, min(lock.variance_window, steps)))
    solver.restart()
    alongside = copy.deepcopy(solver)
    for k in range(steps):
        stage = model.stage_at(float(solver.timesteps[k]), solver.num_train_timesteps)
        omega0 = task.guidance[stage] if task.negative is None or within(lock.guidance_interval, k / steps) else 1.0
        dynamic = len(predictions) >= least and k >= steps - lock.kappa
        alpha = torch.full((batch,), lock.warmup_alpha if fixed is None else fixed)
        if fixed is None and dynamic:
            alpha = ratio.clamp(lock.alpha_floor, 1)
            alpha = torch.where(alpha >= lock.alpha_snap, 1.0, alpha)
        omega = torch.full((batch,), omega0)
        if lock.omega == "dynamic" and dynamic and task.guided(omega0):
            omega = (omega0 * ratio.clamp(0, lock.b)).clamp_min(lock.omega_floor)
        if k < math.ceil(lock.zero_init_share * steps - 0.5):
            v, v_source = torch.zeros_like(x), torch.zeros_like(path[k])
        else:
            rows = torch.cat([path[k], *[x] * len(branches)])
            weight = torch.where(task.mask.tokens, lock.foreground_mix * alpha[:, None], alpha[:, None])  # [B, S]
            with locked(model, weight * within(lock.lock_interval, k / steps)):
                said = model.predict(model.transformer_of(stage), rows, model.time_at(solver, k), texts).float()
            v_source, v = said[:1], guide(task, said[1:], omega, omega0, inside)
            predictions.append(solver.predict_clean(k, v, x))
        x = solver.step(k, v, x)
        if lock.coupled:  # the difference to the source is what is stepped
            x = x + path[k + 1] - alongside.step(k, v_source, path[k])
        x = torch.where(inside, x, path[k + 1]) if lock.keeps_background else x
        if len(predictions) > 1:
            last = torch.stack(predictions[-lock.variance_window :])[..., seen[0, 0]]  # [n, B, C, foreground]
            last = last.mean((2, 3), keepdim=True) if lock.reduction == "mean" else last
            ratio = last.var(0).mean((1, 2)) / fixed_tau(lock)  # unbiased
    return x


def within(interval: tuple[float, float] | None, share: float) -> bool:
    """Whether an interval of shares of the steps holds this one; None holds all."""
    return interval is None or interval[0] - 1e-9 <= share < interval[1] - 1e-9


def guide(task: Task, v: Tensor, omega: Tensor, omega0: float, inside: Tensor) -> Tensor:
    """Guide the prediction [B, ...] of both branches' [2B, ...]: s* u + omega (c - s* u), s* = <c, u> / |u|^2."""
    if task.negative is None:
        return v
    uncond, cond = v.chunk(2)
    c, u = (y * (inside if task.lock.projection_region == "foreground" else 1) for y in (cond, uncond))
    s_star = (c * u).sum((1, 2, 3, 4), keepdim=True) / ((u * u).sum((1, 2, 3, 4), keepdim=True) + 1e-8)
    projected = s_star * uncond if task.lock.s_star and task.guided(omega0) else uncond
    return projected + omega.view(-1, 1, 1, 1, 1) * (cond - projected)


@contextmanager
def locked(model: PipelineModel, weight: Tensor) -> Iterator[None]:
    """Blend every row's keys and values with row 0's by weight [B, S] while the context is open, by hooks."""

    def blend(module: torch.nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        w = weight.repeat((len(out) - 1) // len(weight), 1).view(len(out) - 1, -1, *[1] * (out.ndim - 2))
        return torch.cat([out[:1], torch.lerp(out[1:], out[:1], w.to(out.dtype))])

    handles = []
    for transformer in model.transformers:
        for _, attention in model.arch.attentions(transformer):
            for names in (model.arch.key, model.arch.value):
                target = next(getattr(attention, name) for name in names if hasattr(attention, name))
                handles.append(target.register_forward_hook(blend))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
