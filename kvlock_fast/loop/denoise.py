"""The locked denoising loop. `take_step` is one step on one screen; reference.py is the same in plain torch.

`denoise` runs the steps: as they are, or captured in CUDA graphs and replayed (graph.py). Nothing in it waits for the
device, but for alpha where it decides what is computed (foreground.py).
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor

from kvlock_fast.loop.epilogue import DeviceStepper, Stepper, new_stepper
from kvlock_fast.loop.foreground import GuidanceSkips, Saturation
from kvlock_fast.loop.forwards import Forwards, Part, Predictor, Velocities
from kvlock_fast.loop.graph import CapturedLoops, hold
from kvlock_fast.loop.schedule import may_skip_guidance
from kvlock_fast.loop.source import SourcePath
from kvlock_fast.loop.task import Task
from kvlock_fast.loop.trace import Recorder
from kvlock_fast.loop.windows import blend
from kvlock_fast.nvtx import span


def take_step(k: int, forwards: Sequence[Forwards], stepper: Stepper) -> None:
    """Take the edit from x_k to x_{k+1}, locked to the source by alpha_k.

        K, V     of the background's tokens in every self-attention <- alpha_k K_src + (1 - alpha_k) K, V alike
        s*       = <c, u> / (|u|^2 + eps), the projection of the prompt's prediction c on the negative prompt's u
        v        = s* u + omega_k (c - s* u)
        x_{k+1}  = the solver's step from x_k along v, for a coupled edit plus what the same step along the source's
                   velocity misses the source's path by; outside the mask the source's, where the background is kept
                   (where omega_k is 1, c: the other branch is not run)
        var_k    = variance of the last W predicted clean latents, averaged over the foreground
        alpha_{k+1}, omega_{k+1} = clamp(var_k / tau, 0, 1), omega_0 clamp(var_k / tau, 0, b)

    forwards: of the whole clip, or of each of its overlapping stretches; their inputs of step k are in place.
    Source: KV-Lock (arXiv 2603.09657).
    """
    latents, alpha = stepper.latents, stepper.alpha  # x_k [B, C, T, h, w] fp32, alpha_k [B] fp32
    predictions: list[Velocities] = []
    for part in forwards:
        if part.way == "zero":  # CFG-Zero*: the first steps' predictions are taken as 0
            continue
        x, x_source = latents[:, :, part.stretch.frames], part.source_latent
        # The source's keys and values at x_source: an earlier pass kept them, a forward makes them now, or a row of the
        # batch below will.
        kv = part.source_kv(k, x_source)
        # The edit's branches at x, their background's keys and values blended with the source's by alpha.
        predictions.append(part.edit(k, x, alpha, kv))
    source, cond, uncond = blended(predictions, forwards)  # each [B or 1, C, T, h, w], or None

    # Guidance, the solver's step, the variance, the next alpha and omega: one operation on the device.
    with span("epilogue"):
        stepper.advance(k, source, cond, uncond)


def denoise(
    task: Task,
    predict: Predictor,
    source: SourcePath,
    parts: Sequence[Part],
    recorder: Recorder,
    progress: Callable[[int], None] | None = None,
    loops: CapturedLoops | None = None,
) -> Tensor:
    """Denoise B samples from the source path's start to clean latents.

    Args:
        task: what is asked for.
        predict: the model under the lock.
        source: where the source is at each step.
        parts: what goes through the model at once; together the whole clip.
        recorder: collects the trace.
        progress: called with k after step k.
        loops: the captured loops of this and earlier calls; None runs every step as it is.

    Returns:
        The edit's clean latents [B, C, T, h, w].
    """
    solver, lock = predict.solver, task.lock
    steps, timestep = solver.num_steps, predict.times[0].clone()
    stepper = new_stepper(task, solver, source, [task.scale(predict.stage(k), steps, k) for k in range(steps)])
    skips = None
    if task.negative is not None and may_skip_guidance(lock):
        skips = GuidanceSkips(lock, steps, task.batch, timestep.device)
    forwards = [Forwards(task, predict, part, timestep, skips is not None) for part in parts]
    saturation = Saturation(lock, steps, task.batch, timestep.device) if lock.compute == "foreground" else None
    graphs = None
    if loops is not None:
        assert isinstance(stepper, DeviceStepper) and len(forwards) == 1  # as why_not_captured and open_scene make sure
        graphs = hold(loops, task, predict, forwards[0], stepper)
        timestep = forwards[0].timestep  # the memory that captured steps read it from
    run = recorder.begin()
    for k in range(steps):
        timestep.copy_(predict.times[k])
        saturated = saturation.samples(k) if saturation is not None and forwards[0].locks[k] else ()
        unguided = skips is not None and forwards[0].guides[k] and skips.skipped(k)
        with span("step", k), _inputs(forwards, k, saturated, unguided) as kind:
            if graphs is None:
                take_step(k, forwards, stepper)
            else:
                before = recorder.forwards
                graphs.run(kind, partial(take_step, k, forwards, stepper))
                recorder.forwards = before + graphs.rows.setdefault(kind, recorder.forwards - before)
            tokens = [sum(counts) for counts in zip(*(part.token_counts for part in forwards), strict=True)]
        if saturation is not None:
            saturation.publish(k + lock.alpha_lag, stepper.alpha if lock.alpha_lag == 1 else stepper.later_alpha)
        run.mark(tokens)
        if skips is not None and k + 1 < steps:
            skips.publish(k + 1, stepper.omega)
        if progress is not None:
            progress(k)
    recorder.end(stepper.trace(), sum(x.waited for x in (saturation, skips) if x is not None))
    return stepper.latents if loops is None else stepper.latents.clone()


@contextmanager
def _inputs(forwards: Sequence[Forwards], k: int, saturated: tuple[int, ...], unguided: bool) -> Iterator[Hashable]:
    """Step k's inputs, in place while the context is open; yields the kind of step it is, by which kernels it takes."""
    with ExitStack() as stack:
        yield tuple(stack.enter_context(part.inputs(k, saturated, unguided)) for part in forwards)


def blended(predictions: Sequence[Velocities], forwards: Sequence[Forwards]) -> tuple[Tensor | None, ...]:
    """Mix the predictions of overlapping stretches into the whole clip's; None for what was not predicted."""
    if len(predictions) < 2:
        return predictions[0] if predictions else (None, None, None)
    stretches = [part.stretch for part in forwards]
    each = ([x for x in parts if x is not None] for parts in zip(*predictions, strict=True))
    return tuple(blend(parts, stretches) if len(parts) == len(predictions) else None for parts in each)
