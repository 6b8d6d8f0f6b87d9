"""Solvers as tables: every deterministic scheduler step is linear in the sample and the outputs so far.

Entry k of a table [steps, 3, 3 + J] weighs (x, v, corrected, m_1, ..., m_J), m_j the predicted clean latent of step
k - j, for three results: the predicted clean latent, the next sample, the next corrected one (kernels/step_state.py).
Flow Euler and DDIM have closed forms; a multistep scheduler is asked: given unit vectors in place of tensors, its own
step returns the weights.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.errors import InputError
from kvlock_fast.schedulers import EDM, EXPLODING, ddim_levels, prediction_of

X, V, CORRECTED, PAST = 0, 1, 2, 3
CLEAN, NEXT, KEPT = 0, 1, 2


def solver_table(scheduler: Any) -> Tensor:
    """The table of a diffusers scheduler whose timesteps are set and no step taken: fp32, on the CPU.

    Raises InputError for a scheduler without a table: an unknown one, one that is not linear, one on its way.
    """
    name = type(scheduler).__name__
    if name not in TABLES:
        raise InputError(f"scheduler {name} has no table: one of {', '.join(TABLES)}")
    if getattr(scheduler, "_step_index", None) is not None:
        raise InputError(f"scheduler {name} has taken a step already: set its timesteps again")
    for setting, allowed in LINEAR.items():
        value = allowed[0] if (name, setting) in IGNORED else scheduler.config.get(setting, allowed[0])
        if value not in allowed:
            raise InputError(f"scheduler {name} with {setting}={value!r} has no table: not linear in predicted latents")
    table = TABLES[name](scheduler)
    if not table.isfinite().all():
        raise InputError(f"scheduler {name} has no table: its steps are not finite in fp64")
    return table.float()


def _flow_euler(scheduler: Any) -> Tensor:
    """x0hat = x - sigma v, or x + (1 - sigma) v where time is reversed;  x' = x + (sigma' - sigma) v."""
    if prediction_of(scheduler) == EXPLODING:
        return _exploding_euler(scheduler)
    sigma, after = (s.double().cpu() for s in (scheduler.sigmas[:-1], scheduler.sigmas[1:]))
    ones = torch.ones_like(sigma)
    to_clean = 1 - sigma if scheduler.config.get("invert_sigmas") else -sigma
    return _one_step(clean=(ones, to_clean), next=(ones, after - sigma))


def _exploding_euler(scheduler: Any) -> Tensor:
    """x0hat is the prediction;  x' = x + (sigma' - sigma) (x - x0hat) / sigma."""
    sigma, after = (s.double().cpu() for s in (scheduler.sigmas[:-1], scheduler.sigmas[1:]))
    kept = after / sigma
    return _one_step(clean=(torch.zeros_like(sigma), torch.ones_like(sigma)), next=(kept, 1 - kept))


def _ddim(scheduler: Any) -> Tensor:
    """x' = sqrt(a') x0hat + sqrt(1 - a') eps, with x0hat and eps as the prediction type has them (DDIM, eq. 12)."""
    kept, after = ddim_levels(scheduler)
    clean, eps = clean_and_noise(scheduler.config.prediction_type, kept.sqrt(), (1 - kept).sqrt())
    both = (after.sqrt() * c + (1 - after).sqrt() * e for c, e in zip(clean, eps, strict=True))
    return _one_step(clean, next=tuple(both))


Weights = tuple[Tensor, Tensor]


def clean_and_noise(prediction: str, signal: Tensor, noise: Tensor) -> tuple[Weights, Weights]:
    """What sample and prediction weigh in x0hat, and in the noise, where x = signal x0 + noise n.

    prediction: what the model predicts (schedulers.py).
    """
    zeros, ones = torch.zeros_like(signal), torch.ones_like(signal)
    return {
        "flow_prediction": lambda: ((ones, -noise), (ones, signal)),
        "reversed_flow": lambda: ((ones, noise), (ones, -signal)),
        "epsilon": lambda: ((1 / signal, -noise / signal), (zeros, ones)),
        "v_prediction": lambda: ((signal, -noise), (noise, signal)),
        "sample": lambda: ((zeros, ones), (1 / noise, -signal / noise)),
        EXPLODING: lambda: ((zeros, ones), (1 / noise, -signal / noise)),
    }[prediction]()


def _one_step(clean: tuple[Tensor, Tensor], next: tuple[Tensor, Tensor]) -> Tensor:
    """A table of weights of x and v alone."""
    table = torch.zeros(len(clean[0]), 3, PAST, dtype=torch.float64)
    for row, weights in ((CLEAN, clean), (NEXT, next)):
        table[:, row, X], table[:, row, V] = weights
    return table


def _multistep(scheduler: Any) -> Tensor:
    """UniPC and DPM-Solver++, by their own steps on unit vectors, in fp64 as far as they let us."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.sigmas = scheduler.sigmas.double()
    scheduler.set_begin_index(0)
    order = scheduler.config.solver_order
    # [1, 1, n]: the schedulers' sums over stages want a batch and a channel.
    unit = torch.eye(PAST + order, dtype=torch.float64)[:, None, None]
    corrects = hasattr(scheduler, "last_sample")
    rows = []
    for k, timestep in enumerate(scheduler.timesteps):
        scheduler.model_outputs = [unit[PAST + j] for j in reversed(range(order))]
        if corrects and k > 0:
            scheduler.last_sample = unit[CORRECTED]
        after = scheduler.step(unit[V], timestep, unit[X], return_dict=False)[0]
        kept = scheduler.last_sample if corrects else torch.zeros_like(after)
        rows.append(torch.stack([scheduler.model_outputs[-1], after, kept]).view(3, -1).double())
    table = torch.stack(rows)
    if not table[:, NEXT, CORRECTED].any():
        table[:, KEPT] = 0
    used = table[:, :, PAST:].any(dim=0).any(dim=0).nonzero()
    return table[:, :, : PAST + (int(used[-1]) + 1 if len(used) else 0)].contiguous()


# What a setting may be, where a scheduler has it; the first stands for those that do not.
LINEAR = {
    "stochastic_sampling": (False, None),
    "algorithm_type": ("dpmsolver++",),
    "predict_x0": (True,),
    "thresholding": (False,),
    "clip_sample": (False,),
    "solver_p": (None,),
}
# Settings that diffusers has for a scheduler, and does not follow.
IGNORED = {("CogVideoXDDIMScheduler", "clip_sample")}

TABLES: dict[str, Callable[[Any], Tensor]] = {
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    EDM: _exploding_euler,
    "DDIMScheduler": _ddim,
    "CogVideoXDDIMScheduler": _ddim,
    "UniPCMultistepScheduler": _multistep,
    "DPMSolverMultistepScheduler": _multistep,
}
