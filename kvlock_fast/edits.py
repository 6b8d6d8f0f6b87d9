"""A source ready to be edited, and its edits: prompts in batches, the source's K and V from where they are kept."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.cache.root import CacheRoot
from kvlock_fast.conditioning import Conditioning
from kvlock_fast.config import CacheConfig
from kvlock_fast.errors import OutputError, warn
from kvlock_fast.files import user_cache_folder
from kvlock_fast.loop.denoise import denoise
from kvlock_fast.loop.forwards import Part, Predictor
from kvlock_fast.loop.schedule import asks_source, can_lock, zeroed_steps
from kvlock_fast.loop.source import SourcePath, StoredSource
from kvlock_fast.loop.stored_source import Source, SourceMaker, read_saved
from kvlock_fast.loop.task import Task
from kvlock_fast.loop.trace import Recorder
from kvlock_fast.loop.windows import Stretch
from kvlock_fast.methods import load_method
from kvlock_fast.methods.job import Job
from kvlock_fast.scene import Progress, Scene


def edit_prompts(task: Task, scene: Scene, cache: CacheConfig, recorder: Recorder, progress: Progress) -> Tensor:
    """The edits' clean latents [B, C, T, h, w], of as many prompts at once as the cache's config allows.

    cache: with its tier decided ("auto" is lockstep).
    """
    recorder.start_over()
    with scene.predictor(recorder) as predict:
        path = scene.path(predict, task.source_prompt, task.source_negative, recorder)
        if scene.lock.method != "lock":
            return _edit_by_method(task, scene, predict, path, cache, recorder, progress)
        parts: list[Part] = []
        try:
            for stretch in scene.stretches():
                source = _source_of(stretch, scene, path, task.source_prompt)
                stored = _stored_source(source, scene, predict, cache, recorder, progress)
                parts.append(Part(stretch, source.path, stored, source.background))
            recorder.cache = _facts(cache.tier, [part.stored for part in parts if part.stored is not None])
            _warn_of_source_runs(scene, parts[0].stored)
            done = _StepCounter(progress, task, cache, scene.solver.num_steps)
            edits = [denoise(some, predict, path, parts, recorder, done, scene.loops) for some in _batches(task, cache)]
        finally:
            for part in parts:
                if part.stored is not None:
                    part.stored.store.close()
    return torch.cat(edits)


def _edit_by_method(
    task: Task,
    scene: Scene,
    predict: Predictor,
    path: SourcePath,
    cache: CacheConfig,
    recorder: Recorder,
    progress: Progress,
) -> Tensor:
    """The edits by the loop of another method, which keeps nothing of the source."""
    recorder.cache = _facts("lockstep", [])
    done = _StepCounter(progress, task, cache, scene.solver.num_steps)
    edit = load_method(scene.lock.method).edit
    job = partial(Job, predict=predict, path=path, noise=scene.placed[1], draw=scene.draw, recorder=recorder, done=done)
    return torch.cat([edit(job(task=some)) for some in _batches(task, cache)])


def _source_of(stretch: Stretch, scene: Scene, path: SourcePath, prompt: Conditioning) -> Source:
    """The source in a stretch."""
    if scene.windows is None:
        return Source(path, prompt, scene.background())
    part = SourcePath(stretch.of(path.path), stretch.of(path.start))
    return Source(part, prompt, scene.kept_of(stretch.mask))


def _stored_source(
    source: Source, scene: Scene, predict: Predictor, cache: CacheConfig, recorder: Recorder, progress: Progress
) -> StoredSource | None:
    """The source's K and V by the config's tier; None where it is run along."""
    tier = cache.tier
    if scene.saved is not None:
        return read_saved(scene.saved, tier, source.background.device)
    if tier in ("auto", "lockstep") or not scene.lock.locks:
        return None
    maker = SourceMaker(source, predict, cache, partial(progress, "source pass"))
    with recorder.stage("source pass"):
        if tier != "disk":
            return maker.in_memory(tier)
        root = Path(cache.root) if cache.root is not None else user_cache_folder()
        try:
            return maker.on_disk(CacheRoot(root, cache.quota), scene.facts(scene.placed[1]))
        except OutputError as error:
            warn(f"{error}; the source is run along instead")
            return None


def _warn_of_source_runs(scene: Scene, stored: StoredSource | None) -> None:
    """Say so if a cache that the user named does not hold all that the edit asks for."""
    if scene.saved is None or stored is None:
        return
    lock, steps = scene.lock, scene.solver.num_steps
    compares = asks_source(lock)
    asked = [(k, can_lock(lock, steps, k)) for k in range(zeroed_steps(lock, steps), steps)]
    missing = sum((locks or compares) and not stored.covers(k, locks, compares) for k, locks in asked)
    if missing:
        message = f"cache '{scene.saved.folder}' lacks {missing} of {steps} steps: the source is run along in them"
        warn(message)


def _facts(tier: str, stored: list[StoredSource]) -> dict[str, Any]:
    if not stored:
        return {"tier": "lockstep"}
    store, count = stored[0].store, sum(part.store.nbytes for part in stored)
    return {"tier": tier, "format": store.layout.format, "steps": len(store.steps), "bytes": count}


def _batches(task: Task, cache: CacheConfig) -> Iterator[Task]:
    size = cache.prompts_at_once or task.batch
    for first in range(0, task.batch, size):
        texts = (None if x is None else x.part(first, first + size) for x in (task.prompt, task.negative))
        yield replace(task, **dict(zip(("prompt", "negative"), texts, strict=True)))


class _StepCounter:
    """Counts the steps of all batches for the one who watches."""

    def __init__(self, progress: Progress, task: Task, cache: CacheConfig, num_steps: int):
        batches = -(-task.batch // (cache.prompts_at_once or task.batch))
        self.progress, self.done, self.total = progress, 0, num_steps * batches

    def __call__(self, k: int) -> None:
        self.done += 1
        self.progress("denoise", self.done, self.total)
