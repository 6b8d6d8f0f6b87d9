"""The step's epilogue in plain torch: the specification and the CPU implementation. See epilogue.py.

No host reads: the step's number stays on the device here too.
"""

import torch
from torch import Tensor

from kvlock_fast.kernels.epilogue_state import Schedule, StepState
from kvlock_fast.kernels.guidance import cfg_projection_reference, guided_prediction_reference
from kvlock_fast.kernels.language import require_package_name

require_package_name(__name__)

EPS = 1e-8  # of s*
LEAST_TAU = 1e-12  # a source that does not move at all would divide by zero


def step_epilogue_reference(
    state: StepState,
    cond: Tensor,
    uncond: Tensor | None,
    foreground: Tensor,
    schedule: Schedule,
    source_path: Tensor | None = None,
) -> None:
    """Advance `state` by one step in plain torch. Arguments as `step_epilogue`."""
    k, entries = state.step.long(), state.window.shape[0]
    inside = foreground[:, None]
    prediction, s_star = _guide(state, cond, uncond, inside, schedule, k)
    past = [state.window.index_select(0, (k - j) % entries)[0] for j in range(1, state.history + 1)]
    rows = state.table.index_select(0, k)[0]
    given = [state.latents, prediction, state.corrected, *past]
    x0hat, latents = _combine(rows[0], given[:2]), _combine(rows[1], given)
    if state.corrected is not None:
        state.corrected.copy_(_combine(rows[2], given))
    if source_path is not None:
        latents = torch.where(inside, latents, source_path.index_select(0, k + 1)[0])
    state.window.index_copy_(0, k % entries, x0hat[None])
    state.latents.copy_(latents)
    state.s_star.copy_(s_star)
    state.variance.copy_(_variance(state, inside, schedule, k))
    bad = (~latents.isfinite()).flatten(1).any(1).float()
    used = torch.stack([state.variance, state.alpha, state.omega, s_star, bad], dim=-1)
    state.trace.index_copy_(0, k, used[None])
    _reschedule(state, schedule, k, uncond is not None)
    state.step.add_(1)


def _guide(state, cond, uncond, inside, schedule, k) -> tuple[Tensor, Tensor]:
    """The step's guided prediction, fp32, and s*."""
    ones, zero = torch.ones_like(state.omega), k < schedule.zero_init_steps
    if uncond is None:
        return torch.where(zero, 0.0, cond.float()), ones
    s_star = ones
    if schedule.s_star:
        c, u = cond.float(), uncond.float()
        if schedule.s_star_region == "foreground":
            c, u = (torch.where(inside, x, 0.0) for x in (c, u))
        calibrated = (state.omega0.index_select(0, k) > 1) & ~zero
        s_star = torch.where(calibrated, cfg_projection_reference(c, u, EPS), ones)
    return torch.where(zero, 0.0, guided_prediction_reference(cond, uncond, state.omega, s_star)), s_star


def _combine(weights: Tensor, values: list[Tensor | None]) -> Tensor:
    """The weighted sum; what has weight 0 does not count, whatever it holds."""
    pairs = [(w, x) for w, x in zip(weights, values, strict=False) if x is not None]
    return sum(torch.where(w == 0, 0.0, w * x) for w, x in pairs)


def _predictions(k: Tensor, schedule: Schedule) -> Tensor:
    """How many predictions the window's variance is taken over after step k."""
    return (k + 1 - schedule.zero_init_steps).clamp(max=schedule.variance_window)


def _variance(state: StepState, inside: Tensor, schedule: Schedule, k: Tensor) -> Tensor:
    """[B]; NaN while there are fewer than two predictions."""
    if schedule.detection == "global":
        inside = torch.ones_like(inside)
    entries, n = state.window.shape[0], _predictions(k, schedule)
    age = (k - torch.arange(entries, device=k.device)) % entries
    counts = (age < n).view(-1, 1, 1, 1, 1, 1) & inside
    mean = torch.where(counts, state.window, 0.0).sum(0) / n
    squares = torch.where(counts, state.window - mean, 0.0).square().sum(0) / (n - 1)
    elements = inside.expand(state.latents.shape).flatten(1).sum(1)
    return torch.where(n >= 2, squares.flatten(1).sum(1) / elements, float("nan"))


def _reschedule(state: StepState, schedule: Schedule, k: Tensor, guided: bool) -> None:
    """alpha and omega of step k + 1; where alpha lags, that of step k + 2 is kept until then."""
    tau = schedule.tau.clamp_min(LEAST_TAU) if isinstance(schedule.tau, Tensor) else schedule.tau
    ratio = state.variance / tau
    exists = _predictions(k, schedule) >= 2
    dynamic = (k + 1 >= schedule.first_dynamic_step) & exists
    if schedule.alpha is None:
        followed = (k + schedule.alpha_lag >= schedule.first_dynamic_step) & exists
        alpha = ratio.clamp(schedule.alpha_floor, 1.0)
        alpha = torch.where(followed, torch.where(alpha >= schedule.alpha_snap, 1.0, alpha), schedule.warmup_alpha)
        if state.later_alpha is not None:
            alpha, later = state.later_alpha.clone(), alpha
            state.later_alpha.copy_(later)
        state.alpha.copy_(alpha)
    omega0 = state.omega0.index_select(0, (k + 1).clamp(max=len(state.omega0) - 1))
    follows = dynamic & (omega0 > 1) & (guided and schedule.dynamic_omega)
    scaled = (omega0 * ratio.clamp(0.0, schedule.b)).clamp_min(schedule.omega_floor)
    state.omega.copy_(torch.where(follows, scaled, omega0))
