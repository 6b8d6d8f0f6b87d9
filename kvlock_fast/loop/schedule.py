"""When to lock: the window of predicted clean latents, its variance, and what follows from it.

    var_k   = mean over the foreground of the unbiased variance of x0hat_{k-W+1} .. x0hat_k     (kernels/variance.py),
              or the variance of their means over the foreground
    alpha_k = clamp(var_{k-1} / tau, 0, 1)          omega_k = omega0 clamp(var_{k-1} / tau, 0, b)

in the last kappa steps; before them, and until min_predictions exist, alpha = warmup_alpha and omega = omega0.
Step k uses the variance up to step k - 1: alpha is needed during the forward that makes x0hat_k. Everything stays on
the device; the host knows the step's number only. Source: KV-Lock (arXiv 2603.09657).
"""

import math

import torch
from torch import Tensor

from kvlock_fast.config import LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.kernels.epilogue_reference import scheduled_alpha, scheduled_omega, variance_ratio
from kvlock_fast.kernels.variance import averaged, windowed_variance_reference


def fixed_alpha(lock: LockConfig) -> float | None:
    """alpha where it is a number, None where it follows the variance."""
    return None if isinstance(lock.alpha, str) else lock.alpha


def fixed_tau(lock: LockConfig) -> float:
    """tau where it is a number; where it follows the source, what stands in for it before the source is known."""
    return 1.0 if isinstance(lock.tau, str) else lock.tau


def window_size(lock: LockConfig, num_steps: int) -> int:
    """W, the predictions that the variance is taken over: no more than there are steps."""
    return max(2, min(lock.variance_window, num_steps))


def predictions_to_wait_for(lock: LockConfig, num_steps: int) -> int:
    """Number of predictions before the variance decides; a full window is enough."""
    return min(lock.min_predictions, window_size(lock, num_steps))


def first_dynamic_step(lock: LockConfig, num_steps: int) -> int:
    """The first of the last kappa steps, in which the variance decides."""
    return max(0, num_steps - lock.kappa)


def rounded_steps(share: float, num_steps: int) -> int:
    """Whole number of steps nearest to a share of them; a half rounds down, so that 0.1 of 4 steps is none."""
    return math.ceil(share * num_steps - 0.5 - 1e-9)


def skipped_steps(lock: LockConfig, num_steps: int) -> int:
    """Number of the steps asked for that are left out at the beginning. Raises InputError where none is left."""
    skip = rounded_steps(lock.skipped_share, num_steps)
    if skip >= num_steps:
        raise InputError(f"skip_share {lock.skipped_share} leaves none of {num_steps} steps")
    return skip


def zeroed_steps(lock: LockConfig, num_steps: int) -> int:
    """Number of steps, from the first on, that take a prediction of 0; num_steps: those that are taken."""
    return rounded_steps(lock.zero_init_share, num_steps)


def share_of_steps(share: float, num_steps: int) -> int:
    """How many steps a share of them is; a part of a step counts as one."""
    return math.ceil(share * num_steps - 1e-9)


def in_interval(interval: tuple[float, float] | None, num_steps: int, step: int) -> bool:
    """Whether a step is in an interval of shares of the steps; None: all are."""
    if interval is None:
        return True
    first, end = (share_of_steps(share, num_steps) for share in interval)
    return first <= step < end


def can_lock(lock: LockConfig, num_steps: int, step: int) -> bool:
    """Whether alpha can exceed 0 at this step; known before the run."""
    if not in_interval(lock.lock_interval, num_steps, step):
        return False
    alpha = fixed_alpha(lock)
    if alpha is not None:
        return alpha > 0
    return lock.warmup_alpha > 0 or step >= first_followed_step(lock, num_steps)


def first_followed_step(lock: LockConfig, num_steps: int, lag: int | None = None) -> int:
    """The first step that the variance may decide: it needs predictions, and knows of them after a lag (alpha's)."""
    known = zeroed_steps(lock, num_steps) + predictions_to_wait_for(lock, num_steps) - 1 + (lag or lock.alpha_lag)
    return max(first_dynamic_step(lock, num_steps), known)


def may_skip_guidance(lock: LockConfig) -> bool:
    """Whether a step of a guided run may turn out to have a guidance scale of exactly 1, and is then run without."""
    return lock.guidance_skip and lock.omega == "dynamic" and lock.omega_floor == 1


