"""What is not ours stays: other programs' files in a cache's folder, and temporary files of programs that run."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlock_fast.batch.places import remove_litter
from kvlock_fast.cache import leases
from kvlock_fast.cache.root import CacheRoot
from kvlock_fast.cli import main
from kvlock_fast.errors import OutputError
from kvlock_fast.files import atomic_path, is_abandoned


def snapshot(folder):
    """Every file with its bytes, and every folder."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def fill(folder):
    """Files and folders of a user's in a folder that is named as the root of caches."""
    for name in ("empty", "aa", "0123456789abcdef0123456789abcdef", "project/src"):
        (folder / name).mkdir(parents=True)
    (folder / "project" / "manifest.json").write_text('{"name": "an extension", "version": 1}')
    (folder / "aa" / "manifest.json").write_bytes(b"")
    (folder / "thesis.txt").write_text("mine")
    (folder / "aa" / "data-old.bin").write_bytes(bytes(100))
    return snapshot(folder)


def entry(root, key, elements=10):
    with root.writer(key) as writer:
        writer.add_shard("s", {"x": torch.arange(elements)})
        writer.publish({"key": key})


def test_a_root_in_a_users_folder_touches_nothing_else(tmp_path):
    mine = fill(tmp_path)
    root = CacheRoot(tmp_path, quota_bytes=3000)
    entry(root, "k1", 100)
    with root.find("k1"):
        assert [slot.folder.name for slot in root.slots()] == ["k1"]
    with pytest.raises(OutputError, match="has no room"):  # others' bytes are not its to count or to free
        root.make_room(10**6)
    root.make_room(2500)
    CacheRoot(tmp_path).sweep()
    after = snapshot(tmp_path)
    assert {path: after.get(path, "gone") for path in mine} == mine
    assert not any(path.name == leases.TAG for path in after), "the folder is not ours to mark"


@pytest.mark.parametrize("more", [[], ["--all"], ["--quota", "0"]], ids=str)
def test_prune_removes_entries_only_and_says_what_it_left(tmp_path, capsys, more):
    mine = fill(tmp_path)
    entry(CacheRoot(tmp_path), "k1")
    assert main(["cache", "prune", str(tmp_path), *more]) == 0
    assert "left 5 other items in" in capsys.readouterr().out
    after = snapshot(tmp_path)
    assert {path: after.get(path, "gone") for path in mine} == mine
    assert (tmp_path / "k1").exists() == (not more)


def test_a_root_that_was_made_is_marked_and_kept_clean(tmp_path):
    root = CacheRoot(tmp_path / "new")
    assert (root.path / leases.TAG).exists()
    (root.path / "key").mkdir()  # as a program leaves it that was killed before its first write
    CacheRoot(root.path)
    assert not (root.path / "key").exists()


def test_a_root_of_version_0_1_may_be_a_users_folder(tmp_path):
    mine = fill(tmp_path)
    (tmp_path / leases.TAG).write_text(leases.TAG_OF_0_1)
    entry(CacheRoot(tmp_path), "k1")
    CacheRoot(tmp_path)
    after = snapshot(tmp_path)
    assert {path: after.get(path, "gone") for path in mine} == mine and leases.is_root(tmp_path)


def test_what_a_dead_writer_left_in_a_users_folder_goes(tmp_path):
    mine = fill(tmp_path)
    folder = tmp_path / "k1"
    folder.mkdir()
    dead = leases.owned_name("lease").replace(f".{os.getpid():x}.", ".3fffff.")
    (folder / dead).touch()
    CacheRoot(tmp_path)
    assert not folder.exists()
    after = snapshot(tmp_path)
    assert {path: after.get(path, "gone") for path in mine} == mine


NAMES = st.sampled_from(["data", "manifest.json", "data-1", "lease-x", "damaged-1.txt", "trash", "published", "x.json"])


@given(st.dictionaries(st.tuples(st.sampled_from(["a", "b", "k-1"]), NAMES), st.binary(max_size=20), max_size=6))
def test_no_folder_of_another_program_is_an_entry(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("root")
    for (sub, name), data in files.items():
        (folder / sub).mkdir(exist_ok=True)
        (folder / sub / name).write_bytes(data)
    (folder / "other").mkdir()
    before = snapshot(folder)
    root = CacheRoot(folder, quota_bytes=0)
    root.make_room(0)
    assert root.slots() == [] and snapshot(folder) == before


WRITER = """
import sys
from kvlock_fast.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print(temporary.name, flush=True)
    sys.stdin.read()
"""


def test_temporary_files_of_running_programs_stay(tmp_path):
    (tmp_path / "sub").mkdir()
    mine = tmp_path / "sub" / ".kvlock-notes"
    mine.write_text("a user's own")
    command = [sys.executable, "-c", WRITER, str(tmp_path / "sub" / "o.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        temporary = tmp_path / "sub" / other.stdout.readline().strip()
        assert remove_litter(tmp_path) == 0 and temporary.exists()
        other.kill()
        other.wait()
        assert is_abandoned(temporary) and remove_litter(tmp_path) == 1
    assert mine.exists() and not temporary.exists()


def test_names_of_version_0_1_go_after_a_day(tmp_path):
    old = tmp_path / ".kvlock-0123456789ab.mp4"
    old.write_bytes(b"x")
    assert not is_abandoned(old) and remove_litter(tmp_path) == 0
    os.utime(old, (0, 0))
    assert remove_litter(tmp_path) == 1 and not old.exists()


def test_a_temporary_file_is_ours_while_it_is_written(tmp_path):
    with atomic_path(tmp_path / "o.json") as temporary:
        assert not is_abandoned(temporary) and remove_litter(tmp_path) == 0
    assert (tmp_path / "o.json").exists()
