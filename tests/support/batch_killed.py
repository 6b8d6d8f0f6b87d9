"""Batches that are killed at it: a program of its own, because it forks; the suite's process has threads.

It reads lines of JSON, [function, folder, arguments ...], and answers each with a line: what the function found.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.support import batch_parts
from tests.support.batch_parts import StandIn, frame_hashes, job, ledger_rows, write_clips, write_manifest
from tests.support.forks import FILES, die_at_operation, forked

JOBS, SOURCES = 24, 3
WATCHED = (*FILES, "sqlite3.connect")


def manifest_of(folder: Path) -> Path:
    """Jobs on three sources with two seeds each, and a prompt that always fails."""
    write_clips(folder, SOURCES)
    lines = [job(i, source=i % SOURCES, seed=i % 2) for i in range(JOBS)]
    lines[7]["prompt"] = "nan"
    return write_manifest(folder, lines)


def run(manifest: Path, folder: Path) -> None:
    batch_parts.run_batch(manifest, folder, lambda: StandIn(folder.parent / "log", seconds=0.002))


def killed_batches(path: Path, kills: int) -> dict:
    """One batch after the other, killed at any time or before any operation on files, until so many kills are made.

    After each kill: what is there under a final name is whole, what the ledger calls done is there. At the end of each
    batch: every job once in the ledger, the frames those of a batch that nobody disturbed.
    """
    manifest = manifest_of(path)
    finish(manifest, path / "whole")
    whole = frame_hashes(path / "whole")
    found = {"kills": 0, "batches": 0, "lost": 0, "doubled": 0, "torn": 0, "different": 0, "litter": 0}
    chance = random.Random(1)
    while found["kills"] < kills:
        folder = path / f"out-{found['batches']}"
        for turn in range(10**6):
            if found["kills"] >= kills or not interrupted(manifest, folder, chance, turn):
                break
            found["kills"] += 1
            found["torn"] += torn(folder)
        finish(manifest, folder)
        found["batches"] += 1
        rows, after = ledger_rows(folder), frame_hashes(folder)
        states = [row["state"] for row in rows.values()]
        found["lost"] += JOBS - states.count("done") - 1 + (rows["j7"]["state"] != "failed")
        found["doubled"] += sum(row["commits"] > 1 for row in rows.values()) + len(rows) - JOBS
        found["different"] += sum(after.get(name) != digest for name, digest in whole.items()) + len(after) - len(whole)
        found["litter"] += len(list(folder.rglob(".kvlock-*")))
    return found


def interrupted(manifest: Path, folder: Path, chance: random.Random, turn: int) -> bool:
    """Start the batch and kill it; False if it was over before."""

    def work():
        if turn % 2:
            die_at_operation(chance.randint(1, 60), WATCHED)
        run(manifest, folder)

    pid = forked(work)
    chance.random()  # the child has drawn from a copy
    if turn % 2 == 0:
        time.sleep(chance.uniform(0.0, 0.25))
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def torn(folder: Path) -> int:
    """Videos that cannot be decoded whole, and jobs that are done without their video."""
    if not (folder / "ledger.sqlite").exists():
        return 0
    done = {id: row["bytes"] for id, row in ledger_rows(folder).items() if row["state"] == "done"}
    missing = 0
    for id, size in done.items():
        path = folder / f"videos/{id}.mkv"
        missing += not path.exists() or path.stat().st_size != size
    frame_hashes(folder)  # raises for one that is not whole
    return missing


def finish(manifest: Path, folder: Path) -> None:
    assert os.waitpid(forked(lambda: run(manifest, folder)), 0)[1] == 0


def answer(name: str, folder: str, *arguments: object) -> str:
    """What a function found, as JSON; "null" if it failed. It ran in a process that has ended."""
    reader, writer = os.pipe()

    def work():
        os.write(writer, json.dumps(globals()[name](Path(folder), *arguments)).encode())

    failed = os.waitpid(forked(work), 0)[1] != 0
    os.close(writer)
    with os.fdopen(reader) as file:
        return "null" if failed else file.read()


if __name__ == "__main__":
    for line in sys.stdin:
        print(answer(*json.loads(line)), flush=True)
