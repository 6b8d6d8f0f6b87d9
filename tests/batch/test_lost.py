"""A disk that is full, read-only or gone in the middle: the batch stops at once, and the same command goes on later."""

import errno
import shutil

import pytest

from kvlock_fast.batch import places
from kvlock_fast.batch.engine import LocalEngine
from kvlock_fast.batch.ledger import Ledger
from kvlock_fast.batch.manifest import read_manifest
from kvlock_fast.batch.places import Results
from kvlock_fast.batch.runner import Runner
from kvlock_fast.batch.worker import Worker
from kvlock_fast.errors import OutputError, OutputLost
from kvlock_fast.files import LOST, _refusal
from tests.support.batch_parts import StandIn, job, ledger_rows, run_batch, write_clips, write_manifest

JOBS = 12


@pytest.fixture
def manifest(tmp_path):
    write_clips(tmp_path)
    return write_manifest(tmp_path, [job(i, source=i % 2) for i in range(JOBS)])


def breaking(monkeypatch, number, happen):
    """The results' n-th file and all after it meet what `happen` does."""
    write, done = places.write_bytes, []

    def broken(path, data):
        done.append(path)
        if len(done) >= number:
            happen(path)
        return write(path, data)

    monkeypatch.setattr(places, "write_bytes", broken)
    return done


def run(manifest, folder, log):
    """A whole batch with one worker: the runner, and how many edits were made."""
    reading = read_manifest(manifest, folder, {})
    folder.mkdir(parents=True, exist_ok=True)
    with Ledger(folder) as ledger:
        results = Results(str(folder))
        ledger.take(reading.jobs, results.size)
        engine = LocalEngine(Worker(StandIn(log), manifest.parent, reports=False, command="test"))
        runner = Runner(ledger, engine, results, reading.jobs, 2)
        try:
            counts = runner.run()
        finally:
            engine.close()
    return runner, counts, len(log.read_text().splitlines()) if log.exists() else 0


def fails(code):
    def happen(path):
        raise _refusal(path, OSError(code, "broken"))

    return happen


@pytest.mark.parametrize("code", sorted(LOST), ids=errno.errorcode.get)
def test_a_disk_that_takes_nothing_more_stops_the_batch(manifest, tmp_path, monkeypatch, code):
    breaking(monkeypatch, 4, fails(code))
    runner, counts, edits = run(manifest, tmp_path / "out", tmp_path / "log")
    assert counts == {"done": 3, "pending": JOBS - 3, "running": 0, "failed": 0}
    assert "broken" in runner.fatal and edits < JOBS, "nothing is computed for a disk that takes nothing"
    monkeypatch.undo()
    assert run_batch(manifest, tmp_path / "out", most=2) == {"done": JOBS, "pending": 0, "running": 0, "failed": 0}
    assert {row["tries"] for row in ledger_rows(tmp_path / "out").values()} <= {1, 2}


def test_an_error_of_one_name_fails_that_job_alone(manifest, tmp_path, monkeypatch):
    written = []

    def happen(path):
        written.append(path)
        if len(written) == 1:
            raise _refusal(path, OSError(errno.EACCES, "not allowed"))

    breaking(monkeypatch, 4, happen)
    runner, counts, _ = run(manifest, tmp_path / "out", tmp_path / "log")
    assert runner.fatal is None and counts == {"done": JOBS - 1, "pending": 0, "running": 0, "failed": 1}


def test_a_removed_folder_is_noticed(manifest, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    done = breaking(monkeypatch, 4, lambda path: len(done) == 4 and shutil.rmtree(folder))
    runner, counts, _ = run(manifest, folder, tmp_path / "log")
    assert "was removed" in runner.fatal
    assert counts["done"] == 3 and counts["failed"] == 0
    monkeypatch.undo()
    assert run_batch(manifest, folder)["done"] == JOBS and (folder / "videos" / "j0.mkv").exists()


def test_no_room_to_encode_in_stops_too(manifest, tmp_path, monkeypatch):
    from kvlock_fast.batch import worker

    def full(*arguments, **more):
        raise OutputLost("cannot write '/tmp/x.mkv': No space left on device")

    monkeypatch.setattr(worker, "write_video", full)
    runner, counts, _ = run(manifest, tmp_path / "out", tmp_path / "log")
    assert runner.fatal == "cannot write '/tmp/x.mkv': No space left on device"
    assert counts == {"done": 0, "pending": JOBS, "running": 0, "failed": 0}


def test_a_disk_that_fills_while_a_video_is_encoded(manifest, tmp_path, monkeypatch):
    """As PyAV says it, and as the system does where not even a folder can be made."""
    import tempfile

    import av

    from kvlock_fast.media import video_out

    def full(*arguments):
        raise av.error.FFmpegError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(video_out, "_encode", full)
        runner, counts, _ = run(manifest, tmp_path / "out", tmp_path / "log")
    assert "No space left on device" in runner.fatal
    assert counts == {"done": 0, "pending": JOBS, "running": 0, "failed": 0}

    def nowhere(*arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", nowhere)
        runner, counts, _ = run(manifest, tmp_path / "out", tmp_path / "log")
    assert "No space left on device" in runner.fatal and counts["failed"] == 0


def test_a_folder_that_takes_no_file_of_any_name_stops_too(manifest, tmp_path, monkeypatch):
    """As where its rights changed, which says the same as one file that is protected."""
    breaking(monkeypatch, 4, fails(errno.EACCES))
    monkeypatch.setattr(places.Results, "check_takes_files", lambda self: fails(errno.EROFS)("out"))
    runner, counts, _ = run(manifest, tmp_path / "out", tmp_path / "log")
    assert "broken" in runner.fatal and counts == {"done": 3, "pending": JOBS - 3, "running": 0, "failed": 0}


def test_a_ledger_that_fails_ends_the_batch_in_one_sentence(manifest, tmp_path, monkeypatch):
    from kvlock_fast.batch.ledger import Ledger as Real

    begun = []

    def begin(self, work):
        begun.append(work)
        if len(begun) == 3:
            raise OutputLost("the ledger cannot be written: database or disk is full")
        return real(self, work)

    real = Real.begin
    monkeypatch.setattr(Real, "begin", begin)
    runner, counts, _ = run(manifest, tmp_path / "out", tmp_path / "log")
    assert runner.fatal == "the ledger cannot be written: database or disk is full" and counts["failed"] == 0
    assert counts["done"] + counts["pending"] == JOBS


def test_a_lost_place_is_an_output_error(tmp_path):
    assert issubclass(OutputLost, OutputError)
    results = Results(str(tmp_path / "r"))
    shutil.rmtree(tmp_path / "r")
    with pytest.raises(OutputLost, match="was removed"):
        results.write("a.mkv", b"x")
    assert not (tmp_path / "r").exists()
