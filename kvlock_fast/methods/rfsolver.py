"""RF-Solver-Edit (arXiv 2411.04746): second-order steps both ways, and the source's values at the edit's beginning.

A step is a Taylor step of second order whose derivative is taken over half of it, which is the midpoint rule:

    x_mid = x + (sigma' - sigma) / 2 v(x, sigma)          x <- x + (sigma' - sigma) v(x_mid, (sigma + sigma') / 2)

The inversion is `inversion_solver` "midpoint", the same upwards. In the first `inject_share` of the steps the values V
of self-attention in the later half of the layers are the source's, at both of a step's forwards.

Adapted: theirs keeps the V that the inversion leaves on its way up; here the source rides along in the batch at its own
latents of the step and their midpoint, so that nothing is kept.
"""

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.locking.foreground import swapped
from kvlock_fast.loop.schedule import rounded_steps
from kvlock_fast.loop.solver import Solver
from kvlock_fast.methods import attention_loop, flowedit
from kvlock_fast.methods.attention_loop import Processor, attend
from kvlock_fast.methods.job import Job
from kvlock_fast.models.base import PipelineModel
from kvlock_fast.nvtx import span


def why_not(model: PipelineModel, solver: Solver) -> str | None:
    """See the package."""
    return flowedit.why_not(model, solver) or attention_loop.why_not(model, solver)


def edit(job: Job) -> Tensor:
    """See the package."""
    solver, x, rows = job.solver, job.start(), []
    last = rounded_steps(job.lock.inject_share, solver.num_steps)
    job.recorder.begin()
    for k in range(solver.num_steps):
        half = (solver.sigmas[k + 1] - solver.sigmas[k]) / 2
        with span("step", k):
            source = job.path.at(k)
            slopes = _slopes(job, k, torch.cat([source, x]), inject=k < last)
            middle = torch.cat([source, x]) + half * slopes
            slopes = _slopes(job, k, middle, inject=k < last, time=job.predict.midway(k))
            x = job.kept(k + 1, solver.drop(k, x, slopes[1:]))
        job.record(k, x, rows)
    job.recorder.end(torch.stack(rows))
    return x


def _slopes(job: Job, k: int, latents: Tensor, inject: bool, time: Tensor | None = None) -> Tensor:
    """Velocities towards noise of the source and the edits [1 + B, ...]; time: None for that of step k."""
    task, model = job.task, job.predict.model
    branches = [task.prompt] if task.negative is None else [task.negative, task.prompt]
    layers = [a for transformer in model.transformers for _, a in model.arch.attentions(transformer)]
    later = layers[len(layers) // 2 :] if inject else []
    with swapped(later, [Processor(with_values_of_source)] * len(later)):
        rows = torch.cat([latents[:1], *[latents[1:]] * len(branches)])
        said = job.predict(k, rows, Conditioning.cat([task.source_prompt, *branches]), timestep=time).float()
    source, *uncond, cond = said.split([1, *[task.batch] * len(branches)])
    guided = task.combine(cond, uncond[0] if uncond else None, job.scale(k), latents[1:], job.solver.sigmas[k])
    return job.solver.slope(k, torch.cat([source, guided]), latents)


def with_values_of_source(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """Attend each row, by its own queries and keys, to the source's values."""
    return attend(q, k, v[:1])
