"""What the tests of a batch share: clips, manifests, and an editor that needs no model."""

import hashlib
import json
import os
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

from kvlock_fast.batch.editor import OutOfMemory, Speed
from kvlock_fast.batch.engine import LocalEngine
from kvlock_fast.batch.jobs import Decision
from kvlock_fast.batch.ledger import Ledger
from kvlock_fast.batch.manifest import read_manifest
from kvlock_fast.batch.places import Results, remove_litter
from kvlock_fast.batch.runner import Runner
from kvlock_fast.batch.worker import Worker
from kvlock_fast.errors import InputError
from kvlock_fast.media import read_video, write_video

FRAMES, SIDE = 3, 16


def write_clips(folder: Path, count: int = 2) -> None:
    """Clips s0.mkv, s1.mkv, ... and one mask, m.npy."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        frames = rng.integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
        write_video(folder / f"s{i}.mkv", frames, Fraction(8))
    mask = np.zeros((SIDE, SIDE), bool)
    mask[4:9, 3:12] = True
    np.save(folder / "m.npy", mask)


def job(i: int, source: int = 0, **more) -> dict:
    """A line of a manifest."""
    line = {"id": f"j{i}", "source": f"s{source}.mkv", "mask": "m.npy", "source_prompt": "a square"}
    return {**line, "prompt": f"prompt {i}", "output": f"videos/j{i}.mkv", **more}


def write_manifest(folder: Path, lines: list, name: str = "jobs.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


class StandIn:
    """An editor that draws noise from what a model's rounding would depend on: the prompt and its place in its batch.

    log: a file that gets a line for each edit; seconds: how long a step takes; at_once: the planner's word; most: more
    prompts at once are out of memory. A prompt with "nan" fails, "poison" kills the process, "crash" raises.
    """

    def __init__(self, log: Path | None = None, seconds: float = 0.0, at_once: int = 3, most: int = 99):
        self.log, self.seconds, self.at_once, self.most = log, seconds, at_once, most
        self.speed = Speed()

    def decide(self, setup, clip, prompts):
        return Decision("resident", "fp8_e4m3", min(self.at_once, prompts))

    def edit(self, setup, clip, prompts, decision, progress):
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps({"source": setup.source, "prompts": prompts, "at_once": decision.at_once}) + "\n")
        if decision.at_once > self.most or "huge" in prompts[0]:
            raise OutOfMemory("there is too little memory on the device")
        for step in range(2):
            progress("denoise", step, 2)
            if self.seconds:
                time.sleep(self.seconds)
        self._break(prompts)
        progress("denoise", 2, 2)
        videos = []
        for i, prompt in enumerate(prompts):
            first = i - i % decision.at_once
            batch = min(decision.at_once, len(prompts) - first)
            key = f"{setup.source} {setup.seed} {prompt} place {i - first} of {batch} {decision}"
            seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])
            videos.append(np.random.default_rng(seed).integers(0, 256, clip.video.shape, dtype=np.uint8))
        return videos, {"prompts": prompts, "samples": len(prompts), "steps": 2, "warmup_steps": 0, "records": []}

    def _break(self, prompts):
        for prompt in prompts:
            if "nan" in prompt:
                raise InputError(f"the latents became NaN or inf at step 1 of 2, prompt {prompt!r}")
            if "crash" in prompt:
                raise ZeroDivisionError("a fault")
            if "poison" in prompt:
                os._exit(9)


def run_batch(manifest: Path, folder: Path, make_editor=StandIn, most: int = 4, retry_failed: bool = False, **more):
    """A whole batch in this process, as the command runs it; the states' counts."""
    reading = read_manifest(manifest, folder, {})
    assert not reading.sentences(), reading.sentences()
    folder.mkdir(parents=True, exist_ok=True)
    with Ledger(folder) as ledger:
        remove_litter(folder)
        results = Results(str(folder))
        ledger.take(reading.jobs, results.size, retry_failed)
        engine = LocalEngine(Worker(make_editor(), manifest.parent, reports=False, command="test"))
        try:
            return Runner(ledger, engine, results, reading.jobs, most, **more).run()
        finally:
            engine.close()


def ledger_rows(folder: Path) -> dict[str, dict]:
    """Every row by id, as plain values."""
    with Ledger(folder) as ledger:
        return {row["id"]: dict(row) for row in ledger.rows()}


def frame_hashes(folder: Path) -> dict[str, str]:
    """Of the decoded frames of every video below a folder; not of temporary files, which a kill leaves."""
    videos = sorted(path for path in folder.rglob("[!.]*") if path.suffix in (".mkv", ".mp4"))
    return {str(p.relative_to(folder)): hashlib.sha256(read_video(p).frames.tobytes()).hexdigest() for p in videos}
