"""Editors, which compute the frames of a pass: the interface, and the one that has a model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvlock_fast.batch.jobs import Decision, Setup
from kvlock_fast.batch.manifest import Reading
from kvlock_fast.edit import call_pipeline, load_pipeline, working_size
from kvlock_fast.errors import InputError
from kvlock_fast.media.clip import Clip
from kvlock_fast.progress import Report
from kvlock_fast.settings import Speed

if TYPE_CHECKING:
    from kvlock_fast.pipeline import KVLockPipeline


def enter_uncaptured(reading: Reading) -> None:
    """Enter the jobs whose steps no graph can hold, as far as that shows without the model: for --graph on."""
    for job in reading.jobs:
        why = _why_not_captured(job.setup)
        if why is not None:
            name, reason = why
            reading.wrong(job.line, name, f"{reason}, which --graph on cannot capture")


def _why_not_captured(setup: Setup) -> tuple[str, str] | None:
    """The field that prevents it, and why; as `graph.why_not_captured`, which knows the model too."""
    from kvlock_fast.loop.schedule import compares_with_source

    if setup.clip_frames is not None:
        return "clip_frames", f"{setup.clip_frames} has the clip go through the model in stretches"
    if setup.lock.stock:
        return "preset", "with nothing locked or guided the edit takes the scheduler's own steps"
    if compares_with_source(setup.lock):
        return "tau", "'auto' counts the source's predictions on the host"
    return None


class OutOfMemory(Exception):
    """A pass was too much for the device; with fewer prompts at once it may not be."""


class DeviceLost(Exception):
    """The device answers no more: nothing can run in this process."""


class Editor(Protocol):
    """Computes frames. One call at a time, always in the same thread."""

    @property
    def speed(self) -> Speed:
        """Settings of every edit."""
        ...

    def decide(self, setup: Setup, clip: Clip, prompts: int) -> Decision:
        """Say how to run so many prompts on a clip; load what is needed."""
        ...

    def edit(
        self, setup: Setup, clip: Clip, prompts: list[str], decision: Decision, progress: Report
    ) -> tuple[list[np.ndarray], dict[str, Any]]:
        """Return one uint8 [F, h, w, 3] a prompt, and the trace as plain values.

        Args:
            setup: what is asked of the model.
            clip: source and mask.
            prompts: of one batch after the other.
            decision: how to run them.
            progress: told the stage and its steps.

        Raises InputError for what cannot be edited, OutOfMemory, DeviceLost, and what `progress` raises.
        """
        ...


@dataclass
class ModelEditor:
    """Edits with a diffusers pipeline, which stays loaded until a setup asks for another.

    folder: what a model's folder is relative to, where that is not the working directory.
    """

    device: str = "auto"
    speed: Speed = field(default_factory=Speed)
    folder: Path = Path()
    _loaded: tuple[tuple[str, str], KVLockPipeline] | None = None
    _failed: dict[tuple[str, str], str] = field(default_factory=dict)

    def decide(self, setup: Setup, clip: Clip, prompts: int) -> Decision:
        """Ask the planner about this machine with the model on it."""
        from kvlock_fast.batch.fit import decide, fit_extent, foreground_tokens
        from kvlock_fast.files import user_cache_folder
        from kvlock_fast.planning.find_model import from_pipeline
        from kvlock_fast.planning.machine import Machine

        pipe = self._load(setup)
        size = from_pipeline(pipe.pipe)
        extent = fit_extent(clip.video.shape[:3], working_size(setup.model, clip.video, setup.size), setup, size)
        foreground = foreground_tokens(clip.mask, extent, setup)
        machine = Machine.here(pipe.model.device, user_cache_folder())
        return decide(setup, extent, foreground, prompts, machine)

    def edit(
        self, setup: Setup, clip: Clip, prompts: list[str], decision: Decision, progress: Report
    ) -> tuple[list[np.ndarray], dict[str, Any]]:
        import torch

        pipe = self._load(setup)
        cache = replace(setup.cache, tier=decision.tier, format=decision.format, prompts_at_once=decision.at_once)
        size = working_size(setup.model, clip.video, setup.size)
        settings = replace(setup.edit_settings(prompts), size=size, cache=cache, **vars(self.speed))
        try:
            out = call_pipeline(pipe, clip, settings, progress, ladder=decision.ladder)
        except InputError as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError) and not decision.ladder:
                raise OutOfMemory(str(error)) from error
            raise
        except RuntimeError as error:
            self._refuse_lost_device(pipe, error)
            raise
        return out.frames, out.trace.as_dict()

    def _load(self, setup: Setup) -> KVLockPipeline:
        wanted = (setup.model, setup.dtype)
        if wanted in self._failed:  # thousands of jobs may name a model that is not there
            raise InputError(self._failed[wanted])
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None  # the memory of the one before
            path = self.folder / setup.model
            try:
                pipe = load_pipeline(str(path) if path.is_dir() else setup.model, self.device, setup.dtype)
            except InputError as error:
                self._failed[wanted] = str(error)
                raise
            self._loaded = wanted, pipe
        return self._loaded[1]

    def _refuse_lost_device(self, pipe: KVLockPipeline, error: RuntimeError) -> None:
        import torch

        device = pipe.model.device
        if device.type == "cpu":
            return
        try:
            torch.zeros(1, device=device).add_(1).item()
        except RuntimeError:
            raise DeviceLost(f"the device {device} answers no more: {error}") from error
