"""From a call's arguments to a scene: the clip fitted to the model, the steps, the source encoded or from a cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kvlock_fast.cache.saved_source import SavedSource
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.errors import InputError, warn
from kvlock_fast.locking.arch import select_layers
from kvlock_fast.loop.graph import CapturedLoops, why_not_captured
from kvlock_fast.loop.inputs import fit_to_model
from kvlock_fast.loop.parallel import CAPTURED, check_tokens, check_transformers
from kvlock_fast.loop.schedule import skipped_steps
from kvlock_fast.loop.solver import Solver
from kvlock_fast.loop.trace import Recorder
from kvlock_fast.loop.windows import Windows, asked_for
from kvlock_fast.masks import ProjectedMask
from kvlock_fast.methods import refuse_method
from kvlock_fast.models.base import ForegroundModel, PipelineModel
from kvlock_fast.models.schedulers import check_scheduler
from kvlock_fast.scene import Progress, Scene


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A call's arguments, as far as its source depends on them. Each is as `KVLockPipeline.__call__` has it."""

    video: np.ndarray | Tensor | Sequence
    mask: np.ndarray | Tensor
    source_prompt: str
    num_inference_steps: int
    guidance_scale: float
    generator: torch.Generator | None
    latents: Tensor | None
    height: int | None
    width: int | None
    frames_policy: str
    lock: LockConfig
    cache: CacheConfig
    processors: str
    clip_frames: int | None = None
    clip_overlap: int | None = None


@contextmanager
def open_scene(
    model: PipelineModel,
    wanted: Wanted,
    recorder: Recorder,
    progress: Progress,
    loops_of: Callable[[str | None], CapturedLoops | None] = lambda why_not: None,
) -> Iterator[Scene]:
    """Encode the source, or take it from the cache that the call names, whose files are open meanwhile.

    Args:
        model: the family's model.
        wanted: the call's arguments.
        recorder: counts the seconds.
        progress: hears of the stages.
        loops_of: where steps are captured, given why they cannot be (None if they can); None: they run as they are.

    Raises:
        InputError: where the arguments do not go together, or not with the model.
    """
    lock, cache, geometry = wanted.lock, wanted.cache, model.geometry
    shard = check_transformers(model, lock, cache, (wanted.latents, wanted.generator))
    lock = _fit_foreground(model, lock)
    windows = _windows(model, wanted)
    saved = None if cache.path is None else SavedSource.open(cache.path)
    try:
        height, width = wanted.height, wanted.width
        if saved is not None and height is None and width is None:
            height, width = saved.size
        at_once = None if windows is None else windows.frames
        frames, pixels, count = fit_to_model(
            wanted.video, wanted.mask, geometry, height, width, wanted.frames_policy, at_once, not model.told_of_frames
        )
        windows = _if_longer(windows, len(frames), cache)
        solver = _solver(model, wanted, len(frames) if windows is None else windows.frames, frames.shape[1:3])
        refuse_method(
            lock, model, solver, cache, "clip_frames" if windows else "context parallelism" if shard else None
        )
        if solver.table is None and not lock.stock:
            name = type(model.pipe.scheduler).__name__
            warn(f"scheduler {name} has no table of its steps: it is called itself, which is slower")
        several = "the clip goes through the model in stretches" if windows else CAPTURED if shard else None
        loops = loops_of(several or why_not_captured(model, lock, solver))
        with staged(recorder, progress, "encode"):
            mask = _project(model, pixels)
            check_tokens(shard, mask, windows, geometry)
            clean = None if saved is not None else model.encode_video(frames)
        if lock.compute == "foreground" and mask.tokens.all():
            warn("mask covers every token: compute 'foreground' has nothing to leave out, computing in full")
            # A halo goes with the source's latents only, which compute 'foreground' kept until here.
            lock = replace(lock, compute="full", background_latents="source", background_bias=0.0)
        scene = Scene(
            model, lock, solver, frames, count, mask, wanted.source_prompt, saved, windows, loops, pixels=pixels,
            guidance_scale=wanted.guidance_scale, processors=wanted.processors, shared=shard is not None,
        )  # fmt: skip
        scene.place(clean, wanted.latents, wanted.generator)
        yield scene
    except torch.OutOfMemoryError as error:  # outside of the ladder
        raise InputError("there is too little memory on the device: use a smaller size or fewer frames") from error
    finally:
        if saved is not None:
            saved.entry.close()
        model.pipe.maybe_free_model_hooks()


@contextmanager
def staged(recorder: Recorder, progress: Progress, name: str) -> Iterator[None]:
    """Count a stage's seconds, and tell of its start and end."""
    progress(name, 0, 1)
    with recorder.stage(name):
        yield
    if name not in ("denoise", "source pass"):  # which report their steps
        progress(name, 1, 1)


def _fit_foreground(model: PipelineModel, lock: LockConfig) -> LockConfig:
    """The lock, which computes every token where the family cannot compute the foreground's alone.

    Nothing that the foreground sees depends on the background's hidden states, so the edit is the same.
    """
    if lock.compute != "foreground":
        return lock
    for transformer in model.transformers:
        count = len(model.arch.attentions(transformer))
        if len(select_layers(count, lock.layers)) < count:
            left_out = f"layers {list(lock.layers or ())} leaves out some of {count}"
            raise InputError(f"compute 'foreground' needs every layer locked: {left_out}")
    if isinstance(model, ForegroundModel):
        return lock
    left = f", without background_bias {lock.background_bias}" if lock.background_bias else ""
    warn(f"the family {model.arch.family} cannot compute the foreground alone: every token is computed{left}")
    region = lock.projection_region
    return replace(lock, compute="full", background_latents="source", s_star_region=region, background_bias=0.0)


def _windows(model: PipelineModel, wanted: Wanted) -> Windows | None:
    """How a long clip is cut. Raises InputError where it cannot be."""
    windows = asked_for(wanted.clip_frames, wanted.clip_overlap)
    if windows is not None:
        if model.told_of_frames:
            raise InputError(f"clip_frames does not go with the family {model.arch.family}, which sees the whole clip")
        windows.latent_sizes(model.geometry)
    return windows


def _if_longer(windows: Windows | None, frames: int, cache: CacheConfig) -> Windows | None:
    """The windows of a clip that is longer than one; InputError where stretches cannot have this cache."""
    if windows is None or frames <= windows.frames:
        return None
    if cache.path is not None or cache.tier == "disk":
        where = f"the cache {str(cache.path)!r}" if cache.path is not None else "the cache tier disk"
        raise InputError(f"clip_frames does not go with {where}: stretches are kept in memory or run along only")
    return windows


def _solver(model: PipelineModel, wanted: Wanted, at_once: int, size: Sequence[int]) -> Solver:
    """The scheduler's steps for so many frames at once; size: height and width."""
    scheduler, steps, (height, width) = model.pipe.scheduler, wanted.num_inference_steps, size
    check_scheduler(scheduler, model.arch.flow, model.shifts_by_size)
    settings = model.timesteps_settings(steps, at_once, height, width)
    return Solver(scheduler, steps, model.device, settings, skipped_steps(wanted.lock, steps))


def _project(model: PipelineModel, pixels: Tensor) -> ProjectedMask:
    projected = model.project(model.may_change(pixels).to(model.device))
    if not projected.tokens.any():
        raise InputError("mask is empty: no pixel is marked as foreground")
    if projected.tokens.all():
        warn("mask covers every token: nothing is locked, the whole video is edited")
    return projected
