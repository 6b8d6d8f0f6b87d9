"""The source's path: its latent at every step k, from noise (k = 0) to the clean source (k = T)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvlock_fast.cache.store import KVStore
from kvlock_fast.errors import InputError
from kvlock_fast.loop.solver import Solver
from kvlock_fast.models.schedulers import EXPLODING, FLOW, REVERSED_FLOW

Prediction = Callable[[Tensor, float], Tensor]


class SourcePath:
    """Where the source is at every step."""

    def __init__(self, path: Tensor, start: Tensor, noise: Tensor | None = None):
        """path: [T + 1, 1, C, T, H, W] fp32, down to the clean source; start: where the edit starts [1, C, T, H, W];
        noise: what the path was made of, of variance 1, where it was not inverted.
        """
        self.path, self.start, self.noise = path, start, noise

    def at(self, k: int) -> Tensor:
        """[1, C, T, H, W] fp32."""
        return self.path[k]


def renoise(clean: Tensor, noise: Tensor, solver: Solver) -> SourcePath:
    """Noise the source for every step: x_k = a_k x0 + b_k n, with one noise n (as the paper does) or several in turn.

    clean: [1, C, T, H, W] fp32; noise: [N, C, T, H, W] fp32, of which step k takes number k mod N, and the edit starts
    from the first. Where first steps are left out, it starts from x_0 instead.
    """
    noisy = [solver.add_noise(k, clean, noise[k % len(noise)][None]) for k in range(solver.num_steps)]
    start = noisy[0] if solver.skip else solver.start(noise[:1])
    return SourcePath(torch.stack([*noisy, clean]), start, noise)


def invert(clean: Tensor, solver: Solver, predict: Prediction, method: str = "euler") -> SourcePath:
    """The ODE integrated from the clean source up to noise; the edit starts at its end.

    predict(x, k): the model's prediction [1, C, T, H, W] at x_k; k + 0.5 is halfway to x_{k+1}.
    method: "euler" (DDIM inversion, where the scheduler is one of a diffusion), "heun", "midpoint" or "uni-inv".

    "midpoint" is RF-Solver's step (arXiv 2411.04746): its Taylor step v + h/2 (v_mid - v) / (h/2) is v_mid. "uni-inv"
    (arXiv 2504.13109) predicts x_k by the velocity of the step before, and steps from x_{k+1} by the velocity there.

    Raises InputError where the model predicts the clean latent: at its own, it says nothing of the noise.
    """
    if solver.prediction in ("sample", EXPLODING):
        kind = solver.prediction
        raise InputError(
            f"source_path 'invert' cannot start from a scheduler of prediction type {kind!r}: use 'renoise'"
        )
    if method == "midpoint" and solver.prediction not in (FLOW, REVERSED_FLOW):
        raise InputError(
            f"inversion_solver 'midpoint' follows a flow, and the scheduler's prediction type is {solver.prediction!r}"
        )
    path, steps = [clean], solver.num_steps
    slope = solver.slope(steps, predict(clean, steps), clean) if method == "uni-inv" else None
    for k in reversed(range(steps)):
        if slope is None:
            path.append(_step_up(path[-1], k, solver, predict, method))
        else:
            up = solver.rise(k, path[-1], slope)
            slope = solver.slope(k, predict(up, k), up)
            path.append(solver.rise(k, path[-1], slope))
    return SourcePath(torch.stack(path[::-1]), path[-1])


def _step_up(x: Tensor, k: int, solver: Solver, predict: Prediction, method: str) -> Tensor:
    """x_k from x_{k+1}."""
    slope = solver.slope(k + 1, predict(x, k + 1), x)
    if method == "heun":
        up = solver.rise(k, x, slope)
        slope = (slope + solver.slope(k, predict(up, k), up)) / 2
    elif method == "midpoint":
        half = x + (solver.sigmas[k] - solver.sigmas[k + 1]) / 2 * slope
        slope = solver.slope(k, predict(half, k + 0.5), half)
    return solver.rise(k, x, slope)


def shift_latents(start: Tensor, fresh: Tensor, foreground: Tensor, ratio: float) -> Tensor:
    """Latents [1, C, T, H, W] moved on the foreground by `ratio` towards the mean and deviation of fresh noise there.

    Channel by channel, x' = (1 - ratio) x + ratio (s_n (x - m_x) / s_x + m_n), m and s over the foreground's elements:
    the adaptive instance normalisation of ProEdit's latents-shift (arXiv 2512.22118). foreground: bool [1, T, H, W].
    """
    chosen = foreground[0]
    x, noise = start[0][:, chosen].double(), fresh[0][:, chosen].double()
    (spread, mean), (fresh_spread, fresh_mean) = (
        torch.std_mean(part, dim=1, keepdim=True, correction=0) for part in (x, noise)
    )
    moved = fresh_spread * (x - mean) / spread.clamp_min(1e-8) + fresh_mean
    shifted = start.clone()
    shifted[0][:, chosen] = ((1 - ratio) * x + ratio * moved).to(start.dtype)
    return shifted


@dataclass(frozen=True)
class StoredSource:
    """What a pass of the source has left.

    slots: for each step whose K and V are there, the stored step that stands for it (itself, or a neighbour by the
    step stride). background: indices [N] of the tokens that are stored. predictions: the source's predictions
    [1, C, T, H, W], where they were kept.
    """

    store: KVStore
    slots: dict[int, int]
    background: Tensor
    predictions: dict[int, Tensor] = field(default_factory=dict)

    def covers(self, k: int, locks: bool, compares: bool) -> bool:
        """Whether step k needs no forward of the source: if it locks, and if it compares with its predictions."""
        return (k in self.slots or not locks) and (k in self.predictions or not compares)
