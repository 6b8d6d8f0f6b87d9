"""A batch checked before anything is computed: files, masks, output places, and the planner's word."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from kvlock_fast.batch.fit import decide, fit_extent, foreground_tokens
from kvlock_fast.batch.jobs import Decision, Job, Setup, grouped
from kvlock_fast.batch.manifest import Reading
from kvlock_fast.batch.places import fetched, is_there
from kvlock_fast.edit import working_size
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.media import STILLS, grow_mask, is_box, read_mask, read_video
from kvlock_fast.media.clip import solid_mask
from kvlock_fast.progress import Report

if TYPE_CHECKING:
    from kvlock_fast.planning.extent import Extent
    from kvlock_fast.planning.machine import Machine
    from kvlock_fast.planning.model_size import ModelSize

T = TypeVar("T")

Shape = tuple[int, int, int]
"""Frames, height and width."""


def check_files(reading: Reading, base: Path, skip: frozenset[str] = frozenset()) -> None:
    """Enter the files that are missing; reads nothing. skip: ids not to look at."""
    there: dict[str, bool] = {}
    for job in reading.jobs:
        if job.id in skip:
            continue
        for name, place in (("source", job.setup.source), ("mask", job.setup.mask)):
            if name == "mask" and is_box(place):
                continue
            if place not in there:
                there[place] = False
                with suppress(InputError):
                    there[place] = is_there(place, base)
            if not there[place]:
                reading.wrong(job.line, name, f"there is no file or folder {place!r}")


def model_size(model: str) -> ModelSize | None:
    """Size of a model in a folder or of the bundled one, None for a hub id, which is looked up when it is loaded.

    Raises InputError for a folder that holds no model, and for a path that is not there.
    """
    from kvlock_fast.models.bundled import model_path
    from kvlock_fast.planning.find_model import from_config

    path = model_path() if model == "demo" else Path(model)
    if path.exists():
        return from_config(path)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"there is no folder {model!r}, and it is no hub id like Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    return None


@dataclass
class Checker:
    """A check that looks into every file once, however many jobs name it."""

    reading: Reading
    base: Path
    machine: Machine
    most: int
    progress: Report
    decoded: int = 0
    _sources: dict[str, Shape | str] = field(default_factory=dict)
    _models: dict[str, ModelSize | str | None] = field(default_factory=dict)

    def run(self) -> list[tuple[list[Job], Decision | None]]:
        """Plan each group (None: not known before the model is loaded); problems are entered."""
        self._read_sources()
        masks: dict[tuple[str, float], list[list[Job]]] = {}
        for group in grouped(self.reading.jobs, self.most):
            setup = group[0].setup
            masks.setdefault((setup.mask, setup.mask_shape.threshold), []).append(group)
        found = []
        for done, ((mask, threshold), groups) in enumerate(masks.items()):
            self.progress("checking masks", done, len(masks))
            pixels = None if is_box(mask) else self._decoded(mask, partial(read_mask, threshold=threshold))
            found += [(group, self._check_group(group, pixels)) for group in groups]
        return found

    def _read_sources(self) -> None:
        wanted: dict[str, set[int | None]] = {}
        for job in self.reading.jobs:
            wanted.setdefault(job.setup.source, set()).add(job.setup.max_frames)
        for done, (source, limits) in enumerate(wanted.items()):
            self.progress("checking sources", done, len(wanted))
            known = [limit for limit in limits if limit is not None]
            most = max(known) if len(known) == len(limits) else None
            self._sources[source] = self._decoded(source, partial(_shape, most=most))

    def _decoded(self, place: str, read: Callable[[Path], T]) -> T | str:
        """The content of a file, or what is wrong with it."""
        try:
            with fetched(place, self.base) as path:
                self.decoded += 1
                return read(path)
        except (InputError, OSError) as error:
            return str(error)

    def _check_group(self, group: Sequence[Job], pixels: np.ndarray | str | None) -> Decision | None:
        setup, name = group[0].setup, "source"
        try:
            frames, height, width = _sound(self._sources[setup.source])
            shape = (min(frames, setup.max_frames or frames), height, width)
            self._check_images(group, shape[0])
            name = "mask"
            mask = self._fitted(setup, shape, pixels)
            name = "model"
            size = self._size(setup.model)
            if size is None:
                return None
            name = "clip_frames"
            windows = setup.windows()
            if windows is not None:
                windows.latent_sizes(size.geometry)
            name = "size"
            extent = self._extent(setup, shape, size)
            name = "mask"
            foreground = foreground_tokens(mask, extent, setup)
            name = "layers"
            self._check_layers(setup, size)
            name = "memory"
            return decide(setup, extent, foreground, len(group), self.machine)
        except InputError as error:
            for job in group:
                self.reading.wrong(job.line, name, str(error))
        return None

    def _check_images(self, group: Sequence[Job], frames: int) -> None:
        for job in group:
            if frames > 1 and Path(job.output).suffix.lower() in STILLS:
                message = f"is an image, which holds one frame, and the source has {frames}: {job.output!r}"
                self.reading.wrong(job.line, "output", message)

    def _fitted(self, setup: Setup, shape: Shape, pixels: np.ndarray | str | None) -> np.ndarray:
        pixels = _sound(pixels)
        if pixels is not None and setup.max_frames is not None:
            pixels = pixels[: setup.max_frames]
        solid = solid_mask(setup.source, setup.mask, shape, pixels, setup.mask_shape)
        return grow_mask(solid, setup.mask_shape.feather)

    def _check_layers(self, setup: Setup, size: ModelSize) -> None:
        from kvlock_fast.locking.arch import select_layers

        locked = len(select_layers(size.layers, setup.lock.layers))
        if setup.lock.compute == "foreground" and locked < size.layers:
            raise InputError(f"leaves out {size.layers - locked} of {size.layers}, and compute 'foreground' needs all")

    def _extent(self, setup: Setup, shape: Shape, size: ModelSize) -> Extent:
        with warnings.catch_warnings():  # said when it is edited
            warnings.simplefilter("ignore", InputWarning)
            wanted = working_size(setup.model, np.broadcast_to(np.uint8(0), (*shape, 3)), setup.size)
        return fit_extent(shape, wanted, setup, size)

    def _size(self, model: str) -> ModelSize | None:
        if model not in self._models:
            try:
                self._models[model] = model_size(model)
            except InputError as error:
                self._models[model] = str(error)
        return _sound(self._models[model])


def _shape(path: Path, most: int | None) -> Shape:
    return read_video(path, max_frames=most).frames.shape[:3]


def _sound(found: T | str) -> T:
    """Raise InputError for what is wrong with a file, where that was found."""
    if isinstance(found, str):
        raise InputError(found)
    return found
