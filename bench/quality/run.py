"""Edits made and measured, case by case: a file of finished rows for each case, so that a run can be stopped and go on.

A row that is there is not made again, as long as all that decides it is the same: model, weights, steps, guidance, the
lock's values, the pixels and captions of the case, and the columns. Cases may be shared out to several processes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.quality.cases import quality_case
from bench.quality.measures import (
    COLUMNS,
    PeakMemory,
    answer_figures,
    background_figures,
    consistency,
    delivered_figures,
)
from bench.quality.perceptual import learned_distance
from bench.quality.rows import CLIP, Clip, Editors, Subject, base_of, edit
from bench.quality.subject import clip_subject
from bench.quality.vace_model import WEIGHTS, belongs_to, trained_vace, untrained_vace
from kvlock_fast.config import LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.files import write_text
from kvlock_fast.media import write_video

FPS = 8
"""Of the videos that are kept."""


@dataclass(frozen=True)
class Plan:
    """What is run. locks: by row; subjects: where `subject(number)` is from, by name and arguments, as processes are
    told of it; more: arguments of every edit; videos: a folder for the edited videos, a folder a row; lpips: weights of
    the learned distance.
    """

    model: str
    steps: int
    guidance: float
    locks: dict[str, LockConfig | None]
    subjects: tuple[str, dict[str, Any]]
    work: Path
    vace: str | None = None
    dtype: str = "auto"
    more: dict[str, Any] = field(default_factory=dict)
    videos: Path | None = None
    lpips: Path | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What a finished row must have been made with, beside its lock."""
        kind, arguments = self.subjects
        return {
            "model": self.model, "weights": weights_of(self.model), "steps": self.steps, "guidance": self.guidance,
            "subjects": [kind, {name: str(value) for name, value in arguments.items()}],
            "lpips": None if self.lpips is None else weights_of(str(self.lpips)),
        }  # fmt: skip

    @property
    def vace_weights(self) -> str | None:
        """Of the trained VACE, of a folder or our own of this very model; None where there is none."""
        if self.vace is not None:
            return weights_of(self.vace)
        return weights_of(str(WEIGHTS)) if belongs_to(WEIGHTS) == weights_of(self.model) else None

    def digests_of(self, number: int) -> dict[str, str]:
        """Digest by row of all that decides its figures of a case; rows that the case is not for are left out."""
        clips = _clip_digests(self.subjects[0], json.dumps(self.subjects[1], sort_keys=True), number)
        found = {}
        for row in self.locks:
            clip = clips.whole if row != base_of(row) else clips.region
            if clip is not None:
                found[row] = self._digest_of(row, clip)
        return found

    def _digest_of(self, row: str, clip: str) -> str:
        lock = self.locks[row]
        known = {**self.about, "lock": None if lock is None else asdict(lock), "more": self.more}
        known |= {"clip": clip, "columns": COLUMNS}
        if lock is not None and lock.family is not None:
            known["vace"] = self.vace_weights
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def video_of(self, row: str, name: str) -> Path | None:
        """The file of an edited video, where they are kept."""
        return None if self.videos is None else self.videos / row.replace("/", "-") / f"{name}.mp4"


