"""VBench's scores of edited videos, by an environment of its own: what it needs does not go with what we need.

    python3.10 -m venv vbench-env && vbench-env/bin/pip install vbench        # once; it fetches weights as it runs
    python -m bench.quality.vbench --python vbench-env/bin/python --videos FOLDER --output vbench.json

FOLDER has a folder a row, with an .mp4 a case in each, as `python -m bench.quality --videos FOLDER` leaves them. The
bridge writes VBench's "custom input" run for each row as a process of that Python, and reads the results file that it
leaves: `<name>_eval_results.json`, an object of dimensions, each a list of the mean and the scores of the videos,
[0.93, [{"video_path": ..., "video_results": 0.95}, ...]] (shares of 100 in some versions are taken as they are).
Only dimensions that take any video are asked for.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.quality.summary import bootstrapped
from kvlock_fast.errors import InputError
from kvlock_fast.files import write_text

DIMENSIONS = (
    "subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality",
    "imaging_quality",
)  # fmt: skip
PROGRAM = """
import json, sys
import torch
from vbench import VBench
asked = json.loads(sys.argv[1])
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VBench(device, asked["info"], asked["output"]).evaluate(
    videos_path=asked["videos"], name=asked["name"], dimension_list=asked["dimensions"], local=False, read_frame=False,
    mode="custom_input")
"""
"""What the other Python runs; `info` is VBench's list of prompts, which custom input does not read."""


def score(python: str, videos: Path, dimensions: tuple[str, ...], timeout: float | None = None) -> dict[str, Any]:
    """By dimension: the mean over a folder's videos with its interval, and each video's score.

    Raises InputError where the other Python fails or leaves no results that can be read, and for a single video: some
    of VBench's means are over one less than all.
    """
    if len(list(videos.glob("*.mp4"))) < 2:
        raise InputError(f"'{videos}' has less than two videos, and VBench divides by one less")
    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder) / "info.json"
        info.write_text("[]")
        asked = {
            "videos": str(videos.resolve()), "name": "kvlock", "dimensions": list(dimensions), "output": folder,
            "info": str(info),
        }  # fmt: skip
        try:
            done = subprocess.run(
                [python, "-c", PROGRAM, json.dumps(asked)], capture_output=True, text=True, timeout=timeout, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"--python '{python}' cannot be run: {error}") from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise InputError(f"VBench failed on '{videos}' with status {done.returncode}: {last}")
        left = sorted(Path(folder).glob("*_eval_results.json"))
        if not left:
            raise InputError(f"VBench left no results of '{videos}'")
        return read_results(left[0], dimensions, videos)


def read_results(path: Path, dimensions: tuple[str, ...], videos: Path) -> dict[str, Any]:
    """VBench's results file, checked. Raises InputError naming the dimension that is not as it should be."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"VBench's results of '{videos}' are not valid JSON: {error}") from error
    scores = {}
    for dimension in dimensions:
        try:
            _, listed = found[dimension]
            each = {Path(one["video_path"]).stem: float(one["video_results"]) for one in listed}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"VBench's results of '{videos}' have no {dimension!r} that can be read") from error
        if not each or not all(math.isfinite(value) for value in each.values()):
            raise InputError(f"VBench's results of '{videos}' have {dimension!r} without finite scores")
        # A mean of our own: that of some versions weighs videos in other ways.
        scores[dimension] = {**bootstrapped(list(each.values())), "videos": each}
    return scores


def score_rows(python: str, folder: Path, dimensions: tuple[str, ...]) -> dict[str, Any]:
    """By row: `score` of each folder in `folder` that has videos."""
    if not folder.is_dir():
        raise InputError(f"--videos '{folder}' is not a folder")
    rows = sorted(place for place in folder.iterdir() if place.is_dir() and any(place.glob("*.mp4")))
    if not rows:
        raise InputError(f"--videos '{folder}' has no folder with .mp4 files in it")
    return {place.name: score(python, place, dimensions) for place in rows}


def table(rows: dict[str, Any]) -> str:
    """As Markdown: a line a row."""
    dimensions = list(next(iter(rows.values())))
    lines = [
        f"| row | {' | '.join(d.replace('_', ' ') for d in dimensions)} |",
        f"| --- |{' ---: |' * len(dimensions)}",
    ]
    for row, scores in rows.items():
        cells = [f"{s['mean']:.4f} ± {(s['high'] - s['low']) / 2:.4f}" for s in scores.values()]
        lines.append(f"| `{row}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 2 for bad input, with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the Python that has vbench")
    parser.add_argument("--videos", type=Path, required=True, help="a folder of rows, each a folder of videos")
    parser.add_argument("--dimensions", default=",".join(DIMENSIONS))
    parser.add_argument("--output", type=Path, default=Path("out/bench/vbench.json"))
    given = parser.parse_args(arguments)
    try:
        asked = tuple(given.dimensions.split(","))
        for name in asked:
            if name not in DIMENSIONS:
                raise InputError(f"--dimensions names {name!r}: one of {', '.join(DIMENSIONS)}")
        rows = score_rows(given.python, given.videos, asked)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(given.output, json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
