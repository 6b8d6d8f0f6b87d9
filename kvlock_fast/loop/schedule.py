"""When to lock: the window of predicted clean latents, its variance, and what follows from it.

    var_k   = mean over the foreground of the unbiased variance of x0hat_{k-W+1} .. x0hat_k     (kernels/variance.py)
    alpha_k = clamp(var_{k-1} / tau, 0, 1)          omega_k = omega0 clamp(var_{k-1} / tau, 0, b)

in the last kappa steps; before them, and until two predictions exist, alpha = warmup_alpha and omega = omega0.
Step k uses the variance up to step k - 1: alpha is needed during the forward that makes x0hat_k. Everything stays on
the device; the host knows the step's number only. Source: KV-Lock (arXiv 2603.09657).
"""

import math

import torch
from torch import Tensor

from kvlock_fast.config import LockConfig
from kvlock_fast.kernels.variance import windowed_variance_reference


def first_dynamic_step(lock: LockConfig, num_steps: int) -> int:
    """The first of the last kappa steps, in which the variance decides."""
    return max(0, num_steps - lock.kappa)


def share_of_steps(share: float, num_steps: int) -> int:
    """How many steps a share of them is; a part of a step counts as one."""
    return math.ceil(share * num_steps - 1e-9)


def locked_steps(lock: LockConfig, num_steps: int) -> int:
    """How many steps, from the first on, lock at all."""
    return share_of_steps(lock.lock_share, num_steps)


def can_lock(lock: LockConfig, num_steps: int, step: int) -> bool:
    """Whether alpha can exceed 0 at this step; known before the run (two predictions exist from step 2 on)."""
    if step >= locked_steps(lock, num_steps):
        return False
    if lock.alpha != "dynamic":
        return lock.alpha > 0
    return lock.warmup_alpha > 0 or step >= max(first_dynamic_step(lock, num_steps), 1 + lock.alpha_lag)


def compares_with_source(lock: LockConfig) -> bool:
    """Whether the source's own predictions are watched, at every step."""
    return lock.tau == "auto" and lock.follows_variance


class VarianceWindow:
    """The last W predictions of B samples and the variance over them."""

    def __init__(self, size: int, region: Tensor):
        """region: bool [1, T, H, W], the elements that count; not empty."""
        self.size = size
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
        return windowed_variance_reference(self.ring[: self.count], self.region)


class Controller:
    """alpha and omega of every step, as tensors [B] fp32."""

    def __init__(self, lock: LockConfig, num_steps: int, batch: int, region: Tensor):
        """region: bool [1, T, H, W], the foreground in latents (all True for global detection)."""
        self.lock = lock
        self.num_steps = num_steps
        if lock.detection == "global":
            region = torch.ones_like(region)
        size = max(2, min(lock.variance_window, num_steps))
        self.window = VarianceWindow(size, region)
        self.source_window = VarianceWindow(size, region) if compares_with_source(lock) else None
        self.variance: Tensor | None = None
        self.ratios: list[Tensor | None] = []
        self.ones = torch.ones(batch, device=region.device)
        self.no_variance = self.ones * float("nan")

    def is_dynamic(self, step: int) -> bool:
        """Whether the variance decides at this step."""
        return self._ratio(step, 1) is not None

    def _ratio(self, step: int, lag: int) -> Tensor | None:
        """var / tau as it was `lag` steps before, where that decides."""
        if step < first_dynamic_step(self.lock, self.num_steps) or not 0 <= step - lag < len(self.ratios):
            return None
        return self.ratios[step - lag]

    def alpha(self, step: int) -> Tensor:
        """How much of the source's K and V the background takes at this step."""
        if self.lock.alpha != "dynamic":
            return self.ones * self.lock.alpha
        ratio = self._ratio(step, self.lock.alpha_lag)
        if ratio is None:
            return self.ones * self.lock.warmup_alpha
        alpha = ratio.clamp(self.lock.alpha_floor, 1.0)
        return torch.where(alpha >= self.lock.alpha_snap, 1.0, alpha)

    def omega(self, step: int, omega0: float, guided: bool = True) -> Tensor:
        """The guidance scale at this step; omega0 untouched where guidance is off (`guided`)."""
        if self.lock.omega == "constant" or not guided or not self.is_dynamic(step):
            return self.ones * omega0
        return (omega0 * self._ratio(step, 1).clamp(0.0, self.lock.b)).clamp_min(self.lock.omega_floor)

    def observe(self, x0hat: Tensor, source_x0hat: Tensor | None = None) -> Tensor:
        """Take in the step's predictions [B, C, T, H, W] (source: [1, ...]); the variance [B], NaN before it exists."""
        self.variance = self.window.push(x0hat)
        tau = self.lock.tau
        if self.source_window is not None:
            tau = self.source_window.push(source_x0hat)
        if self.variance is None or not self.lock.follows_variance:
            self.ratios.append(None)
            return self.no_variance if self.variance is None else self.variance
        # A source that does not move at all would divide by zero.
        self.ratios.append(self.variance / (tau if self.source_window is None else tau.clamp_min(1e-12)))
        return self.variance

    def skip(self) -> None:
        """A step whose prediction does not count."""
        self.ratios.append(None)
