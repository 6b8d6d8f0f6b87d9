"""The source's path: its latent at every step k, from noise (k = 0) to the clean source (k = T)."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvlock_fast.solvers import FlowSolver

Velocity = Callable[[Tensor, int], Tensor]


class SourcePath:
    """Where the source is at every step."""

    def __init__(self, path: Tensor, start: Tensor):
        """path: [T + 1, 1, C, T, H, W] fp32, down to the clean source; start: where the edit starts [1, C, T, H, W]."""
        self.path, self.start = path, start

    def at(self, k: int) -> Tensor:
        """[1, C, T, H, W] fp32."""
        return self.path[k]


def renoise(clean: Tensor, noise: Tensor, solver: FlowSolver) -> SourcePath:
    """x_k = (1 - sigma_k) x0 + sigma_k n with one noise n, the one the edit starts from (as the paper does).

    clean, noise: [1, C, T, H, W] fp32.
    """
    noisy = [solver.add_noise(k, clean, noise) for k in range(solver.num_steps)]
    return SourcePath(torch.stack([*noisy, clean]), noise)


def invert(clean: Tensor, solver: FlowSolver, velocity: Velocity, method: str = "euler") -> SourcePath:
    """The ODE integrated from the clean source up to noise; the edit starts at its end.

    velocity(x, k): the model's prediction [1, C, T, H, W] at sigma_k; method: "euler" or "heun".
    """
    path = [clean]
    for k in reversed(range(solver.num_steps)):
        path.append(_step_up(path[-1], k, solver, velocity, method))
    return SourcePath(torch.stack(path[::-1]), path[-1])


def _step_up(x: Tensor, k: int, solver: FlowSolver, velocity: Velocity, method: str) -> Tensor:
    """x at sigma_k from x at sigma_{k+1}."""
    rise = solver.sigmas[k] - solver.sigmas[k + 1]
    slope = velocity(x, k + 1).float()
    if method == "heun":
        slope = (slope + velocity(x + rise * slope, k).float()) / 2
    return x + rise * slope
