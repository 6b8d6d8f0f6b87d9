"""The locked denoising loop.

One screen: where the source is (source.py), the forwards under the lock (forwards.py), and all that follows them
(steppers.py): guidance, the ODE's step, and how much to lock in the next. Nothing in it waits for the device.
"""

from collections.abc import Callable

from torch import Tensor

from kvlock_fast.controller import can_lock, compares_with_source
from kvlock_fast.forwards import Forwards, Predictor, Task
from kvlock_fast.nvtx import span
from kvlock_fast.solvers import FlowSolver
from kvlock_fast.source import SourcePath
from kvlock_fast.source_pass import StoredSource
from kvlock_fast.steppers import new_stepper
from kvlock_fast.trace import Recorder


def denoise(
    task: Task,
    predict: Predictor,
    source: SourcePath,
    stored: StoredSource | None,
    solver: FlowSolver,
    recorder: Recorder,
    progress: Callable[[int], None],
) -> Tensor:
    """The edit's clean latents [B, C, T, H, W]; `progress(k)` is called after step k.

    source: where the source is at each step; stored: its keys and values, for the steps that they cover.
    """
    forwards, lock, steps = Forwards(task, predict), task.lock, solver.num_steps
    stepper = new_stepper(task, solver, source, [task.guidance[predict.stage(k)] for k in range(steps)])
    recorder.begin()
    for k in range(steps):
        with span("step", k):
            velocities = None, None, None  # of the source, conditional, unconditional
            if k >= lock.zero_init_steps:  # CFG-Zero*: before, predictions are 0, and say nothing of x0
                needs = can_lock(lock, steps, k), compares_with_source(lock)
                velocities = _velocities(k, stepper.latents, stepper.alpha, forwards, source, stored, *needs)
            with span("epilogue"):
                stepper.advance(k, velocities[0], source.at(k), *velocities[1:])
        recorder.mark()
        progress(k)
    recorder.end(stepper.trace())
    return stepper.latents


def _velocities(
    k: int,
    latents: Tensor,
    alpha: Tensor,
    forwards: Forwards,
    source: SourcePath,
    stored: StoredSource | None,
    locks: bool,
    compares: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Of the source (None where nobody asks), conditional, unconditional (None without guidance)."""
    if not (locks or compares):
        return None, *forwards.unlocked(k, latents)
    if stored is None or not stored.covers(k, locks, compares):
        return forwards.run_along(k, latents, source.at(k), alpha)
    if not locks:
        return stored.predictions[k], *forwards.unlocked(k, latents)
    with stored.store.read(stored.slots[k]) as kept:
        return stored.predictions.get(k), *forwards.from_kept(k, latents, kept, alpha)
