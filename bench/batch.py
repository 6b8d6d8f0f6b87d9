"""How many edits an hour a batch makes: beside one `edit` process a job, and beside itself without grouping.

    python -m bench.batch --output out/batch.json            # the demo model: about ten minutes on two cores
    python -m bench.batch --quick                            # a look, a minute
    python -m bench.batch --model DIR --size 480x832 --frames 81 --steps 50 --output out/batch-gpu.json   # a real shape

Four ways take turns in each round, in changing order, on the same sources with 8 prompts each:

- edit: a process of `kvlock-fast edit` a job; batch: one process of `kvlock-fast batch` for all jobs. Both from start
  to end, loading included.
- grouped, single: the batch's runner in this process, the model loaded before, 8 prompts and 1 prompt a pass, one
  source after the other. Their seconds of processor time are there too, which others on the machine lengthen less.

No way writes reports. Rates are medians, ratios medians of those of neighbours in time.
Threads that spin for each other make figures of a busy machine worthless: OMP_NUM_THREADS=1 there. Exit status 1 if a
job failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.machine import machine

PROMPTS = 8
CEILING = 3 * PROMPTS / (2 * PROMPTS + 1)
"""Of the gain by grouping: 3 forwards an edit with the source along, 2 and an eighth with the source shared."""
TARGETS = {"batch_over_edit": (3.0, 3.0), "grouped_over_single": (1.25, 1.4)}
"""What must be, and the record to aim at."""


def write_jobs(folder: Path, sources: int, arguments: argparse.Namespace) -> Path:
    """Clips of the demo's world, and a manifest with 8 prompts for each."""
    import numpy as np

    from kvlock_fast.demo.scene import COLOURS
    from kvlock_fast.demo.world import sample_edit
    from kvlock_fast.media import write_video

    height, width = map(int, (arguments.size or "64x64").split("x"))
    lines = []
    for source in range(sources):
        case = sample_edit(2**31 + 900 + source, "recolour", frames=arguments.frames, height=height, width=width)
        write_video(folder / f"s{source}.mkv", case.source.video, 8)
        np.save(folder / f"m{source}.npy", case.mask)
        shape = case.source_prompt.split()
        for number, colour in enumerate(list(COLOURS)[:PROMPTS]):
            prompt = " ".join(colour if word in COLOURS else word for word in shape)
            line = {"id": f"s{source}-{number}", "source": f"s{source}.mkv", "mask": f"m{source}.npy"}
            more = {"source_prompt": case.source_prompt, "prompt": prompt, "steps": arguments.steps, "guidance": 3.0}
            lines.append({**line, **more, "model": arguments.model, "size": f"{height}x{width}"})
    path = folder / "jobs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(*arguments: object) -> float:
    """Seconds of a `kvlock-fast` process."""
    begun = time.perf_counter()
    root = str(Path(__file__).resolve().parent.parent)
    subprocess.run(
        [sys.executable, "-m", "kvlock_fast.cli", *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": root},
    )
    return time.perf_counter() - begun


def edit_processes(manifest: Path, folder: Path, count: int) -> tuple[int, float]:
    """The first `count` jobs, a process each."""
    folder.mkdir()
    seconds = 0.0
    for line in manifest.read_text().splitlines()[:count]:
        job = json.loads(line)
        files = ["--source", manifest.parent / job["source"], "--mask", manifest.parent / job["mask"]]
        texts = ["--source-prompt", job["source_prompt"], "--prompt", job["prompt"], "--model", job["model"]]
        numbers = ["--steps", job["steps"], "--guidance", job["guidance"], "--size", job["size"]]
        seconds += command("edit", *files, *texts, *numbers, "--output", folder / f"{job['id']}.mp4", "--quiet")
    return count, seconds


def batch_process(manifest: Path, folder: Path, _: int) -> tuple[int, float]:
    """All jobs in one process."""
    seconds = command("batch", manifest, "--output", folder, "--no-reports", "--quiet")
    return len(manifest.read_text().splitlines()), seconds


class InProcess:
    """The batch's runner with a model that is loaded once for all measurements."""

    def __init__(self, manifest: Path):
        from kvlock_fast.batch.editor import ModelEditor
        from kvlock_fast.batch.manifest import read_manifest

        self.manifest, self.editor = manifest, ModelEditor()
        self.jobs = read_manifest(manifest, manifest.parent, {}).jobs
        self.editor._load(self.jobs[0].setup)

    def run(self, folder: Path, most: int, jobs: list[Any]) -> dict[str, float]:
        """Edits an hour and processor seconds an edit, with at most `most` jobs a pass."""
        from kvlock_fast.batch.engine import LocalEngine
        from kvlock_fast.batch.ledger import Ledger
        from kvlock_fast.batch.places import Results
        from kvlock_fast.batch.runner import Runner
        from kvlock_fast.batch.worker import Worker

        folder.mkdir(parents=True)
        begun, processor = time.perf_counter(), time.process_time()
        with Ledger(folder) as ledger:
            results = Results(str(folder))
            ledger.take(jobs, results.size)
            engine = LocalEngine(Worker(self.editor, self.manifest.parent, reports=False, command=""))
            try:
                counts = Runner(ledger, engine, results, jobs, most).run()
            finally:
                engine.close()
        if counts["done"] != len(jobs):
            raise SystemExit(f"only {counts['done']} of {len(jobs)} jobs were done")
        seconds, processor = time.perf_counter() - begun, time.process_time() - processor
        return {"edits_per_hour": 3600 * len(jobs) / seconds, "cpu_seconds_per_edit": processor / len(jobs)}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Edits an hour of each way in each round, and what they come to."""
    manifest = write_jobs(folder, arguments.sources, arguments)
    inside, shuffle = InProcess(manifest), random.Random(0)
    by_source = [inside.jobs[first : first + PROMPTS] for first in range(0, len(inside.jobs), PROMPTS)]
    inside.run(folder / "warm-up", PROMPTS, inside.jobs[:2])
    rates: dict[str, list[float]] = {name: [] for name in ("edit", "batch", "grouped", "single")}
    processor: dict[str, list[float]] = {"grouped": [], "single": []}
    for turn in range(arguments.rounds):
        for number, jobs in enumerate(by_source):
            for name, most in shuffle.sample([("grouped", PROMPTS), ("single", 1)], 2):
                found = inside.run(folder / f"{name}-{turn}-{number}", most, jobs)
                rates[name].append(found["edits_per_hour"])
                processor[name].append(found["cpu_seconds_per_edit"])
        for name, way in shuffle.sample([("edit", edit_processes), ("batch", batch_process)], 2):
            count, seconds = way(manifest, folder / f"{name}-{turn}", arguments.edits)
            rates[name].append(3600 * count / seconds)
        said = ", ".join(f"{name} {found[-1]:.0f}" for name, found in rates.items())
        print(f"round {turn + 1}: {said} edits an hour", file=sys.stderr, flush=True)
    ratios = {
        "batch_over_edit": pairwise(rates["batch"], rates["edit"]),
        "grouped_over_single": pairwise(rates["grouped"], rates["single"]),
        "grouped_over_single_by_cpu_seconds": pairwise(processor["single"], processor["grouped"]),
    }
    return {
        "edits_per_hour": rates,
        "cpu_seconds_per_edit": processor,
        "ratios_of_neighbours": ratios,
        "median": {name: statistics.median(found) for name, found in rates.items()},
        "ratios": {name: statistics.median(found) for name, found in ratios.items()},
        "load_average": os.getloadavg(),
    }


def pairwise(ones: list[float], others: list[float]) -> list[float]:
    return [one / other for one, other in zip(ones, others, strict=True)]


def text_of(found: dict[str, Any]) -> str:
    """The medians, and each target: met or missed."""
    lines = [f"{name:<8} {rate:>8.0f} edits an hour" for name, rate in found["median"].items()]
    for name, (must, record) in TARGETS.items():
        ratio = found["ratios"][name]
        verdict = "record met" if ratio >= record else "met" if ratio >= must else "MISSED"
        lines.append(f"{name}: {ratio:.2f}x, must be {must}x, record {record}x: {verdict}")
    lines.append(f"the same by processor time: {found['ratios']['grouped_over_single_by_cpu_seconds']:.2f}x")
    return "\n".join([*lines, f"the ceiling of grouping {PROMPTS} prompts by forwards alone: {CEILING:.2f}x"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--size", help="HEIGHTxWIDTH; else 64x64")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sources", type=int, default=2)
    parser.add_argument("--edits", type=int, default=4, help="edit processes in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, one source, 4 steps, one edit process")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = arguments.sources = arguments.edits = 1
        arguments.steps = 4
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    import torch

    setting = {name: getattr(arguments, name) for name in ("model", "size", "frames", "steps", "sources", "edits")}
    found = {
        "setting": {**setting, "prompts": PROMPTS, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "machine": machine(),
        "ceiling": CEILING,
        "targets": TARGETS,
        **found,
    }
    print(text_of(found))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
