"""A batch on a Ray cluster of this machine: actors that are killed, a job that kills them, each job once."""

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from tests.support.batch_parts import StandIn, frame_hashes, job, ledger_rows, run_batch, write_clips, write_manifest

pytest.importorskip("ray")

from kvlock_fast.batch.ledger import Ledger
from kvlock_fast.batch.manifest import read_manifest
from kvlock_fast.batch.places import Results
from kvlock_fast.batch.ray_engine import RayEngine
from kvlock_fast.batch.runner import Runner
from kvlock_fast.cli import main
from kvlock_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quiet_cluster(monkeypatch):
    """Workers find this checkout and the tests, and send nothing about their use to anyone."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_DISABLE_MEMORY_MONITOR", "1")
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])


class Killer:
    """Kills the process of an actor that has a pass nobody was killed with before."""

    def __init__(self, engine: RayEngine, kills: int):
        self.engine, self.left, self.pids, self.hit = engine, kills, [], set()
        self.chance = random.Random(0)

    def __call__(self, state) -> None:
        for name, (_, pid) in self.places().items():
            at_work = {work.id for actor, work in self.engine._passes.values() if actor == name}
            if self.left and at_work and not at_work & self.hit and pid not in self.pids:
                if self.chance.random() < 0.5:
                    continue
                os.kill(pid, signal.SIGKILL)
                self.pids.append(pid)
                self.hit |= at_work
                self.left -= 1

    def places(self) -> dict:
        """Machine and process of each actor that is ready."""
        try:
            actors = self.engine._actors.items()
            return {name: self.engine.ray.get(actor.where.remote()) for name, actor in actors}
        except self.engine.ray.exceptions.RayError:  # one has just died
            return {}


def run_on_ray(manifest: Path, folder: Path, most: int, kills: int = 0, seconds: float = 0.1) -> tuple[dict, Killer]:
    reading = read_manifest(manifest, folder, {})
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.parent / "log"
    with Ledger(folder) as ledger:
        results = Results(str(folder))
        ledger.take(reading.jobs, results.size)
        engine = RayEngine(StandIn(log, seconds), manifest.parent, False, "test", workers=2)
        try:
            killer = Killer(engine, kills)
            counts = Runner(ledger, engine, results, reading.jobs, most, watch=killer).run()
        finally:
            engine.close()
    return counts, killer


def batch_with_kills(folder: Path, jobs: int, kills: int) -> None:
    """Every job once in the ledger, with the frames of a batch in one process; the poison job set aside."""
    write_clips(folder, 3)
    lines = [job(i, source=i % 3, seed=i % 5) for i in range(jobs)]
    manifest = write_manifest(folder, lines)
    run_batch(manifest, folder / "whole", most=2)
    poison = {**job(jobs, source=1, prompt="poison", seed=77), "mask": "box:0,0,4,4"}
    manifest = write_manifest(folder, [*lines[: jobs // 2], poison, *lines[jobs // 2 :]])
    counts, killer = run_on_ray(manifest, folder / "out", most=2, kills=kills)
    rows = ledger_rows(folder / "out")
    assert len(killer.pids) == len(set(killer.pids)) == kills
    assert not any(Path(f"/proc/{pid}").exists() for pid in killer.pids)
    assert counts == {"pending": 0, "running": 0, "done": jobs, "failed": 1}
    assert len(rows) == jobs + 1
    bad = rows.pop(f"j{jobs}")
    assert (bad["state"], bad["tries"], bad["commits"]) == ("failed", 3, 0) and "set aside" in bad["error"]
    assert {(row["state"], row["commits"]) for row in rows.values()} == {("done", 1)}
    assert frame_hashes(folder / "out") == frame_hashes(folder / "whole")
    assert sum(row["tries"] for row in rows.values()) > jobs


@pytest.mark.timeout(300)
def test_actors_that_are_killed_and_a_job_that_kills_them(tmp_path):
    batch_with_kills(tmp_path, 12, 2)


@pytest.mark.large
@pytest.mark.timeout(900)
def test_ten_kills_of_two_actors_over_60_jobs(tmp_path):
    batch_with_kills(tmp_path, 60, 10)


@pytest.mark.timeout(300)
def test_failures_on_ray_are_those_of_one_process(tmp_path):
    write_clips(tmp_path, 2)
    lines = [job(i, source=i % 2) for i in range(8)]
    lines[3]["prompt"], lines[4]["prompt"] = "nan", "crash"
    manifest = write_manifest(tmp_path, lines)
    here = run_batch(manifest, tmp_path / "here", most=4)
    there, _ = run_on_ray(manifest, tmp_path / "there", most=4, seconds=0)
    assert here == there == {"pending": 0, "running": 0, "done": 6, "failed": 2}
    assert frame_hashes(tmp_path / "here") == frame_hashes(tmp_path / "there")
    errors = [{id: row["error"] for id, row in ledger_rows(tmp_path / name).items()} for name in ("here", "there")]
    assert errors[0] == errors[1]
    # A source went to one actor: two passes of each were read by the one that held it.
    edits = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {edit["source"] for edit in edits} == {"s0.mkv", "s1.mkv"}


@pytest.mark.timeout(300)
def test_the_command_on_ray(tmp_path, capsys):
    from tests.support.tiny import tiny_wan

    write_clips(tmp_path, 2)
    tiny_wan().save_pretrained(tmp_path / "model")
    lines = [job(i, source=i % 2, steps=2, size="32x48", model=str(tmp_path / "model")) for i in range(4)]
    manifest = write_manifest(tmp_path, lines)
    assert main(["batch", str(manifest), "--output", str(tmp_path / "here"), "--quiet"]) == 0
    more = ["--engine", "ray", "--workers", "1", "--cpus-per-worker", "1"]
    assert main(["batch", str(manifest), "--output", str(tmp_path / "there"), *more]) == 0, capsys.readouterr().err
    assert frame_hashes(tmp_path / "here") == frame_hashes(tmp_path / "there")
    assert len(list((tmp_path / "there/reports").iterdir())) == 4


@pytest.mark.timeout(300)
def test_workers_that_cannot_start_end_the_batch(monkeypatch):
    from kvlock_fast.batch import ray_engine

    class Broken(ray_engine.RayWorker):
        def __init__(self, *arguments):
            raise ModuleNotFoundError("No module named 'kvlock_fast'")

    monkeypatch.setattr(ray_engine, "RayWorker", Broken)
    engine = RayEngine(StandIn(), Path(), False, "test", workers=1)
    try:
        with pytest.raises(InputError, match="no worker can be started on the Ray cluster"):
            for _ in range(600):
                engine.wait(0.1)
    finally:
        engine.close()


@pytest.mark.timeout(280)
def test_an_address_that_is_no_cluster_is_one_sentence():
    for address in ("nonsense", "127.0.0.1:1", "127.0.0.1:99999", "ray://127.0.0.1:1", "auto"):
        with pytest.raises(InputError, match=f"--address.*{address}"):
            RayEngine(StandIn(), Path(), False, "test", address=address)
