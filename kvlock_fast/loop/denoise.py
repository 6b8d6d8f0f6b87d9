"""The locked denoising loop.

One screen: where the source is (source.py), the forwards under the lock (forwards.py), of one stretch of the clip
or of several that are blended (windows.py), and all that follows them (epilogue.py): guidance, the ODE's step, and how
much to lock in the next. Nothing in it waits for the device, but for alpha where it decides what is computed
(foreground.py).
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from kvlock_fast.config import LockConfig
from kvlock_fast.loop.epilogue import DeviceStepper, Stepper, new_stepper, stepper_kind
from kvlock_fast.loop.foreground import Saturation
from kvlock_fast.loop.forwards import StepForwards, Velocities
from kvlock_fast.loop.graph import CapturedLoops, StepGraphs, launch_facts
from kvlock_fast.loop.predictor import Predictor, Task
from kvlock_fast.loop.schedule import can_lock, compares_with_source
from kvlock_fast.loop.solver import Solver
from kvlock_fast.loop.source import SourcePath, StoredSource
from kvlock_fast.loop.trace import Recorder
from kvlock_fast.loop.windows import Stretch, blend
from kvlock_fast.nvtx import span


@dataclass(frozen=True)
class Part:
    """A stretch of the clip, the source's path in it, and its keys and values for the steps that they cover.

    background: indices [N] of the tokens that are kept of the source.
    """

    stretch: Stretch
    path: SourcePath
    stored: StoredSource | None
    background: Tensor


def denoise(
    task: Task,
    predict: Predictor,
    source: SourcePath,
    parts: Sequence[Part],
    solver: Solver,
    recorder: Recorder,
    progress: Callable[[int], None],
    loops: CapturedLoops | None = None,
) -> Tensor:
    """The edit's clean latents [B, C, T, H, W]; `progress(k)` is called after step k.

    source: where the source is at each step; parts: what goes through the model at once, together the whole clip;
    loops: those that are captured, None to run every step as it is.
    """
    steps = solver.num_steps
    stepper = new_stepper(task, solver, source, [task.guidance[predict.stage(k)] for k in range(steps)])
    run = _Steps(task, predict, parts, stepper)
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
    """The work of a step: the forwards of each part, what they say together, and what follows."""

    def __init__(self, task: Task, predict: Predictor, parts: Sequence[Part], stepper: Stepper):
        self.task, self.predict, self.stepper = task, predict, stepper
        self.timestep = predict.model.time_at(predict.solver, 0).clone()
        self.stretches = [part.stretch for part in parts]
        self.forwards = [
            StepForwards(replace(task, mask=part.stretch.mask), predict, part.path, part.stored, part.background,
                         self.timestep)
            for part in parts
        ]  # fmt: skip
        self.saturation: Saturation | None = None
        if task.lock.compute == "foreground":
            self.saturation = Saturation(task.lock, predict.solver.num_steps, task.batch, self.timestep.device)

    def hold(self, loops: CapturedLoops) -> StepGraphs:
        """Have all that a captured step reads and writes where it stays: in the memory of an earlier run like this."""
        (forwards,), predict, task = self.forwards, self.predict, self.task
        stored = forwards.stored
        slots = [] if stored is None else stored.store.fixed_slots()
        stages = tuple(predict.stage(k) for k in range(predict.solver.num_steps))
        facts = tuple(launch_facts(transformer) for transformer in predict.model.transformers)
        layout = None if stored is None else stored.store.layout
        paths = tuple(lock.fast is not None for lock in predict.locks)
        region = forwards.region and forwards.region.foreground
        constants = (task.lock, task.guidance, stages, facts, paths, layout, region)
        held = loops.take(constants, {**forwards.tensors(), **self.stepper.tensors()}, slots)
        if stored is not None and held.slots is not slots:
            stored.store.use_slots(held.slots)
        self.timestep = held.tensors["timestep"]
        forwards.use(held.tensors)
        self.stepper.use(held.tensors)
        return held.graphs

    @contextmanager
    def inputs(self, k: int) -> Iterator[Hashable]:
        """Step k's inputs, in place while the context is open; the kind of step it is, by which kernels it takes."""
        lock, steps = self.task.lock, self.predict.solver.num_steps
        self.timestep.copy_(self.predict.model.time_at(self.predict.solver, k))
        saturated: tuple[int, ...] = ()
        if self.saturation is not None and k >= lock.zero_init_steps and can_lock(lock, steps, k):
            saturated = self.saturation.samples(k)
        with ExitStack() as stack:
            yield tuple(stack.enter_context(forwards.inputs(k, saturated)) for forwards in self.forwards)

    def step(self, k: int) -> None:
        """The forwards, and what follows them."""
        velocities: Velocities = None, None, None
        if k >= self.task.lock.zero_init_steps:  # CFG-Zero*: before, predictions are 0, and say nothing of x0
            velocities = self._velocities(k)
        with span("epilogue"):
            self.stepper.advance(k, velocities[0], self.source_latent, *velocities[1:])

    @property
    def source_latent(self) -> Tensor:
        """Of the whole clip [1, C, T, h, w]."""
        if len(self.forwards) == 1:
            return self.forwards[0].source_latent
        return self._blended([forwards.source_latent for forwards in self.forwards])

    def tokens(self) -> list[int]:
        """Computed of each sample, in the step whose inputs are there."""
        return [sum(counts) for counts in zip(*(forwards.tokens() for forwards in self.forwards), strict=True)]

    def _velocities(self, k: int) -> Velocities:
        latents, alpha = self.stepper.latents, self.stepper.alpha
        if len(self.forwards) == 1:
            return self.forwards[0].velocities(k, latents, alpha)
        said = [
            forwards.velocities(k, stretch.of(latents), alpha)
            for stretch, forwards in zip(self.stretches, self.forwards, strict=True)
        ]
        whole = zip(*said, strict=True)
        return tuple(None if any(x is None for x in each) else self._blended(each) for each in whole)

    def _blended(self, parts: Sequence[Tensor]) -> Tensor:
        return blend(list(parts), self.stretches, self.task.mask.latents.shape[1])

    def publish(self, k: int) -> None:
        """After the step before: alpha of the step whose kind it decides is on its way to the host."""
        if self.saturation is not None:
            lag = self.task.lock.alpha_lag
            self.saturation.publish(k - 1 + lag, self.stepper.alpha if lag == 1 else self.stepper.later_alpha)


def why_not_captured(model: Any, lock: LockConfig, solver: Solver) -> str | None:
    """What in an edit a replay of its steps would miss; None if nothing."""
    if lock.method != "lock":
        return f"the method {lock.method!r} has a loop of its own"
    if stepper_kind(lock, solver) is not DeviceStepper:
        return "it takes the scheduler's own steps"
    if compares_with_source(lock):
        return "tau='auto' counts the source's predictions on the host"
    if model.why_not_captured is not None:
        return model.why_not_captured
    parts = (part for transformer in model.transformers for part in transformer.modules())
    if any(hasattr(part, "_hf_hook") or "forward" in vars(part) for part in parts):
        return "forwards of the model were replaced, as by offloading: its weights may move between steps"
    return None