class CaseFile:
    """The finished rows of one case."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / f"{name}.json"
        self.rows: dict[str, dict[str, Any]] = {}
        self.group: str | None = None
        if self.path.exists():
            try:
                found = json.loads(self.path.read_text())
                self.rows, self.group = found["rows"], found["group"]
            except (ValueError, KeyError) as error:
                raise InputError(f"'{self.path}' is not a file of finished rows: {error}") from error

    def has(self, row: str, digest: str, video: Path | None = None) -> bool:
        """Whether a row is there, made as it would be now, and its video, where one is wanted."""
        return self.rows.get(row, {}).get("digest") == digest and (video is None or video.is_file())

    def figures_of(self, digest: str) -> dict[str, Any] | None:
        """Those of any row that was made in the same way."""
        return next((row["figures"] for row in self.rows.values() if row["digest"] == digest), None)

    def add(self, row: str, digest: str, figures: dict[str, Any], group: str) -> None:
        """A finished row; the file is whole at any time."""
        self.rows[row], self.group = {"digest": digest, "figures": figures}, group
        write_text(self.path, json.dumps({"group": group, "rows": self.rows}, indent=1) + "\n")


class Worker:
    """A process's own model."""

    def __init__(self, plan: Plan):
        from kvlock_fast.edit import load_pipeline

        self.plan = plan
        pipe = load_pipeline(plan.model, dtype=plan.dtype)
        self.editors = Editors(pipe, lambda: self._vace(pipe))
        self.distance = None if plan.lpips is None else learned_distance(plan.lpips)
        encode_once(pipe.model)

    def _vace(self, pipe: Any) -> Any:
        import kvlock_fast as kvf
        from kvlock_fast.edit import load_pipeline

        if self.plan.vace is not None:
            return load_pipeline(self.plan.vace, dtype=self.plan.dtype)
        make = untrained_vace if self.plan.vace_weights is None else trained_vace
        made = kvf.KVLockPipeline.from_pipe(make(pipe.pipe))
        encode_once(made.model)
        return made

    def measure(self, number: int) -> float:
        """All rows of a case that are not there; the seconds it took."""
        plan, start = self.plan, time.perf_counter()
        subject = subject_of(plan.subjects, number)
        done = CaseFile(plan.work, subject.name)
        shared = plan.work / f"{subject.name}.source"
        try:
            for row, digest in plan.digests_of(number).items():
                video = plan.video_of(row, subject.name)
                if not done.has(row, digest, video):
                    figures = done.figures_of(digest) if video is None else None
                    done.add(row, digest, figures or self._figures(subject, row, shared, video), subject.group)
        finally:
            shutil.rmtree(shared, ignore_errors=True)
        return time.perf_counter() - start

    def _figures(self, subject: Subject, row: str, shared: Path, kept: Path | None) -> dict[str, Any]:
        plan, lock, clip = self.plan, self.plan.locks[row], subject.clip_of(row)
        assert clip is not None  # as digests_of names no other rows
        source, mask = clip.video, clip.mask
        answer = source if subject.answer is None else subject.answer
        if lock is None:
            video, spent = self._round_trip(answer)
        else:
            with torch.inference_mode():
                self.editors.of(lock).model.encode_video(torch.from_numpy(source))  # shared, so no row's own time
            video, spent = edit(self.editors, clip, lock, plan.steps, plan.guidance, shared, **plan.more)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_video(kept, video, FPS)
        figures: dict[str, Any] = background_figures(video, source, mask)
        figures |= delivered_figures(video, source, mask, subject.answer)
        if subject.answer is not None:
            figures |= answer_figures(video, subject.answer, self.distance)
        elif self.distance is not None:
            figures["lpips"] = self.distance(np.where(mask[..., None], source, video), source)
        if subject.is_right is not None:
            figures["success"] = bool(subject.is_right(video))
        if subject.path is not None:
            figures["consistency"] = consistency(video, *subject.path)
        return {name: value for name, value in (figures | spent).items() if value is not None}

    def _round_trip(self, video: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        """Through the autoencoder and back."""
        model, start = self.editors.plain.model, time.perf_counter()
        with PeakMemory(model.device) as memory, torch.inference_mode():
            latents = model.encode_video(torch.from_numpy(video))
            back = model.decode(latents, len(video))[0].numpy()
        return back, {"seconds": time.perf_counter() - start, "peak_bytes": memory.bytes}


def subject_of(subjects: tuple[str, dict[str, Any]], number: int) -> Subject:
    """Case `number` of the demo's world, or of a folder of clips."""
    kind, arguments = subjects
    if kind == "clips":
        return clip_subject(number, **arguments)
    case = quality_case(number, **arguments)
    clip = Clip(case.edit.source.video, case.edit.mask, case.edit.source_prompt, case.edit.prompt, case.seed)
    group = f"{case.kind}, {case.form}, {'one object' if case.other is None else 'second object'}"
    whole = None if case.other is None else case.whole_captions
    return Subject(f"{number:04d}", group, clip, case.edit.target.video, case.is_right, case.path, whole)


@dataclass(frozen=True)
class ClipDigests:
    """Clips that a case's rows edit; whole: with captions of the whole clip, where they differ."""

    name: str
    region: str
    whole: str | None


@lru_cache(maxsize=4096)
def _clip_digests(kind: str, arguments: str, number: int) -> ClipDigests:
    """Digest of case `number`; arguments: JSON."""
    subject = subject_of((kind, json.loads(arguments)), number)

    def digest(clip: Clip) -> str:
        texts = json.dumps([clip.source_prompt, clip.prompt, clip.seed, clip.video.shape]).encode()
        return hashlib.sha256(texts + clip.video.tobytes() + np.packbits(clip.mask).tobytes()).hexdigest()[:16]

    whole = subject.clip_of(f"row/{CLIP}")
    return ClipDigests(subject.name, digest(subject.clip), None if whole is None else digest(whole))


def encode_once(model: Any) -> None:
    """Let a model keep the latents of the video that it encoded last, as all rows of a case edit the same one."""
    encode: Callable[[torch.Tensor], torch.Tensor] = model.encode_video
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def encode_video(frames: torch.Tensor) -> torch.Tensor:
        if not kept or not torch.equal(kept[0][0], frames):
            kept[:] = [(frames.clone(), encode(frames))]
        return kept[0][1].clone()

    model.encode_video = encode_video


@lru_cache(maxsize=8)
def weights_of(model: str) -> str:
    """A short hash of the weights of a folder, a file or the bundled model; a model's name itself from the hub."""
    from bench.quality.demo_model import fingerprint
    from kvlock_fast.models.bundled import model_path

    folder = model_path() if model == "demo" else Path(model)
    return fingerprint(folder) if folder.exists() else model


def run(plan: Plan, numbers: list[int], workers: int, say: Callable[[str], None] = print) -> None:
    """Make what is missing of these cases; says how long it will take once it knows."""
    plan.work.mkdir(parents=True, exist_ok=True)
    left = [n for n in numbers if missing(plan, n)]
    edits = sum(missing(plan, n) for n in left)
    say(f"{len(numbers)} cases, {len(plan.locks)} rows: {edits} edits to make, the others are there")
    start, taken = time.perf_counter(), 0
    for done, _ in enumerate(_measured(plan, left, workers), start=1):
        taken = time.perf_counter() - start
        if done in (workers, 2 * workers) or done % 10 == 0:
            say(f"{done} of {len(left)} cases; about {taken / done * (len(left) - done) / 60:.0f} minutes are left")
    if left:
        say(f"{taken / 60:.1f} minutes by {workers} processes, {taken / len(left):.1f} seconds a case")


def missing(plan: Plan, number: int) -> int:
    """How many rows of a case are not there."""
    name = name_of(plan, number)
    done = CaseFile(plan.work, name)
    return sum(not done.has(row, digest, plan.video_of(row, name)) for row, digest in plan.digests_of(number).items())


def name_of(plan: Plan, number: int) -> str:
    """Name of a case's file."""
    return _clip_digests(plan.subjects[0], json.dumps(plan.subjects[1], sort_keys=True), number).name


def _measured(plan: Plan, numbers: list[int], workers: int) -> Iterator[float]:
    """The seconds of each case, as they are finished."""
    if workers == 1:
        worker = Worker(plan) if numbers else None
        for number in numbers:
            yield worker.measure(number)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(plan,)) as pool:
        for future in as_completed([pool.submit(_one, number) for number in numbers]):
            yield future.result()


_worker: Worker | None = None


def _begin(plan: Plan) -> None:
    """A process's start: a model of its own on one thread, as processes share the cores."""
    global _worker
    torch.set_num_threads(1)
    _worker = Worker(plan)


def _one(number: int) -> float:
    return _worker.measure(number)


def gathered(plan: Plan, numbers: list[int]) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, str]]:
    """Figures by row and case, and each case's group; rows that are not made as the plan has them are left out."""
    rows: dict[str, dict[str, dict[str, Any]]] = {row: {} for row in plan.locks}
    groups = {}
    for number in numbers:
        done = CaseFile(plan.work, name_of(plan, number))
        for row, digest in plan.digests_of(number).items():
            if done.has(row, digest):
                rows[row][done.path.stem] = done.rows[row]["figures"]
                groups[done.path.stem] = done.group
    return rows, groups
