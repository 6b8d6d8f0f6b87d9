"""The step's epilogue in plain torch: the specification and the CPU implementation. See epilogue.py.

No host reads: the step's number stays on the device here too. The formulas at the end are every loop's: guidance, and
the schedule, of which a loop decides whose variance counts, and in which steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvlock_fast.kernels.epilogue_state import Schedule, StepState
from kvlock_fast.kernels.language import require_package_name

require_package_name(__name__)

EPS, LEAST_TAU = 1e-8, 1e-12  # in s*, and where a source that does not move at all would divide by zero


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


def _guide(
    state: StepState, cond: Tensor, uncond: Tensor | None, inside: Tensor, schedule: Schedule, k: Tensor
) -> tuple[Tensor, Tensor]:
    """The step's guided prediction, fp32, and s*."""
    ones, zero = torch.ones_like(state.omega), k < schedule.zero_init_steps
    if uncond is None:
        return torch.where(zero, 0.0, cond.float()), ones
    s_star = ones
    if schedule.s_star:
        region = inside if schedule.s_star_region == "foreground" else None
        calibrated = (state.omega0.index_select(0, k) > 1) & ~zero
        s_star = torch.where(calibrated, cfg_projection_reference(cond, uncond, inside=region), ones)
    return torch.where(zero, 0.0, guided_prediction_reference(cond, uncond, state.omega, s_star)), s_star


def _combine(weights: Tensor, values: Sequence[Tensor | None]) -> Tensor:
    """The weighted sum; a value of weight 0 does not count, whatever it holds."""
    terms = [torch.where(w == 0, 0.0, w * x) for w, x in zip(weights, values, strict=False) if x is not None]
    return sum(terms[1:], start=terms[0])


def _predictions(k: Tensor, schedule: Schedule) -> Tensor:
    """Number of predictions in the window's variance after step k."""
    return (k + 1 - schedule.zero_init_steps).clamp(max=schedule.variance_window)


def _variance(state: StepState, inside: Tensor, schedule: Schedule, k: Tensor) -> Tensor:
    """[B]; NaN while there are fewer than two predictions."""
    if schedule.detection == "global":
        inside = torch.ones_like(inside)
    entries, n = state.window.shape[0], _predictions(k, schedule)
    age = (k - torch.arange(entries, device=k.device)) % entries
    counts = (age < n).view(-1, 1, 1, 1, 1, 1) & inside
    elements = inside.expand(state.latents.shape).flatten(1).sum(1)
    if state.means is not None:  # reduction "mean"
        newest = torch.where(inside, state.window.index_select(0, k % entries)[0], 0.0)
        state.means.index_copy_(0, k, (newest.flatten(1).sum(1) / elements)[None])
        age = k - torch.arange(len(state.means), device=k.device)
        last = ((age >= 0) & (age < n))[:, None]
        deviations = state.means - torch.where(last, state.means, 0.0).sum(0) / n
        return torch.where(n >= 2, torch.where(last, deviations, 0.0).square().sum(0) / (n - 1), float("nan"))
    mean = torch.where(counts, state.window, 0.0).sum(0) / n
    squares = torch.where(counts, state.window - mean, 0.0).square().sum(0) / (n - 1)
    return torch.where(n >= 2, squares.flatten(1).sum(1) / elements, float("nan"))


def _reschedule(state: StepState, schedule: Schedule, k: Tensor, guided: bool) -> None:
    """Set alpha and omega for step k + 1; where alpha lags, that of step k + 2 is kept until then."""
    ratio = variance_ratio(state.variance, schedule.tau)
    decides = _predictions(k, schedule) >= schedule.min_predictions
    dynamic = (k + 1 >= schedule.first_dynamic_step) & decides
    if schedule.alpha is None:
        followed = (k + schedule.alpha_lag >= schedule.first_dynamic_step) & decides
        alpha = scheduled_alpha(ratio, schedule.alpha_floor, schedule.alpha_snap)
        alpha = torch.where(followed, alpha, schedule.warmup_alpha)
        if state.later_alpha is not None:
            alpha, later = state.later_alpha.clone(), alpha
            state.later_alpha.copy_(later)
        state.alpha.copy_(alpha)
    omega0 = state.omega0.index_select(0, (k + 1).clamp(max=len(state.omega0) - 1))
    follows = dynamic & (omega0 > 1) & (guided and schedule.dynamic_omega)
    scaled = scheduled_omega(ratio, omega0, schedule.b, schedule.omega_floor)
    state.omega.copy_(torch.where(follows, scaled, omega0))


def variance_ratio(variance: Tensor, tau: float | Tensor) -> Tensor:
    """var / tau of variance [B]; a tensor tau (the source's own variance, [1 or B]) counts as at least LEAST_TAU."""
    return variance / (tau.clamp_min(LEAST_TAU) if isinstance(tau, Tensor) else tau)


def scheduled_alpha(ratio: Tensor, floor: float, snap: float) -> Tensor:
    """alpha [B] of var / tau [B]; floor, snap: alpha_floor and alpha_snap."""
    alpha = ratio.clamp(floor, 1.0)
    return torch.where(alpha >= snap, 1.0, alpha)


def scheduled_omega(ratio: Tensor, omega0: float | Tensor, b: float, floor: float) -> Tensor:
    """omega [B] of var / tau [B] and the guidance scale asked for; floor: omega_floor."""
    return (omega0 * ratio.clamp(0.0, b)).clamp_min(floor)


def cfg_projection_reference(cond: Tensor, uncond: Tensor, eps: float = EPS, inside: Tensor | None = None) -> Tensor:
    """s* as [B] fp32 of cond, uncond [B, ...]; inside: the elements that count, bool, broadcast to these; None: all."""
    wide = torch.promote_types(cond.dtype, torch.float32)
    if inside is not None:
        cond, uncond = (torch.where(inside, x, 0.0) for x in (cond, uncond))
    c, u = cond.flatten(1).to(wide), uncond.flatten(1).to(wide)
    return ((c * u).sum(1) / (u.square().sum(1) + eps)).float()


def guided_prediction_reference(cond: Tensor, uncond: Tensor, omega: Tensor, s_star: Tensor) -> Tensor:
    """The guided prediction of cond, uncond [B, ...] by omega, s_star [B]; fp32 (fp64 stays fp64)."""
    wide = torch.promote_types(cond.dtype, torch.float32)
    per_sample = (-1,) + (1,) * (cond.ndim - 1)
    base = s_star.to(wide).reshape(per_sample) * uncond.to(wide)
    return base + omega.to(wide).reshape(per_sample) * (cond.to(wide) - base)
