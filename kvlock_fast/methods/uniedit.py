"""Uni-Edit of UniEdit-Flow (arXiv 2504.13109): both prompts' velocities at one x, fused by where they differ.

From the source's inversion at the step where the edit begins (`skip_share` 0.4 is their alpha of 0.6), with
d = v(prompt) - v(source prompt) at the same x, and m the mean of |d| over channels, scaled to 0 .. 1 in each sample:

    x <- x + (sigma' - sigma) (m v(prompt) + (1 - m) v(source prompt) + omega (1 + m) d)

omega is `edit_strength` and stands in place of a guidance scale: no unconditional branch is run. The inversion is
`inversion_solver` "uni-inv", which is theirs too. Steps are Euler's, at the scheduler's sigmas. The method has no mask,
but background_latents "source" goes with it. m follows their code for FLUX; their schedulers for diffusers scale the
mean of d itself.
"""

import torch
from torch import Tensor

from kvlock_fast.loop.solver import Solver
from kvlock_fast.methods.flowedit import why_not as why_not
from kvlock_fast.methods.job import Job
from kvlock_fast.nvtx import span


def edit(job: Job) -> Tensor:
    """See the package."""
    task, solver, x, rows = job.task, job.solver, job.start(), []
    source_prompt = task.source_prompt.expand(task.batch)
    job.recorder.begin()
    for k in range(solver.num_steps):
        with span("step", k):
            of_source, edited = (_slope(solver, k, job.predict(k, x, text), x) for text in (source_prompt, task.prompt))
            x = job.kept(k + 1, solver.drop(k, x, fused_velocity(edited, of_source, job.lock.edit_strength)))
        job.record(k, x, rows)
    job.recorder.end(torch.stack(rows))
    return x


def fused_velocity(edited: Tensor, source: Tensor, strength: float) -> Tensor:
    """The velocity of the module's docstring, from those of both prompts [B, C, T, h, w] fp32."""
    difference = edited - source
    mean = difference.abs().mean(1, keepdim=True)
    least, most = mean.amin((1, 2, 3, 4), keepdim=True), mean.amax((1, 2, 3, 4), keepdim=True)
    region = (mean - least) / (most - least).clamp_min(1e-7)
    return source + region * difference + strength * (1 + region) * difference


def _slope(solver: Solver, k: int, prediction: Tensor, x: Tensor) -> Tensor:
    return solver.slope(k, prediction.float(), x)
