"""FlowEdit (arXiv 2412.08629): from source to edit along the difference of two velocities, with no inversion.

In the time of noise sigma, with fresh noise n at each step, x_src clean and z beginning at x_src,

    z_src = (1 - sigma) x_src + sigma n        z_tgt = z + z_src - x_src
    z <- z + (sigma' - sigma) (v(z_tgt | prompt) - v(z_src | source prompt))

averaged over `noise_samples` noises (n_avg); both are guided, by scales of their own. `skip_share` leaves out the first
steps (n_max counts from the end); in the last `free_share` of all steps (n_min) z_tgt is sampled by the prompt alone.
With equal prompts and scales every difference is 0 and z stays the source, bit for bit.

The paper has no mask and edits images; frames of a video are one sample here. With background_latents "source" the mask
counts: outside of it z is x_src in every step. Steps are Euler's, whatever the scheduler, at the scheduler's sigmas.
"""

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.loop.schedule import rounded_steps
from kvlock_fast.loop.solver import Solver
from kvlock_fast.methods.job import Job
from kvlock_fast.models.base import PipelineModel
from kvlock_fast.models.schedulers import FLOW, REVERSED_FLOW
from kvlock_fast.nvtx import span


def why_not(model: PipelineModel, solver: Solver) -> str | None:
    """See the package."""
    if solver.prediction in (FLOW, REVERSED_FLOW):
        return None
    return f"it follows a flow's velocity, and the scheduler's prediction type is {solver.prediction!r}"


def edit(job: Job) -> Tensor:
    """See the package."""
    solver, clean = job.solver, job.path.at(job.solver.num_steps)
    z, sampled, rows = clean.expand(job.task.batch, -1, -1, -1, -1), None, []
    # Shares are of the steps asked for, as n_min and n_max of the paper are.
    free = rounded_steps(job.lock.free_share, solver.num_steps + solver.skip)
    job.recorder.begin()
    for k in range(solver.num_steps):
        with span("step", k):
            if k < solver.num_steps - free:
                z = _kept(job, solver.drop(k, z, _difference(job, k, z, clean)), clean)
            else:
                if sampled is None:
                    noise = job.noise if k == 0 else job.draw()
                    sampled = solver.add_noise(k, clean, noise) + (z - clean)
                slope = solver.slope(k, _edited(job, k, sampled), sampled)
                after = solver.add_noise(k + 1, clean, noise)
                sampled = z = _kept(job, solver.drop(k, sampled, slope), after)
        job.record(k, z, rows)
    job.recorder.end(torch.stack(rows))
    return z


def _difference(job: Job, k: int, z: Tensor, clean: Tensor) -> Tensor:
    """v(z_tgt) - v(z_src) at step k, [B, C, T, h, w], towards noise, averaged over the noises."""
    solver, total = job.solver, torch.zeros_like(z)
    for i in range(job.lock.noise_samples):
        noise = job.noise if k == i == 0 else job.draw()
        source = solver.add_noise(k, clean, noise)
        # In this order the two are equal to the last bit where z is the source.
        target = source + (z - clean)
        edited = solver.slope(k, _edited(job, k, target), target)
        total = total + (edited - solver.slope(k, _of_source(job, k, source), source))
    return total / job.lock.noise_samples


def _edited(job: Job, k: int, latents: Tensor) -> Tensor:
    """The guided prediction of the edit's prompts [B, ...]."""
    task = job.task
    return _guided(job, k, latents, task.prompt, task.negative, job.scale(k))


def _of_source(job: Job, k: int, latents: Tensor) -> Tensor:
    """The guided prediction of the source's prompt [1, ...]."""
    task, own = job.task, job.lock.source_guidance
    scale = job.scale(k) if own is None else job.predict.model.omega0(own)
    return _guided(job, k, latents, task.source_prompt, task.source_negative, scale)


def _guided(
    job: Job, k: int, latents: Tensor, text: Conditioning, negative: Conditioning | None, scale: float
) -> Tensor:
    # A forward a branch for both: in one batch with others, a row's last bits would depend on these.
    cond = job.predict(k, latents, text).float()
    uncond = None if negative is None else job.predict(k, latents, negative).float()
    return job.task.combine(cond, uncond, scale, latents, job.solver.sigmas[k])


def _kept(job: Job, latents: Tensor, source: Tensor) -> Tensor:
    """With the source's background, where the lock keeps it."""
    if not job.lock.keeps_background:
        return latents
    return torch.where(job.task.mask.latents[:, None], latents, source)
