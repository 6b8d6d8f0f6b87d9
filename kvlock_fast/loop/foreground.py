"""Foreground-only computation: which tokens a step computes, and in which steps a sample can do with them.

With alpha = 1 in every layer, the background's keys and values are the source's: what a foreground token sees does not
depend on the background's hidden states, so these need not be computed. That holds while alpha is 1, step by step and
sample by sample: in the warm-up it is known beforehand; after it, alpha is read from the device, a few bytes a step.
So is omega, where a step whose guidance scale is 1 leaves out its unconditional branch.
"""

import time

import torch
from torch import Tensor

from kvlock_fast.config import LockConfig
from kvlock_fast.loop.schedule import first_followed_step, in_interval, zeroed_steps
from kvlock_fast.masks import ProjectedMask, Region


def edit_region(mask: ProjectedMask, lock: LockConfig) -> Region:
    """The region of one mask [1, ...]; reads it on the host."""
    distance = mask.distance(lock.halo)
    rings = [(distance[0] == ring).nonzero()[:, 0] for ring in range(lock.halo + 1)]
    return Region(torch.cat(rings), len(rings[0]))


def seam_weights(mask: ProjectedMask, lock: LockConfig) -> Tensor | None:
    """How much of the model's latents is taken, the rest being the source's: fp32 [B, 1, T, h, w].

    None without a halo: then it is all of the foreground's and nothing else.
    """
    if not lock.halo:
        return None
    falling = (1 - mask.distance(lock.halo).float() / (lock.halo + 1)).clamp_min(0)
    return mask.on_latents(falling if lock.seam == "blend" else (falling > 0).float())[:, None]


def mix_seam(latents: Tensor, source: Tensor, weights: Tensor) -> Tensor:
    """Latents [B, C, T, h, w] by weight, the source's for the rest; at a weight of 0 or 1 bit for bit one of them."""
    mixed = torch.where(weights == 1, latents, source + weights * (latents - source))
    return torch.where(weights == 0, source, mixed)


def known_beforehand(lock: LockConfig, num_steps: int, k: int) -> bool | None:
    """Whether alpha of step k is 1; None where only the run can tell."""
    if not in_interval(lock.lock_interval, num_steps, k):
        return False
    if lock.alpha != "dynamic":
        return lock.alpha == 1
    if k < first_followed_step(lock, num_steps):
        return lock.warmup_alpha == 1
    return None


def sparse_steps(lock: LockConfig, num_steps: int) -> tuple[int, int] | None:
    """How many steps compute the foreground alone: at least and at most; None where all are computed in full."""
    if lock.compute == "full":
        return None
    known = [known_beforehand(lock, num_steps, k) for k in range(zeroed_steps(lock, num_steps), num_steps)]
    return known.count(True), len(known) - known.count(False)


class Arrival:
    """A value [B] of each step on its way to the host: a few bytes, and nothing else is waited for.

    waited: seconds that the host has waited.
    """

    def __init__(self, batch: int, device: torch.device, lag: int = 1):
        """lag: how many steps ahead of its use a value is published."""
        self.waited = 0.0
        cuda = device.type == "cuda"
        self._values = [torch.zeros(batch, dtype=torch.float32, pin_memory=cuda) for _ in range(lag)]
        self._arrived = [torch.cuda.Event() for _ in range(lag)] if cuda else None

    def publish(self, k: int, value: Tensor) -> None:
        """Send the value of step k on its way."""
        slot = k % len(self._values)
        self._values[slot].copy_(value, non_blocking=True)
        if self._arrived is not None:
            self._arrived[slot].record(torch.cuda.current_stream(value.device))

    def ones(self, k: int) -> tuple[int, ...]:
        """The samples whose value is 1 at step k."""
        slot, start = k % len(self._values), time.perf_counter()
        if self._arrived is not None:
            self._arrived[slot].synchronize()
        self.waited += time.perf_counter() - start
        return tuple(i for i, value in enumerate(self._values[slot].numpy()) if value == 1)


class Saturation(Arrival):
    """Which samples have alpha = 1 at a step."""

    def __init__(self, lock: LockConfig, num_steps: int, batch: int, device: torch.device):
        super().__init__(batch, device, lock.alpha_lag)
        self.lock, self.num_steps, self.everyone = lock, num_steps, tuple(range(batch))

    def samples(self, k: int) -> tuple[int, ...]:
        """Those whose alpha is 1 at step k."""
        known = known_beforehand(self.lock, self.num_steps, k)
        if known is not None:
            return self.everyone if known else ()
        return self.ones(k)

    def publish(self, k: int, value: Tensor) -> None:
        """Send alpha [B] of step k on its way."""
        if self.lock.alpha == "dynamic":
            super().publish(k, value)


class GuidanceSkips(Arrival):
    """The steps whose guidance scale omega turns out to be 1: s* u + 1 (c - s* u) = c, whatever the branch u says."""

    def __init__(self, lock: LockConfig, num_steps: int, batch: int, device: torch.device):
        super().__init__(batch, device)
        self.first, self.batch = first_followed_step(lock, num_steps, lag=1), batch

    def skipped(self, k: int) -> bool:
        """Whether no sample of step k needs the unconditional branch."""
        return k >= self.first and len(self.ones(k)) == self.batch
