"""APG, adaptive projected guidance (arXiv 2410.02416): of the guidance, what only saturates is left out.

With D_c and D_u the clean latents predicted by both branches, d the sum of their differences with momentum beta, and
d's part along D_c ("parallel") apart from the rest ("orthogonal"):

    d <- D_c - D_u + beta d          d' = d min(1, r / |d|)
    D = D_c + (omega - 1) (orthogonal(d') + eta parallel(d'))

beta is `apg_momentum`, eta `apg_parallel`, r `apg_norm`: |d| is here the root mean square over the elements of a
sample, as a video has far more of them than the paper's images (15 over SDXL's 4 x 128 x 128 latents is 0.06). With
beta = 0, eta = 1 and r large it is classifier-free guidance. Steps are the scheduler's.
"""

import torch
from torch import Tensor

from kvlock_fast.loop.solver import CLEAN, Solver, clean_and_noise
from kvlock_fast.methods.job import Job
from kvlock_fast.models.base import PipelineModel
from kvlock_fast.nvtx import span


def why_not(model: PipelineModel, solver: Solver) -> str | None:
    """See the package."""
    return None


def edit(job: Job) -> Tensor:
    """See the package."""
    solver, lock = job.solver, job.lock
    guide = ProjectedGuidance(lock.apg_momentum, lock.apg_parallel, lock.apg_norm)
    x, rows = job.start(), []
    solver.restart()
    job.recorder.begin()
    for k in range(solver.num_steps):
        with span("step", k):
            x = job.kept(k + 1, solver.step(k, _prediction(job, k, x, guide), x))
        job.record(k, x, rows)
    job.recorder.end(torch.stack(rows))
    return x


class ProjectedGuidance:
    """The rule of the module's docstring, with the sum of differences that it carries from step to step."""

    def __init__(self, momentum: float, parallel: float, norm: float):
        self.momentum, self.parallel, self.norm = momentum, parallel, norm
        self.total: Tensor | None = None

    def __call__(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Compute the term added to cond. Both are clean latents [B, C, T, h, w] fp32; scale is omega."""
        difference = cond - uncond
        self.total = difference if self.total is None else difference + self.momentum * self.total
        size = self.total.square().mean((1, 2, 3, 4), keepdim=True).sqrt()
        limited = self.total * (self.norm / size).clamp(max=1)
        # In fp64, as two long sums are divided.
        onto, length = ((y * cond).sum((1, 2, 3, 4), keepdim=True, dtype=torch.float64) for y in (limited, cond))
        along = (onto / length.clamp_min(1e-24)).float() * cond
        return (scale - 1) * (limited - (1 - self.parallel) * along)


def _prediction(job: Job, k: int, x: Tensor, guide: ProjectedGuidance) -> Tensor:
    """The guided prediction [B, ...] of step k at x."""
    task, solver, scale = job.task, job.solver, job.scale(k)
    # The family's own output for its scheduler; each branch alone, as guidance is not the family's.
    cond, uncond = (
        None if text is None else task.combine(job.predict(k, x, text).float(), None, 1.0, x, solver.sigmas[k])
        for text in (task.prompt, task.negative)
    )
    assert cond is not None
    if uncond is None or scale <= 1:
        return cond
    added = guide(solver.predict_clean(k, cond, x), solver.predict_clean(k, uncond, x), scale)
    of_prediction = clean_and_noise(solver.prediction, solver.signal[k], solver.sigmas[k])[CLEAN][1]
    return cond + added / of_prediction
