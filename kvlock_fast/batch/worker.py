"""Worker of a batch, which turns passes into finished files on one machine.

Several passes may be in a worker at once, each in a thread of its caller's: while one has the device, the next one's
clip is read and the last one's results are measured and encoded.
"""

import io
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from kvlock_fast.batch.editor import DeviceLost, Editor, OutOfMemory, Speed
from kvlock_fast.batch.jobs import Decision, Job, Pass, Setup
from kvlock_fast.batch.places import fetched, is_remote
from kvlock_fast.edit import EditResult, finish_edit
from kvlock_fast.edit_files import write_page
from kvlock_fast.errors import InputError, OutputLost
from kvlock_fast.files import LOST
from kvlock_fast.media import MaskShape, is_box, write_video
from kvlock_fast.media.clip import Clip, read_clip

THUMBNAIL = 160
"""The longer side of each half of a thumbnail, in pixels."""


CLIPS_HELD = 2
"""Clips kept in memory for the passes to come."""

_Frames = tuple[Job, np.ndarray, dict[str, Any]]
"""A job with its video, uint8 [F, h, w, 3], and its trace."""


@dataclass(frozen=True)
class Outcome:
    """Files and figures of a job, or why there are none. seconds: its share of the pass."""

    job: Job
    error: str | None = None
    video: bytes = b""
    report: bytes | None = None
    thumbnail: bytes | None = None
    metrics: dict[str, float | None] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Finished:
    """The outcome of a pass.

    stopped: it was interrupted, and its jobs are pending again; lost: why no file can be written any more, so that
    jobs without an outcome are pending again; halve: it failed as a whole, and its jobs are to be told apart.
    """

    work: Pass
    outcomes: tuple[Outcome, ...] = ()
    decision: Decision | None = None
    stopped: bool = False
    lost: str | None = None
    halve: bool = False


@dataclass(frozen=True)
class Running:
    """Progress of a pass: its jobs, its stage with steps done of all, and seconds since the stage began."""

    number: int
    jobs: tuple[str, ...]
    stage: str
    done: int
    total: int
    seconds: float


class Stopped(Exception):
    """The batch is to stop; the pass came to nothing."""


class _BrokenPass(Exception):
    """The model failed at the prompts of a pass together."""


def finished_files(
    job: Job, clip: Clip, video: np.ndarray, trace: dict[str, Any], command: str | None, speed: Speed
) -> Outcome:
    """Make a job's video, page and thumbnail, and measure it, all in memory.

    Args:
        job: the job.
        clip: its source and mask.
        video: uint8 [F, h, w, 3] as the model made it.
        trace: the trace of this job alone.
        command: shown on the page; None for no page.
        speed: how it was run, for the page.
    """
    settings = replace(job.edit_settings(), **vars(speed))
    result = finish_edit(clip, [video], trace, settings)
    with tempfile.TemporaryDirectory(prefix="kvlock-") as folder:
        file, page = Path(folder) / f"video{Path(job.output).suffix.lower()}", Path(folder) / "report.html"
        audio = clip.audio if job.finish.audio else None
        write_video(file, result.videos[0], clip.fps, audio=audio, called=job.output)
        if command is not None:
            write_page(page, clip, result, settings, command)
        report = page.read_bytes() if command is not None else None
        return Outcome(job, None, file.read_bytes(), report, thumbnail(result), result.metrics[0])


def thumbnail(result: EditResult) -> bytes:
    """The middle frame of source and edit side by side, as JPEG."""
    from PIL import Image

    middle = len(result.source) // 2
    both = np.concatenate([result.source[middle], result.videos[0][middle]], axis=1)
    height, width = result.source.shape[1:3]
    scale = THUMBNAIL / max(height, width)
    picture = Image.fromarray(both).resize((max(2, round(2 * width * scale)), max(1, round(height * scale))))
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=80)
    return data.getvalue()