def compares_with_source(lock: LockConfig) -> bool:
    """Whether the source's own predictions are watched, at every step."""
    return lock.tau == "auto" and lock.follows_variance


def asks_source(lock: LockConfig) -> bool:
    """Whether the source's own predictions are needed at every step: compared with, or coupled to."""
    return compares_with_source(lock) or lock.coupled


class VarianceWindow:
    """The last W predictions of B samples and the variance over them."""

    def __init__(self, size: int, region: Tensor, reduction: str = "elements"):
        """region: bool [1, T, H, W], the elements that count; not empty."""
        self.size, self.reduction = size, reduction
        self.region = region
        self.count = 0
        self.ring: Tensor | None = None

    def push(self, x0hat: Tensor) -> Tensor | None:
        """Take in x0hat [B, C, T, H, W]; the variance [B] fp32, or None while fewer than two predictions exist."""
        if self.ring is None:
            self.ring = x0hat.new_zeros((self.size, *x0hat.shape), dtype=torch.float32)
        self.ring[self.count % self.size].copy_(x0hat)
        self.count += 1
        if self.count < 2:
            return None
        history, region = self.ring[: self.count], self.region
        if self.reduction == "mean":
            history, region = averaged(history, region)
        return windowed_variance_reference(history, region)


class Controller:
    """alpha and omega of every step, as tensors [B] fp32, for loops that are not advanced by the step epilogue."""

    def __init__(self, lock: LockConfig, num_steps: int, batch: int, region: Tensor):
        """region: bool [1, T, H, W], the foreground in latents (all True for global detection)."""
        self.lock, self.num_steps = lock, num_steps
        if lock.detection == "global":
            region = torch.ones_like(region)
        size, self.least = window_size(lock, num_steps), predictions_to_wait_for(lock, num_steps)
        self.window = VarianceWindow(size, region, lock.reduction)
        self.source_window = VarianceWindow(size, region, lock.reduction) if compares_with_source(lock) else None
        self.variance: Tensor | None = None
        self.ratios: list[Tensor | None] = []
        self.ones = torch.ones(batch, device=region.device)
        self.no_variance = self.ones * float("nan")

    def _ratio(self, step: int, lag: int) -> Tensor | None:
        """var / tau as it was `lag` steps before, where that decides."""
        if step < first_dynamic_step(self.lock, self.num_steps) or not 0 <= step - lag < len(self.ratios):
            return None
        return self.ratios[step - lag]

    def alpha(self, step: int) -> Tensor:
        """How much of the source's K and V the background takes at this step."""
        if not in_interval(self.lock.lock_interval, self.num_steps, step):
            return 0 * self.ones
        fixed, ratio = fixed_alpha(self.lock), self._ratio(step, self.lock.alpha_lag)
        if fixed is not None:
            return self.ones * fixed
        if ratio is None:
            return self.ones * self.lock.warmup_alpha
        return scheduled_alpha(ratio, self.lock.alpha_floor, self.lock.alpha_snap)

    def omega(self, step: int, omega0: float, guided: bool = True) -> Tensor:
        """The guidance scale at this step; omega0 untouched where guidance is off (`guided`)."""
        ratio = self._ratio(step, 1)
        if self.lock.omega == "constant" or not guided or ratio is None:
            return self.ones * omega0
        return scheduled_omega(ratio, omega0, self.lock.b, self.lock.omega_floor)

    def observe(self, x0hat: Tensor, source_x0hat: Tensor | None = None) -> Tensor:
        """Take in the step's predictions [B, C, T, H, W] (source: [1, ...]); the variance [B], NaN before it exists."""
        self.variance, tau = self.window.push(x0hat), fixed_tau(self.lock)
        if self.source_window is not None and source_x0hat is not None:
            tau = self.source_window.push(source_x0hat)
        if self.variance is None or tau is None or self.window.count < self.least or not self.lock.follows_variance:
            self.ratios.append(None)
            return self.no_variance if self.variance is None else self.variance
        self.ratios.append(variance_ratio(self.variance, tau))
        return self.variance

    def skip(self) -> None:
        """Leave a step out whose prediction does not count."""
        self.ratios.append(None)
