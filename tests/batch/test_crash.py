"""Batches that are killed: nothing lost, nothing doubled, nothing torn, the same frames as if nobody had."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvlock_fast.demo.world import sample_edit
from kvlock_fast.media import write_video
from tests.support.batch_parts import frame_hashes, ledger_rows, write_manifest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def killed(folder: Path, kills: int) -> None:
    request = json.dumps(["killed_batches", str(folder), kills])
    command = [sys.executable, "-m", "tests.support.batch_killed"]
    result = subprocess.run(command, input=request, capture_output=True, text=True, env=ENVIRONMENT)
    found = json.loads(result.stdout or "null")
    assert found is not None, result.stderr
    assert found.pop("kills") == kills and found.pop("batches") >= 1
    assert found == dict.fromkeys(found, 0), found


def test_kills_of_a_batch_without_a_model(tmp_path):
    killed(tmp_path, 30)


@pytest.mark.large
@pytest.mark.timeout(900)
def test_300_kills_of_a_batch_without_a_model(tmp_path):
    killed(tmp_path, 300)


def demo_manifest(folder: Path, jobs: int, per_source: int) -> Path:
    """Jobs for the bundled model on small clips of its world, in 2 steps."""
    lines = []
    for i in range(jobs):
        source = i // per_source
        if i % per_source == 0:
            case = sample_edit(2**31 + source, "recolour", frames=5, height=32, width=32)
            write_video(folder / f"s{source}.mkv", case.source.video, 8)
            np.save(folder / f"m{source}.npy", case.mask)
        line = {"id": f"j{i}", "source": f"s{source}.mkv", "mask": f"m{source}.npy", "steps": 2, "guidance": 3.0}
        lines.append(
            {**line, "source_prompt": case.source_prompt, "prompt": f"{case.prompt} {i}", "output": f"j{i}.mkv"}
        )
    return write_manifest(folder, lines)


def start(manifest: Path, folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "kvlock_fast.cli", "batch", str(manifest), "--output", str(folder), "--no-reports"]
    return subprocess.Popen(
        [*command, "--edits-per-pass", "4", *more],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def whole_program_kills(folder: Path, jobs: int, kills: int) -> None:
    """Kill the command again and again, wherever it is; each time it has got a little further."""
    manifest = demo_manifest(folder, jobs, 6)
    undisturbed = start(manifest, folder / "whole")
    _, errors = undisturbed.communicate()
    assert undisturbed.returncode == 0, errors
    whole, chance, made, share = frame_hashes(folder / "whole"), random.Random(0), 0, jobs / (kills + 1)
    while made < kills:
        process = start(manifest, folder / "out")
        # Not before it has begun to compute, or most kills would hit the imports; every fifth is one of those.
        while made % 5 and process.poll() is None and done_or_running(folder / "out") < min(jobs, share * made):
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 0.5))
        process.kill()
        process.communicate()
        made += process.returncode == -signal.SIGKILL
        for name, digest in frame_hashes(folder / "out").items():
            assert whole[name] == digest, name
        if process.returncode == 0:
            break
    last = start(manifest, folder / "out")
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    rows = ledger_rows(folder / "out")
    assert made == kills, f"the batch was over after {made} kills"
    assert len(rows) == jobs and {(row["state"], row["commits"]) for row in rows.values()} == {("done", 1)}
    assert frame_hashes(folder / "out") == whole
    assert not list((folder / "out").rglob(".kvlock-*"))
    assert sum(row["tries"] for row in rows.values()) > jobs  # some were hit while they ran


def done_or_running(folder: Path) -> int:
    """Jobs that are no longer pending, read beside the program that runs."""
    import sqlite3

    try:
        with sqlite3.connect(f"file:{folder / 'ledger.sqlite'}?mode=ro", uri=True) as db:
            return db.execute("SELECT COUNT(*) FROM jobs WHERE state != 'pending'").fetchone()[0]
    except sqlite3.Error:
        return 0


@pytest.mark.timeout(300)
def test_kills_of_the_whole_program(tmp_path):
    whole_program_kills(tmp_path, 8, 2)


@pytest.mark.large
@pytest.mark.timeout(1800)
def test_20_kills_of_the_whole_program_over_60_jobs(tmp_path):
    whole_program_kills(tmp_path, 60, 20)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.large), signal.SIGTERM])
def test_a_signal_stops_after_the_running_step(tmp_path, number):
    manifest = demo_manifest(tmp_path, 4, 4)
    process = start(manifest, tmp_path / "out")
    while process.poll() is None and not done_or_running(tmp_path / "out"):
        time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode in (128 + number, 0), errors
    assert "stopping after the running step" in errors and "Traceback" not in errors
    states = {row["state"] for row in ledger_rows(tmp_path / "out").values()}
    assert states <= {"pending", "done"}, errors
    if process.returncode:
        assert f"stopped by {number.name}" in errors and "0 of 4 jobs done" in output