class Worker:
    """Runs passes with an editor, whose calls are all made in one thread of its own."""

    def __init__(self, editor: Editor, base: Path, reports: bool, command: str):
        """Load nothing yet.

        Args:
            editor: computes the frames.
            base: the folder that relative paths are relative to.
            reports: whether each job gets a page.
            command: shown on the pages.
        """
        self.editor, self.base, self.command = editor, base, command if reports else None
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._clips: OrderedDict[tuple[str, str, int | None, MaskShape], Future[Clip]] = OrderedDict()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._running: dict[int, tuple[Running, float]] = {}

    def run(self, work: Pass) -> Finished:
        """Run a pass from files to files. Raises DeviceLost."""
        self._report(work, "read", 0, 1)
        try:
            clip = self._clip(work.setup)
            self._report(work, "wait", 0, 1)
            return self._finish(work, clip, *self._device.submit(self._edited, work, clip).result())
        except Stopped:
            return Finished(work, stopped=True)
        except _BrokenPass:
            return Finished(work, halve=True)
        except DeviceLost:
            raise
        except Exception as error:  # whatever it is, the other passes go on
            return Finished(work, tuple(Outcome(job, _sentence(error)) for job in work.jobs))
        finally:
            with self._lock:
                self._running.pop(work.id, None)

    def running(self) -> list[Running]:
        """The passes in this worker."""
        with self._lock:
            passes = sorted(self._running.items())
        return [replace(running, seconds=time.monotonic() - since) for _, (running, since) in passes]

    def stop(self) -> None:
        """Stop after the step that is running; what is decoded is still finished."""
        self._stop.set()

    def close(self) -> None:
        self._device.shutdown(wait=True, cancel_futures=True)

    def _edited(self, work: Pass, clip: Clip) -> tuple[Decision, list[_Frames], float]:
        """Edit, in the device's thread: how it was done, each job's frames, and a job's share of the seconds."""
        self._refuse_if_stopped()
        self._report(work, "load", 0, 1)
        decision = work.decision or self.editor.decide(work.setup, clip, len(work.places))
        begun = time.monotonic()
        try:
            decision, frames = self._with_memory(work, clip, decision)
        except (Stopped, DeviceLost):
            raise
        except OutOfMemory as error:
            raise InputError(str(error)) from error
        except Exception as error:
            # What one prompt breaks is no reason for the others to fail; what is left is a fault, said in the ledger.
            if len(work.jobs) > 1:
                raise _BrokenPass from error
            raise
        return decision, frames, (time.monotonic() - begun) / len(work.jobs)

    def _with_memory(self, work: Pass, clip: Clip, decision: Decision) -> tuple[Decision, list[_Frames]]:
        """Edit with half as many prompts at once, and half again, while memory runs out; at last by the ladder.

        Raises OutOfMemory where that is too much too.
        """
        report = lambda stage, done, total: self._report(work, stage, done, total)  # noqa: E731
        while True:
            rows = work.rows(decision.at_once)
            try:
                videos, trace = self.editor.edit(work.setup, clip, [job.prompt for job in rows], decision, report)
            except OutOfMemory:
                if decision.ladder:
                    raise
                halved = replace(decision, at_once=ceil(decision.at_once / 2))
                decision = halved if decision.at_once > 1 else replace(decision, ladder=True)
            else:
                return decision, [(job, videos[at], one_of(trace, at)) for job in work.jobs for at in [rows.index(job)]]

    def _finish(self, work: Pass, clip: Clip, decision: Decision, frames: list[_Frames], seconds: float) -> Finished:
        """Files and figures of each job; one that cannot be finished keeps no other from it."""
        outcomes = []
        for i, (job, video, trace) in enumerate(frames):
            self._report(work, "write", i, len(frames))
            begun = time.monotonic()
            command = None if self.command is None else f"{self.command}  # job {job.id}"
            try:
                outcome = finished_files(job, clip, video, trace, command, self.editor.speed)
            except Exception as error:
                if isinstance(error, OutputLost) or (isinstance(error, OSError) and error.errno in LOST):
                    # No room to encode in: what is finished is kept.
                    return Finished(work, tuple(outcomes), decision, lost=_sentence(error))
                outcomes.append(Outcome(job, _sentence(error)))
                continue
            outcomes.append(replace(outcome, seconds=seconds + time.monotonic() - begun))
        return Finished(work, tuple(outcomes), decision)

    def _clip(self, setup: Setup) -> Clip:
        """Read a clip once for all the passes that want it, also where they ask at the same time."""
        key = (setup.source, setup.mask, setup.max_frames, setup.mask_shape)
        with self._lock:
            future, mine = self._clips.get(key), False
            if future is None or (future.done() and future.exception() is not None):
                future, mine = Future(), True
                self._clips[key] = future
            self._clips.move_to_end(key)
            while len(self._clips) > CLIPS_HELD:
                self._clips.popitem(last=False)
        if mine:
            try:
                future.set_result(self._read(setup))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _read(self, setup: Setup) -> Clip:
        with ExitStack() as files:
            places = [setup.source] if is_box(setup.mask) else [setup.source, setup.mask]
            found = {place: str(files.enter_context(fetched(place, self.base))) for place in places}
            try:
                mask = found.get(setup.mask, setup.mask)
                clip = read_clip(found[setup.source], mask, setup.max_frames, setup.mask_shape)
            except InputError as error:
                message = str(error)
                for place, path in found.items():
                    message = message.replace(path, place) if is_remote(place) else message
                raise InputError(message) from error
            if clip.audio is not None:
                # The sound is read when a video is written: what was fetched stays as long as the clip.
                weakref.finalize(clip, files.pop_all().close)
            return clip

    def _report(self, work: Pass, stage: str, done: int, total: int) -> None:
        running = Running(work.id, tuple(job.id for job in work.jobs), stage, done, total, 0.0)
        with self._lock:
            before, since = self._running.get(work.id, (running, time.monotonic()))
            self._running[work.id] = running, since if before.stage == stage else time.monotonic()
        if stage in ("load", "encode", "text", "source pass", "denoise") and (stage != "denoise" or done < total):
            self._refuse_if_stopped()

    def _refuse_if_stopped(self) -> None:
        if self._stop.is_set():
            raise Stopped


def one_of(trace: dict[str, Any], sample: int) -> dict[str, Any]:
    """The trace of one sample of several, as that of an edit of its own."""
    records = [{**record, "sample": 0} for record in trace.get("records", ()) if record["sample"] == sample]
    return {**trace, "prompts": trace["prompts"][sample : sample + 1], "samples": 1, "records": records}


def _sentence(error: BaseException) -> str:
    """An error in one line; its kind too, where it is not the user's to mend."""
    text = " ".join(str(error).split())[:1000]
    return text if isinstance(error, InputError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
