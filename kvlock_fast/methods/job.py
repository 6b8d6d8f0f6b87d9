"""What a method is given, and what it leaves in the trace."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlock_fast.config import LockConfig
from kvlock_fast.loop.epilogue import keep_background
from kvlock_fast.loop.forwards import Predictor
from kvlock_fast.loop.solver import Solver
from kvlock_fast.loop.source import SourcePath
from kvlock_fast.loop.task import Task
from kvlock_fast.loop.trace import Recorder


@dataclass(frozen=True)
class Job:
    """An edit to be made, its source encoded.

    path: where the source is at each step, and where an edit starts; noise: drawn already, [1, C, T, h, w]; draw: more
    of it; done(k): to be called after step k.
    """

    task: Task
    predict: Predictor
    path: SourcePath
    noise: Tensor
    draw: Callable[[], Tensor]
    recorder: Recorder
    done: Callable[[int], None]

    @property
    def lock(self) -> LockConfig:
        return self.task.lock

    @property
    def solver(self) -> Solver:
        return self.predict.solver

    def scale(self, k: int) -> float:
        """The edit's guidance scale at step k."""
        return self.task.guidance[self.predict.stage(k)]

    def start(self) -> Tensor:
        """The latents [B, C, T, h, w] before step 0."""
        return self.kept(0, self.path.start.expand(self.task.batch, -1, -1, -1, -1))

    def kept(self, k: int, latents: Tensor) -> Tensor:
        """The latents before step k, with the background of the source's path where the lock keeps it."""
        return keep_background(self.task, latents, self.path.at(k))

    def record(self, k: int, latents: Tensor, rows: list[Tensor]) -> None:
        """Step k has ended with these latents [B, ...]: mark it, and add what the trace says of it to `rows`."""
        batch = self.task.batch
        ones = torch.ones(batch, device=latents.device)
        bad = (~latents.isfinite()).flatten(1).any(1).float()
        rows.append(torch.stack([ones * float("nan"), 0 * ones, self.scale(k) * ones, ones, bad], dim=-1))
        self.recorder.runs[-1].mark([self.task.mask.tokens.shape[1]] * batch)
        self.done(k)
