"""The locked denoising loop.

One screen: where the source is (source.py), the forwards under the lock (forwards.py), and all that follows them
(steppers.py): guidance, the ODE's step, and how much to lock in the next. Nothing in it waits for the device.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.cache.store import Packed
from kvlock_fast.config import LockConfig
from kvlock_fast.controller import can_lock, compares_with_source
from kvlock_fast.foreground import Saturation, edit_region
from kvlock_fast.forwards import Forwards, Predictor, Task
from kvlock_fast.graph import CapturedLoops, StepGraphs, launch_facts
from kvlock_fast.models.locking import KeptKV
from kvlock_fast.nvtx import span
from kvlock_fast.solvers import Solver
from kvlock_fast.source import SourcePath
from kvlock_fast.source_pass import StoredSource
from kvlock_fast.steppers import DeviceStepper, Stepper, new_stepper, stepper_kind
from kvlock_fast.trace import Recorder


def denoise(
    task: Task,
    predict: Predictor,
    source: SourcePath,
    stored: StoredSource | None,
    solver: Solver,
    recorder: Recorder,
    progress: Callable[[int], None],
    loops: CapturedLoops | None = None,
) -> Tensor:
    """The edit's clean latents [B, C, T, H, W]; `progress(k)` is called after step k.

    source: where the source is at each step; stored: its keys and values, for the steps that they cover; loops: those
    that are captured, None to run every step as it is.
    """
    steps = solver.num_steps
    stepper = new_stepper(task, solver, source, [task.guidance[predict.stage(k)] for k in range(steps)])
    run = _Steps(task, predict, source, stored, stepper)
    graphs = StepGraphs(None) if loops is None else run.hold(loops)
    recorder.begin()
    for k in range(steps):
        with span("step", k), run.inputs(k) as kind:
            before = recorder.forwards
            graphs.run(kind, partial(run.step, k))
            recorder.forwards = before + graphs.rows.setdefault(kind, recorder.forwards - before)
            recorder.computed(run.tokens())
        run.publish(k + 1)
        recorder.mark()
        progress(k)
    recorder.end(stepper.trace(), 0.0 if run.saturation is None else run.saturation.waited)
    return stepper.latents if loops is None else stepper.latents.clone()


class _Steps:
    """The work of a step, which finds all that changes from step to step at addresses that do not."""

    def __init__(
        self, task: Task, predict: Predictor, source: SourcePath, stored: StoredSource | None, stepper: Stepper
    ):
        self.task, self.predict, self.source, self.stored, self.stepper = task, predict, source, stored, stepper
        self.source_latent, self.timestep = source.at(0).clone(), predict.solver.timestep_at(0).clone()
        self.kept: Packed | None = None
        self.saturation: Saturation | None = None
        if task.lock.compute == "foreground":
            self.saturation = Saturation(task.lock, predict.solver.num_steps, task.batch, self.timestep.device)
            self.region = edit_region(task.mask, task.lock)
            outside = ~task.mask.tokens[0].index_select(0, predict.background)
            self.rows = None if outside.all() else outside.nonzero()[:, 0]
        self._forwards: dict[tuple[int, ...], Forwards] = {}

    def forwards(self, samples: tuple[int, ...]) -> Forwards:
        """Of some of the samples."""
        if samples not in self._forwards:
            self._forwards[samples] = Forwards(self.task.of(samples), self.predict, self.timestep)
        return self._forwards[samples]

    def hold(self, loops: CapturedLoops) -> StepGraphs:
        """Have all that a captured step reads and writes where it stays: in the memory of an earlier run like this."""
        task, predict, stepper = self.task, self.predict, self.stepper
        mask = task.mask
        tensors = {"prompt": task.prompt, "negative": task.negative, "source prompt": task.source_prompt,
                   "tokens": mask.tokens.clone(), "background": predict.background,
                   "source latent": self.source_latent, "timestep": self.timestep, **stepper.tensors()}  # fmt: skip
        if self.saturation is not None:
            tensors |= {"computed": self.region.computed, "rows": self.rows}
        stages = tuple(predict.stage(k) for k in range(predict.solver.num_steps))
        facts = tuple(launch_facts(transformer) for transformer in predict.model.transformers)
        slots = [] if self.stored is None else self.stored.store.fixed_slots()
        layout = None if self.stored is None else self.stored.store.layout
        held = loops.take(
            (task.lock, task.guidance, stages, facts, layout, self.saturation and self.region.foreground),
            {name: x for name, x in tensors.items() if x is not None},
            slots,
        )
        if self.stored is not None and held.slots is not slots:
            self.stored.store.use_slots(held.slots)
        own = held.tensors
        mask = replace(mask, tokens=own["tokens"])
        texts = {"prompt": own["prompt"], "negative": own.get("negative"), "source_prompt": own["source prompt"]}
        self.task = replace(task, mask=mask, **texts)
        self.source_latent, self.timestep = own["source latent"], own["timestep"]
        predict.use_background(own["background"])
        stepper.use(own)
        self._forwards = {}
        if self.saturation is not None:
            self.region, self.rows = replace(self.region, computed=own["computed"]), own.get("rows")
        return held.graphs

    @contextmanager
    def inputs(self, k: int) -> Iterator[Hashable]:
        """Step k's inputs, in place while the context is open; the kind of step it is, by which kernels it takes."""
        self.source_latent.copy_(self.source.at(k))
        self.timestep.copy_(self.predict.solver.timestep_at(k))
        at, self.saturated = self.predict.stage(k), ()
        if k < self.task.lock.zero_init_steps:
            yield "zero", at
        elif not (self._locks(k) or self._compares):
            yield "unlocked", at
        else:
            if self.saturation is not None and self._locks(k):
                self.saturated = self.saturation.samples(k)
            if self.stored is None or not self.stored.covers(k, self._locks(k), self._compares):
                yield "along", at, self.saturated
            elif not self._locks(k):
                yield "compared", at
            else:
                with self.stored.store.read(self.stored.slots[k]) as self.kept:
                    yield "kept", at, self.saturated, next(iter(self.kept.values())).codes.data_ptr()

    def step(self, k: int) -> None:
        """The forwards, and what follows them."""
        velocities = None, None, None  # of the source, conditional, unconditional
        if k >= self.task.lock.zero_init_steps:  # CFG-Zero*: before, predictions are 0, and say nothing of x0
            velocities = self._velocities(k)
        with span("epilogue"):
            self.stepper.advance(k, velocities[0], self.source_latent, *velocities[1:])

    def tokens(self) -> list[int]:
        """Computed of each sample, in the step whose inputs are there."""
        everything = self.task.mask.tokens.shape[1]
        return [len(self.region.computed) if i in self.saturated else everything for i in range(self.task.batch)]

    def _velocities(self, k: int) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Of the source (None where nobody asks), conditional, unconditional (None without guidance)."""
        locks, latents, alpha, stored = self._locks(k), self.stepper.latents, self.stepper.alpha, self.stored
        forwards = self.forwards(tuple(range(self.task.batch)))
        if not (locks or self._compares):
            return None, *forwards.unlocked(k, latents)
        if stored is None or not stored.covers(k, locks, self._compares):
            if not self.saturated:
                return forwards.run_along(k, latents, self.source_latent, alpha)
            source, kept = forwards.of_source(k, self.source_latent)
            return source, *self._partly(k, kept)
        if not locks:
            return stored.predictions[k], *forwards.unlocked(k, latents)
        if self.saturated:
            return stored.predictions.get(k), *self._partly(k, self.kept)
        return stored.predictions.get(k), *forwards.from_kept(k, latents, self.kept, alpha)

    def _partly(self, k: int, kept: KeptKV) -> tuple[Tensor, Tensor | None]:
        """Both branches, of the saturated samples' foreground alone and of the others whole."""
        latents, alpha, some = self.stepper.latents, self.stepper.alpha, self.saturated
        others = tuple(i for i in range(self.task.batch) if i not in some)
        if not others:
            return self.forwards(some).of_foreground(k, latents, kept, self.region, self.rows)
        # By slices, as an index made here would be a copy from the host.
        taken, rest = (torch.cat([latents[i : i + 1] for i in part]) for part in (some, others))
        alphas = torch.cat([alpha[i : i + 1] for i in others])
        sparse = self.forwards(some).of_foreground(k, taken, kept, self.region, self.rows)
        whole = self.forwards(others).from_kept(k, rest, kept, alphas)
        order = [some + others, range(self.task.batch)]
        at = {sample: place for place, sample in enumerate(order[0])}
        return tuple(
            None if a is None else torch.cat([torch.cat([a, b])[at[i] : at[i] + 1] for i in order[1]])
            for a, b in zip(sparse, whole, strict=True)
        )

    def publish(self, k: int) -> None:
        """After the step before: alpha of the step whose kind it decides is on its way to the host."""
        if self.saturation is not None:
            lag = self.task.lock.alpha_lag
            self.saturation.publish(k - 1 + lag, self.stepper.alpha if lag == 1 else self.stepper.later_alpha)

    def _locks(self, k: int) -> bool:
        return can_lock(self.task.lock, self.predict.solver.num_steps, k)

    @property
    def _compares(self) -> bool:
        return compares_with_source(self.task.lock)


def why_not_captured(model: Any, lock: LockConfig, solver: Solver) -> str | None:
    """What in an edit a replay of its steps would miss; None if nothing."""
    if stepper_kind(lock, solver) is not DeviceStepper:
        return "it takes the scheduler's own steps"
    if compares_with_source(lock):
        return "tau='auto' counts the source's predictions on the host"
    if any(hasattr(transformer, "_hf_hook") for transformer in model.transformers):
        return "the model is offloaded: its weights move between steps"
    return None
