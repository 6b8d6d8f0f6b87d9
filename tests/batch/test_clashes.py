"""No output of a batch is an input, or another job's output: by whatever name it goes."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlock_fast.batch.clashes import enter_clashes
from kvlock_fast.batch.jobs import Job, Setup
from kvlock_fast.batch.ledger import Ledger
from kvlock_fast.batch.manifest import Reading, read_manifest
from kvlock_fast.batch.places import Results, held
from kvlock_fast.cli import main
from kvlock_fast.errors import InputError, InputWarning, OutputError
from tests.support.batch_parts import job, write_clips, write_manifest


def clashes(folder, jobs, results=None, own=()):
    """(line, sentence) of what is wrong; jobs: (source, mask, output) by line."""
    made = [Job(str(i), "b", out, Setup(src, mask, "a"), line=i) for i, (src, mask, out) in enumerate(jobs, start=1)]
    reading = Reading(folder / "m.jsonl", made)
    others = [("the manifest", folder / "m.jsonl")]
    enter_clashes(reading, folder, str(folder) if results is None else results, own, others)
    return [(line, sentence) for line, _, sentence in reading.problems]


BOX = "box:0,0,8,8"
TWICE = "is the same file as the output of line 1"
CASES = {
    "its own source": ([("a.mkv", BOX, "a.mkv")], 1, "is the source of line 1"),
    "another job's source": ([("a.mkv", BOX, "x.mkv"), ("b.mkv", BOX, "a.mkv")], 2, "is the source of line 1"),
    "a later job's source": ([("a.mkv", BOX, "b.mkv"), ("b.mkv", BOX, "x.mkv")], 1, "is the source of line 2"),
    "another job's mask": ([("a.mkv", "m.mkv", "x.mkv"), ("b.mkv", BOX, "m.mkv")], 2, "is the mask of line 1"),
    "a source by another name": (
        [("v/../a.mkv", BOX, "x.mkv"), ("b.mkv", BOX, "./a.mkv")],
        2,
        "is the source of line 1",
    ),
    "a source as a URL": ([("file://{}/a.mkv", BOX, "a.mkv")], 1, "is the source of line 1"),
    "a folder of images": ([("frames", BOX, "frames/b.png")], 1, "lies in the source of line 1"),
    "the same twice": (
        [("a.mkv", BOX, "x.mkv"), ("a.mkv", BOX, "./x.mkv")],
        2,
        "the same file as the output of line 1",
    ),
    "two slashes": (
        [("a.mkv", BOX, "v/x.mkv"), ("a.mkv", BOX, "v//x.mkv")],
        2,
        "the same file as the output of line 1",
    ),
    "by case": ([("a.mkv", BOX, "x.mkv"), ("a.mkv", BOX, "X.MKV")], 2, TWICE),
    "by composition": ([("a.mkv", BOX, "\u00e9.mkv"), ("a.mkv", BOX, "e\u0301.mkv")], 2, "the same file"),
    "below a file": ([("a.mkv", BOX, "v.mkv"), ("a.mkv", BOX, "v.mkv/b.mkv")], 2, "lies below the output of line 1"),
    "above a file": ([("a.mkv", BOX, "v.mkv/b.mkv"), ("a.mkv", BOX, "v.mkv")], 2, "a folder of the output of line 1"),
}


@pytest.mark.parametrize(("jobs", "line", "said"), CASES.values(), ids=CASES)
def test_a_clash_is_said_at_its_line(tmp_path, jobs, line, said):
    jobs = [(source.format(tmp_path), mask, output) for source, mask, output in jobs]
    ((found, sentence),) = clashes(tmp_path, jobs)
    assert found == line and said in sentence and sentence.endswith("nothing is overwritten")


def test_through_a_link(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mkv").write_bytes(b"x")
    (tmp_path / "here").symlink_to("clips")
    (tmp_path / "b.mkv").symlink_to("clips/a.mkv")
    assert clashes(tmp_path, [("clips/a.mkv", BOX, "here/a.mkv")])[0][0] == 1
    assert clashes(tmp_path, [("b.mkv", BOX, "here/a.mkv")])[0][0] == 1


def test_what_does_not_clash(tmp_path):
    jobs = [("a.mkv", BOX, "x.mkv"), ("a.mkv", "m.png", "y/x.mkv"), ("frames", BOX, "frames/out/x.mkv")]
    jobs += [("frames", BOX, "frames/y.mkv"), ("a.mkv", BOX, "Ma\u00dfe.mkv"), ("a.mkv", BOX, "Masse.mkv")]
    assert clashes(tmp_path, jobs) == []
    assert clashes(tmp_path, [("a.mkv", BOX, "a.mkv")], results=str(tmp_path / "out")) == []
    assert clashes(tmp_path, [("a.mkv", BOX, "a.mkv")], results="memory://bucket/run") == []
    assert clashes(tmp_path, [("memory://a.mkv", BOX, "a.mkv")]) == []


def test_outputs_of_a_url_clash_too(tmp_path):
    jobs = [("a.mkv", BOX, "x.mkv"), ("a.mkv", BOX, "./x.mkv")]
    assert clashes(tmp_path, jobs, results="memory://bucket/run")[0][0] == 2


@pytest.mark.parametrize(
    ("source", "results", "output"),
    [
        ("s3://b/a.mkv", "s3://b", "a.mkv"),
        ("s3://b/v/a.mkv", "s3://b/", "v//a.mkv"),
        ("s3://b/v/%61.mkv", "s3://b/v", "a.mkv"),
        ("{}/a.mkv", "local://{}", "a.mkv"),
        ("local://{}/a.mkv", "{}", "a.mkv"),
        ("file://{}/a.mkv", "file://{}", "a.mkv"),
    ],
)
def test_a_source_at_a_url_is_compared_too(tmp_path, source, results, output):
    source, results = source.format(tmp_path), results.format(tmp_path)
    assert clashes(tmp_path, [(source, BOX, output)], results=results)[0][0] == 1
    assert clashes(tmp_path, [(source, BOX, "b.mkv")], results=results) == []


def test_files_of_the_batch_itself_are_compared_too(tmp_path):
    for name in ("a.mkv", "m.jsonl"):
        with pytest.raises(InputError, match=f"--json .*{name}' is the .*: nothing is overwritten"):
            clashes(tmp_path, [("a.mkv", BOX, "x.mkv")], own=[("--json", tmp_path / name)])
    found = clashes(tmp_path, [("reports/1.html", BOX, "x.mkv")])
    assert found[0][0] == 1 and "has its report where the source of line 1 is" in found[0][1]


NAMES = st.lists(st.sampled_from(["a", "b", "A", ".", "v", "v.mkv"]), min_size=1, max_size=3).map("/".join)


@given(st.lists(st.tuples(NAMES, NAMES.filter(lambda name: os.path.normpath(name) != ".")), min_size=1, max_size=5))
def test_an_outside_count_finds_the_same(tmp_path_factory, pairs):
    """By brute force over all pairs of files, as a file system has them that takes no notice of case."""
    folder = tmp_path_factory.getbasetemp() / "none"

    def place(name):
        return Path(os.path.normpath(folder / name).casefold())

    jobs = [(source, BOX, output) for source, output in pairs]
    inputs = {place(source) for source, _, _ in jobs} | {place("m.jsonl")}
    wrong, outputs = set(), []
    for line, (_, _, output) in enumerate(jobs, start=1):
        own = place(output)
        among = any(own.is_relative_to(other) or other.is_relative_to(own) for other in outputs)
        if own in inputs or among:
            wrong.add(line)
        else:
            outputs.append(own)
    assert {line for line, _ in clashes(folder, jobs)} == wrong


def test_check_and_run_refuse_and_the_source_stays(tmp_path, capsys):
    """The attack: a folder of clips that is the output's too, and a name that is a clip's."""
    job = {"mask": BOX, "source_prompt": "a", "prompt": "b", "model": "demo"}
    (tmp_path / "s1.mkv").write_bytes(b"one")
    (tmp_path / "s2.mkv").write_bytes(b"two")
    lines = [{**job, "id": "1", "source": "s1.mkv", "output": "s2.mkv"}, {**job, "id": "2", "source": "s2.mkv"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for more in (["--check"], []):
        assert main(["batch", str(tmp_path / "m.jsonl"), "--output", str(tmp_path), *more]) == 2
        assert (
            "line 1: output: is the source of line 2, got 's2.mkv': nothing is overwritten" in capsys.readouterr().err
        )
    assert (tmp_path / "s2.mkv").read_bytes() == b"two"


HOLD = """
import sys
from dataclasses import replace
from pathlib import Path
from kvlock_fast.batch.places import held
lock = held(Path(sys.argv[1]), "held")
print("held", flush=True)
sys.stdin.read()
"""


def test_outputs_that_are_no_files_are_said_and_no_more(tmp_path, capsys):
    job = {"id": "1", "source": "s.mkv", "mask": BOX, "source_prompt": "a", "prompt": "b"}
    (tmp_path / "s.mkv").write_bytes(b"one")
    for output in (".", "./", "a/..", "/", "..", ""):
        (tmp_path / "m.jsonl").write_text(json.dumps({**job, "output": output}))
        for more in (["--check"], []):
            assert main(["batch", str(tmp_path / "m.jsonl"), "--output", str(tmp_path / "out"), *more]) == 2
            assert "line 1: output: " in capsys.readouterr().err


def test_a_file_that_no_batch_made_is_replaced_only_if_asked(tmp_path):
    write_clips(tmp_path)
    manifest, folder = write_manifest(tmp_path, [job(0), job(1)]), tmp_path / "out"
    (folder / "videos").mkdir(parents=True)
    (folder / "videos" / "j1.mkv").write_text("mine")
    jobs = read_manifest(manifest, folder, {}).jobs
    with Ledger(folder) as ledger:
        with pytest.raises(InputError, match=r"'videos/j1.mkv' would replace a file that no batch here made"):
            ledger.take(jobs, Results(str(folder)).size, overwrite=False)
        assert ledger.rows() == []
        assert ledger.take(jobs, Results(str(folder)).size, overwrite=True).new == 2
        again = ledger.take(jobs, Results(str(folder)).size, overwrite=False)
        assert (again.new, again.changed) == (0, 0), "a job that is known may find what it left"
        other = [replace(jobs[0], output="videos/j1.mkv")]
        with pytest.raises(InputError, match="no batch here made"):
            ledger.take(other, Results(str(folder)).size, overwrite=False)


def test_two_batches_on_one_results_folder_refuse(tmp_path, capsys):
    results = tmp_path / "results"
    results.mkdir()
    (tmp_path / "s.mkv").write_bytes(b"one")
    job = {"id": "1", "source": "s.mkv", "mask": BOX, "source_prompt": "a", "prompt": "b"}
    (tmp_path / "m.jsonl").write_text(json.dumps(job))
    command = [sys.executable, "-c", HOLD, str(results)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        arguments = ["batch", str(tmp_path / "m.jsonl"), "--output", str(tmp_path / "out"), "--results", str(results)]
        assert main(arguments) == 2
        assert "another batch has its results in" in capsys.readouterr().err
        other.stdin.close()


def test_the_lock_of_a_results_folder_is_given_back(tmp_path):
    """A batch that has ended holds nothing, in the same process too."""
    first = held(tmp_path, "another batch")
    with pytest.raises(InputError, match="another batch"):
        held(tmp_path, "another batch")
    first.release()
    held(tmp_path, "another batch").release()
    write_clips(tmp_path, 1)
    manifest, results = write_manifest(tmp_path, [job(0)]), tmp_path / "results"
    results.mkdir()
    assert main(["batch", str(manifest), "--output", str(tmp_path / "o"), "--results", str(results), "--quiet"]) == 0
    held(results, "another batch").release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EACCES, errno.ELOOP])
def test_a_folder_without_file_locks_is_warned_of_and_one_that_refuses_is_an_error(tmp_path, monkeypatch, number):
    def acquire(self):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("kvlock_fast.batch.places.FileLock.acquire", acquire)
    if number in (errno.ENOLCK, errno.ENOSYS):
        with pytest.warns(InputWarning, match="has no file locks"):
            held(tmp_path, "another batch").release()
    else:
        with pytest.raises(OutputError, match="cannot lock"):
            held(tmp_path, "another batch")
