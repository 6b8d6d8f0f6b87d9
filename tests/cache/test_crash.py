"""The cache's files when processes are killed while they write, and when many use one entry at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvlock_fast.cache.leases import owner_lives
from kvlock_fast.cache.root import CacheRoot

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@pytest.fixture(scope="module")
def run():
    """To call a function of cache_writers in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.cache_writers"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def call(name: str, folder: Path, *arguments: object):
            print(json.dumps([name, str(folder), *arguments]), file=process.stdin, flush=True)
            found = json.loads(process.stdout.readline())
            assert found is not None, "it failed; see stderr"
            return found

        yield call


@pytest.fixture
def times(request) -> int:
    """How many times the quick number of rounds."""
    return 10 if request.config.getoption("--all") else 1


def test_a_write_killed_before_each_of_its_operations_leaves_the_old_or_the_new_entry(run, tmp_path, times):
    found = run("killed_at_every_operation", tmp_path / "root", 1 if times > 1 else 4)
    assert found["torn"] == found["litter"] == 0, found
    assert found["rounds"] > 10 and 2 < found["new"] < found["rounds"] - 5, found


def test_writes_killed_at_any_time_leave_the_old_or_the_new_entry(run, tmp_path, times):
    found = run("killed_at_any_time", tmp_path / "root", 10 * times)
    assert found["rounds"] >= 10 * times and found["torn"] == found["litter"] == 0 and found["new"] > 0, found


def test_many_processes_on_one_key_read_nothing_corrupt(run, tmp_path, request):
    processes, rounds = (16, 50) if request.config.getoption("--all") else (4, 10)
    found = run("mixed", tmp_path / "root", processes, rounds)
    assert found["rounds"] == processes and found["failed"] == found["corrupt"] == found["litter"] == 0, found
    assert found["reads"] > processes and found["writes"] > processes, found


def test_what_is_read_is_not_evicted(run, tmp_path, times):
    found = run("evicted_while_read", tmp_path / "root", 10 * times)
    assert found["rounds"] == 10 * times and found["evicted"] == 0, found


def test_a_file_that_cannot_grow_is_one_sentence_and_leaves_nothing(run, tmp_path):
    folder = tmp_path / "entry"
    found = run("limited", folder)
    assert found["message"] == f"cannot write the cache '{folder}': {found['expected']}" and not found["exists"]


def test_what_a_dead_process_left_goes_at_the_next_start(run, tmp_path):
    kinds = ("data", "manifest", "lease", "evict", "trash")
    names = run("leave", tmp_path / "key", *kinds)
    assert [name.split("-")[0] for name in names] == list(kinds)
    assert not any(owner_lives(tmp_path / "key" / name) for name in names)
    (tmp_path / "key" / names[0] / "a.safetensors").write_bytes(b"half")
    CacheRoot(tmp_path)
    assert not (tmp_path / "key").exists()
