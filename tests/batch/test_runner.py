"""A batch with an editor that needs no model: every job once, failures apart, resumed where it was stopped."""

import gc
import itertools
import json
import sqlite3
import threading

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kvlock_fast.batch.editor import DeviceLost
from kvlock_fast.batch.engine import Crashed
from kvlock_fast.batch.fields import JobFields
from kvlock_fast.batch.jobs import Decision, Job, Pass, Setup, Waiting, grouped
from kvlock_fast.batch.ledger import Ledger
from kvlock_fast.batch.manifest import read_manifest
from kvlock_fast.batch.places import Results
from kvlock_fast.batch.runner import Runner
from kvlock_fast.batch.worker import Outcome
from kvlock_fast.errors import InputError, InputWarning, OutputError
from kvlock_fast.media import grow_mask, read_video
from tests.support.batch_parts import StandIn, frame_hashes, job, ledger_rows, run_batch, write_clips, write_manifest
from tests.support.clipmaker import encode_with_tone

setups = st.builds(
    Setup,
    source=st.sampled_from("ab"),
    mask=st.just("m"),
    source_prompt=st.just("p"),
    model=st.sampled_from(["demo", "other"]),
    seed=st.integers(0, 1),
    size=st.sampled_from([None, (32, 48)]),
)


@given(st.lists(setups, max_size=30), st.integers(1, 5))
def test_every_job_is_in_one_group_of_its_own_kind(found, most):
    jobs = [Job(f"j{i}", "p", f"j{i}.mkv", setup) for i, setup in enumerate(found)]
    groups = list(grouped(jobs, most))
    assert sorted(job.id for group in groups for job in group) == sorted(job.id for job in jobs)
    assert all(len({job.setup for job in group}) == 1 and 1 <= len(group) <= most for group in groups)
    for setup in set(found):  # as few groups as there can be, in the manifest's order
        of = [group for group in groups if group[0].setup == setup]
        assert len(of) == -(-found.count(setup) // most)
        assert [job for group in of for job in group] == [job for job in jobs if job.setup == setup]


OTHER = {
    "source": "s1.mkv", "mask": "box:1,1,4,4", "source_prompt": "a disc", "negative_prompt": "red", "model": "other",
    "steps": 9, "guidance": 2.0, "guidance_2": 3.0, "seed": 1, "size": "32x48", "max_frames": 2,
    "frames_policy": "trim", "clip_frames": 9, "preset": "paper", "alpha": 1.0, "omega": "constant", "s_star": False,
    "s_star_region": "foreground", "tau": 0.5, "b": 3.0, "variance_window": 4, "kappa": 3, "warmup_alpha": 0.5,
    "alpha_floor": 0.1, "omega_floor": 0.5, "detection": "global", "layers": [0], "background_latents": "model",
    "source_path": "invert", "inversion_solver": "heun", "zero_init_share": 0.1, "guidance_batching": "separate",
    "compute": "foreground", "alpha_snap": 0.9, "alpha_lag": 2, "halo": 1, "seam": "blend", "mask_threshold": 0.25,
    "mask_invert": True, "mask_grow": 1, "mask_feather": 1, "cache_tier": "host", "cache_format": "int8",
    "cache_stride": 2, "cache_steps": "dynamic", "prompts_at_once": 1, "method": "fatezero", "family": "wan",
    "skip_share": 0.1, "source_guidance": 2.0, "lock_interval": [0.0, 0.5], "foreground_mix": 0.1,
    "latents_shift": 0.25,
    "edit_path": "coupled", "source_noise": 3, "min_predictions": 4, "reduction": "mean",
    "guidance_interval": [0.0, 0.5], "guidance_skip": False,
    "noise_samples": 2, "free_share": 0.1, "inject_share": 0.5, "keyframe_stride": 3, "edit_strength": 2.0,
    "apg_momentum": 0.2, "apg_parallel": 0.5, "apg_norm": 1.0, "background_bias": 1.0,
}  # fmt: skip
BOTH = {
    "method": {"preset": "tokenflow"}, "source_guidance": {"source_path": "invert"},
    "source_noise": {"edit_path": "coupled"}, "latents_shift": {"edit_path": "free"},
    "background_bias": {"preset": "kv-edit", "background_bias": 0.0},
}  # fmt: skip
"""What both jobs need for a value to be allowed."""
SHARED = {
    "prompt": "another",
    "composite": False,
    "feather": 2,
    "paste": "hard",
    "audio": False,
    "output": "elsewhere.mp4",
}


def test_every_field_is_known_to_separate_passes_or_not_to():
    assert set(OTHER) | set(SHARED) | {"id", "clip_overlap"} == set(JobFields.model_fields)


@pytest.mark.parametrize("name", [*OTHER, *SHARED])
def test_what_changes_the_computation_separates_passes_and_what_follows_it_does_not(tmp_path, name):
    both = BOTH.get(name, {})
    lines = [job(0, **both), {**job(1, **both), name: {**OTHER, **SHARED}[name]}]
    reading = read_manifest(write_manifest(tmp_path, lines), tmp_path / "out", {})
    assert not reading.sentences()
    assert len(list(grouped(reading.jobs, 8))) == (1 if name in SHARED else 2)


def test_overlaps_of_a_window_separate_passes(tmp_path):
    lines = [job(i, clip_frames=9, clip_overlap=3 + i) for i in range(2)]
    assert len(list(grouped(read_manifest(write_manifest(tmp_path, lines), tmp_path, {}).jobs, 8))) == 2


@given(st.lists(setups, min_size=1, max_size=20))
def test_a_model_is_loaded_once_and_a_source_read_once(tmp_path_factory, found):
    folder = tmp_path_factory.mktemp("ledger")
    jobs = [Job(f"j{i}", "p", f"j{i}.mkv", setup) for i, setup in enumerate(found)]
    with Ledger(folder) as ledger:
        ledger.take(jobs, lambda name: None)
        passes = ledger.passes([job.id for job in jobs], 3)
    assert sorted(job.id for work in passes for job in work.jobs) == sorted(job.id for job in jobs)
    for key in (lambda setup: setup.model, lambda setup: (setup.model, setup.source)):
        runs = [key(work.setup) for work in passes]
        changes = sum(a != b for a, b in itertools.pairwise(runs))
        assert changes == len(set(runs)) - 1


@given(st.integers(1, 12), st.integers(1, 5), st.data())
def test_rows_are_whole_batches_that_lack_a_result(count, at_once, data):
    setup = Setup("s", "m", "p")
    jobs = [Job(f"j{i}", f"p{i}", f"j{i}.mkv", setup) for i in range(count)]
    missing = data.draw(st.sets(st.sampled_from([job.id for job in jobs]), min_size=1))
    holes = data.draw(st.sets(st.sampled_from([job.id for job in jobs])) if count > 1 else st.just(set())) - missing
    work = Pass(1, tuple(None if job.id in holes else job for job in jobs), frozenset(missing))
    rows = work.rows(at_once)
    expected = [jobs[i : i + at_once] for i in range(0, count, at_once)]
    expected = [batch for batch in expected if missing & {job.id for job in batch}]
    assert len(rows) == sum(map(len, expected))
    for place, job_there in enumerate(j for batch in expected for j in batch):
        assert rows[place] == (work.jobs[0] if job_there.id in holes else job_there)


@pytest.fixture
def folder(tmp_path):
    write_clips(tmp_path)
    return tmp_path


def lines_of(count: int, **more) -> list[dict]:
    return [job(i, source=i % 2, **more) for i in range(count)]


def test_a_whole_batch(folder):
    log = folder / "log"
    manifest = write_manifest(folder, lines_of(10))
    counts = run_batch(manifest, folder / "out", lambda: StandIn(log))
    assert counts == {"pending": 0, "running": 0, "done": 10, "failed": 0}
    rows = ledger_rows(folder / "out")
    for id, row in rows.items():
        path = folder / "out" / "videos" / f"{id}.mkv"
        assert (row["state"], row["tries"], row["commits"], row["bytes"]) == ("done", 1, 1, path.stat().st_size)
        assert 0 < json.loads(row["metrics"])["background_psnr"] < 20 and row["seconds"] > 0
        assert read_video(path).frames.shape == (3, 16, 16, 3)
    edits = [json.loads(line) for line in log.read_text().splitlines()]
    # Five jobs a source, at most four a pass, three prompts at once by the planner.
    assert sorted(len(edit["prompts"]) for edit in edits) == [1, 1, 4, 4]
    assert sorted(p for edit in edits for p in edit["prompts"]) == sorted(f"prompt {i}" for i in range(10))
    assert len(set(frame_hashes(folder / "out").values())) == 10
    # The same again has nothing to do.
    run_batch(manifest, folder / "out", lambda: StandIn(log))
    assert len(log.read_text().splitlines()) == 4


def test_only_what_is_missing_is_done_and_the_frames_are_the_same(folder):
    manifest = write_manifest(folder, lines_of(10))
    run_batch(manifest, folder / "whole")
    run_batch(manifest, folder / "out")
    before = {p.name: p.stat().st_mtime_ns for p in (folder / "out/videos").iterdir()}
    (folder / "out/videos/j4.mkv").unlink()
    (folder / "out/videos/j1.mkv").write_bytes(b"torn")
    log = folder / "log"
    run_batch(manifest, folder / "out", lambda: StandIn(log, at_once=1))  # the ledger's word counts, not today's
    assert frame_hashes(folder / "out") == frame_hashes(folder / "whole")
    after = {p.name: p.stat().st_mtime_ns for p in (folder / "out/videos").iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"j4.mkv", "j1.mkv"}
    edits = [json.loads(line)["prompts"] for line in log.read_text().splitlines()]
    # j0 j2 j4 | j6 and j1 j3 j5 | j7: of each the first batch, whole.
    assert sorted(edits) == [["prompt 0", "prompt 2", "prompt 4"], ["prompt 1", "prompt 3", "prompt 5"]]


def test_a_job_that_reads_otherwise_is_done_again_and_its_neighbours_are_not(folder):
    lines = lines_of(6)
    run_batch(write_manifest(folder, lines), folder / "out")
    before = frame_hashes(folder / "out")
    lines[2]["prompt"] = "another"
    run_batch(write_manifest(folder, lines), folder / "out")
    after = frame_hashes(folder / "out")
    assert {name for name in after if after[name] != before[name]} == {"videos/j2.mkv"}
    assert {id: row["commits"] for id, row in ledger_rows(folder / "out").items()} == {
        f"j{i}": 1 + (i == 2) for i in range(6)
    }


def test_jobs_can_be_added(folder):
    lines = lines_of(8)
    run_batch(write_manifest(folder, lines[:5]), folder / "out")
    before = frame_hashes(folder / "out")
    counts = run_batch(write_manifest(folder, lines), folder / "out")
    after = frame_hashes(folder / "out")
    assert counts["done"] == 8 and {name: after[name] for name in before} == before


def test_jobs_of_one_pass_are_finished_each_in_its_own_way(folder):
    log = folder / "log"
    ways = [{"composite": False}, {"feather": 0, "paste": "hard"}, {"paste": "hard"}, {}]
    manifest = write_manifest(folder, [job(i, mask="box:0,0,3,3", **way) for i, way in enumerate(ways)])
    assert run_batch(manifest, folder / "out", lambda: StandIn(log, at_once=4))["done"] == 4
    assert len(log.read_text().splitlines()) == 1
    source = read_video(folder / "s0.mkv").frames
    same = [(read_video(folder / f"out/videos/j{i}.mkv").frames == source).all(axis=(0, 3)) for i in range(4)]
    # A composite is the source's own outside the mask.
    outside = ~np.pad(np.ones((3, 3), bool), (0, 13))
    assert [found[outside].all() for found in same] == [False, True, True, True]
    assert not any(found[~outside].all() for found in same)


def test_masks_arrive_in_the_shape_that_was_asked_for(folder):
    grey = np.zeros((16, 16, 3), np.uint8)
    grey[4:9, 3:12] = 100
    Image.fromarray(grey).save(folder / "grey.png")
    shapes = [
        {"mask_threshold": 0.25},
        {"mask_threshold": 0.25, "mask_invert": True},
        {"mask_grow": 2, "mask": "m.npy"},
        {"mask_grow": -1, "mask_feather": 3, "mask": "m.npy"},
        {"mask": "box:0=0,0,4,4;2=8,8,4,4"},
    ]
    seen = {}

    class Noting(StandIn):
        def edit(self, setup, clip, prompts, *more):
            seen[prompts[0]] = clip
            return super().edit(setup, clip, prompts, *more)

    lines = [job(i, **{"mask": "grey.png", **shape}) for i, shape in enumerate(shapes)]
    assert run_batch(write_manifest(folder, lines), folder / "out", Noting)["done"] == len(shapes)
    base = np.zeros((3, 16, 16), bool)
    base[:, 4:9, 3:12] = True
    moving = np.zeros_like(base)
    for frame, corner in enumerate((0, 4, 8)):
        moving[frame, corner : corner + 4, corner : corner + 4] = True
    small = grow_mask(base, -1)
    expected = [base, ~base, grow_mask(base, 2), grow_mask(small, 3), moving]
    for i, mask in enumerate(expected):
        assert np.array_equal(seen[f"prompt {i}"].mask, mask), i
    assert np.array_equal(seen["prompt 3"].solid, small)
    # A composite fades over the mask's soft edge, and is the source's beyond it.
    video = read_video(folder / "out/videos/j3.mkv").frames
    beyond = np.ones((16, 16), bool)
    beyond[2:11, 1:14] = False
    assert np.array_equal(video[:, beyond], read_video(folder / "s0.mkv").frames[:, beyond])


def toned(i: int, output: str, **more) -> dict:
    """A line for a clip with sound."""
    return {**job(i, output=output, mask="box:4,4,8,8"), "source": "s0.mp4", **more}


def sounds_in(path) -> int:
    with av.open(str(path)) as container:
        return len(container.streams.audio)


def test_the_sources_sound_is_kept_unless_a_job_leaves_it_out(folder):
    encode_with_tone(folder / "s0.mp4", "libx264", "aac", seconds=0.5)
    kinds = [".mp4", ".mov", ".m4v", ".mkv", ".webm"]
    lines = [toned(i, f"v{i}{kind}") for i, kind in enumerate(kinds)]
    lines.append(toned(8, "silent.mp4", audio=False))
    lines.append(toned(9, "p/o.gif"))
    with pytest.warns(InputWarning, match=r"'p/o.gif' is without the sound of '.*s0.mp4': a GIF holds none"):
        counts = run_batch(write_manifest(folder, lines), folder / "out")
    assert counts["done"] == len(lines)
    assert [sounds_in(folder / f"out/v{i}{kind}") for i, kind in enumerate(kinds)] == [1] * 5
    assert sounds_in(folder / "out/silent.mp4") == sounds_in(folder / "out/p/o.gif") == 0
    for line in lines:
        assert read_video(folder / "out" / line["output"]).frames.shape == (8, 32, 48, 3)


def test_the_sound_of_what_was_fetched_is_kept_and_the_copy_is_not(folder, monkeypatch):
    import fsspec

    encode_with_tone(folder / "s0.mp4", "libx264", "aac", seconds=0.5)
    fsspec.filesystem("memory").pipe_file("/sound/s0.mp4", (folder / "s0.mp4").read_bytes())
    (folder / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder / "tmp"))
    lines = [toned(i, f"v{i}.mp4", seed=i, source="memory://sound/s0.mp4") for i in range(3)]
    assert run_batch(write_manifest(folder, lines), folder / "out")["done"] == 3
    assert [sounds_in(folder / f"out/v{i}.mp4") for i in range(3)] == [1, 1, 1]
    gc.collect()
    assert list((folder / "tmp").iterdir()) == []


FAULTS = {
    "a prompt that becomes NaN": ({"prompt": "nan"}, "NaN or inf at step 1 of 2"),
    "a fault of the program": ({"prompt": "crash"}, "ZeroDivisionError: a fault"),
    "memory that never suffices": ({"prompt": "huge", "seed": 4}, "too little memory"),
    "a source that is no video": ({"source": "bad.mkv"}, "bad.mkv"),
    "a mask of another shape": ({"mask": "wide.npy"}, "wide.npy"),
    "a box outside": ({"mask": "box:0,0,99,99"}, "box:0,0,99,99"),
    "a box that leaves the picture": ({"mask": "box:0=0,0,4,4;2=20,0,4,4"}, "does not lie within the video"),
    "a mask that is shrunk away": ({"mask_grow": -9}, "empty once it is shrunk by 9 pixels"),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_job_that_fails_is_recorded_and_the_rest_go_on(folder, name):
    (folder / "bad.mkv").write_bytes(b"no video" * 100)
    np.save(folder / "wide.npy", np.ones((8, 64), bool))
    fault, expected = FAULTS[name]
    lines = lines_of(8)
    lines[3] = {**lines[3], **fault}
    manifest = write_manifest(folder, lines)
    assert run_batch(manifest, folder / "out") == {"pending": 0, "running": 0, "done": 7, "failed": 1}
    row = ledger_rows(folder / "out")["j3"]
    assert row["state"] == "failed" and expected in row["error"] and "\n" not in row["error"]
    assert not (folder / "out/videos/j3.mkv").exists() and len(frame_hashes(folder / "out")) == 7
    # Not again, unless it is asked for.
    assert run_batch(manifest, folder / "out")["failed"] == 1
    assert ledger_rows(folder / "out")["j3"]["tries"] == row["tries"]
    run_batch(manifest, folder / "out", retry_failed=True)
    again = ledger_rows(folder / "out")
    assert again["j3"]["tries"] > row["tries"] and {r["commits"] for r in again.values()} == {0, 1}


def test_the_frames_beside_a_failing_job_do_not_depend_on_when_it_was_stopped(folder):
    lines = lines_of(8)
    lines[3]["prompt"] = "nan"
    manifest = write_manifest(folder, lines)
    run_batch(manifest, folder / "whole")
    stop_after(folder, manifest, 2)
    run_batch(manifest, folder / "out")
    assert frame_hashes(folder / "out") == frame_hashes(folder / "whole")


def stop_after(folder, manifest, finished: int) -> dict:
    stop = threading.Event()

    def watch(state):
        if state.counts["done"] >= finished:
            stop.set()

    return run_batch(manifest, folder / "out", lambda: StandIn(seconds=0.05), stop=stop, watch=watch)


def test_a_batch_that_is_stopped_goes_on(folder):
    manifest = write_manifest(folder, lines_of(20))
    run_batch(manifest, folder / "whole")
    counts = stop_after(folder, manifest, 4)
    assert counts["running"] == counts["failed"] == 0 and 4 <= counts["done"] < 20
    assert run_batch(manifest, folder / "out")["done"] == 20
    assert frame_hashes(folder / "out") == frame_hashes(folder / "whole")
    assert {row["commits"] for row in ledger_rows(folder / "out").values()} == {1}


@pytest.mark.parametrize("most, tried", [(2, [4, 2]), (1, [4, 2, 1])])
def test_out_of_memory_halves_the_prompts_at_once(folder, most, tried):
    log = folder / "log"
    manifest = write_manifest(folder, [job(i) for i in range(4)])
    assert run_batch(manifest, folder / "out", lambda: StandIn(log, at_once=4, most=most))["done"] == 4
    assert [json.loads(line)["at_once"] for line in log.read_text().splitlines()] == tried
    # What it came to is remembered.
    (folder / "out/videos/j0.mkv").unlink()
    run_batch(manifest, folder / "out", lambda: StandIn(log, at_once=4))
    assert json.loads(log.read_text().splitlines()[-1])["at_once"] == most


def test_memory_that_never_suffices_ends_in_the_ladder(folder):
    log = folder / "log"
    manifest = write_manifest(folder, [job(0, prompt="huge"), job(1, prompt="huge")])
    assert run_batch(manifest, folder / "out", lambda: StandIn(log))["failed"] == 2
    assert [json.loads(line)["at_once"] for line in log.read_text().splitlines()] == [2, 1, 1]


def test_the_next_source_is_read_while_one_is_computed(folder, monkeypatch):
    from kvlock_fast.batch import worker

    write_clips(folder, 3)
    # The first pass's computation and the second source's reading wait for each other: each needs the other beside it.
    meeting, edits, reads = threading.Barrier(2), [], []

    class Meeting(StandIn):
        def edit(self, *arguments):
            edits.append(arguments[0].source)
            if len(edits) == 1:
                meeting.wait(20)
            return super().edit(*arguments)

    def read(*files):
        reads.append(files)
        if len(reads) == 2:
            meeting.wait(20)
        return read_clip(*files)

    read_clip = worker.read_clip
    monkeypatch.setattr(worker, "read_clip", read)
    # Two seeds of each source: two passes, one reading.
    manifest = write_manifest(folder, [job(i, source=i % 3, seed=i // 3) for i in range(6)])
    assert run_batch(manifest, folder / "out", Meeting)["done"] == 6
    assert len(reads) == 3 and len(edits) == 6


def test_results_are_written_while_the_next_pass_is_computed(folder, monkeypatch):
    from kvlock_fast.batch import worker

    meeting, edits, finished = threading.Barrier(2), [], []

    class Meeting(StandIn):
        def edit(self, *arguments):
            edits.append(arguments[0].source)
            if len(edits) == 2:
                meeting.wait(20)
            return super().edit(*arguments)

    def finish(*arguments):
        finished.append(arguments[0].id)
        if len(finished) == 1:
            meeting.wait(20)
        return finished_files(*arguments)

    finished_files = worker.finished_files
    monkeypatch.setattr(worker, "finished_files", finish)
    manifest = write_manifest(folder, [job(i, source=i) for i in range(2)])
    assert run_batch(manifest, folder / "out", Meeting)["done"] == 2


def test_a_device_that_is_lost_ends_the_batch_and_costs_no_job(folder):
    class Lost(StandIn):
        def edit(self, setup, clip, prompts, decision, progress):
            if "prompt 3" in prompts:
                raise DeviceLost("the device answers no more")
            return super().edit(setup, clip, prompts, decision, progress)

    manifest = write_manifest(folder, [job(i, seed=i) for i in range(8)])
    counts = run_batch(manifest, folder / "out", Lost)
    assert counts["failed"] == counts["running"] == 0 and 0 < counts["pending"] < 8
    assert run_batch(manifest, folder / "out")["done"] == 8


class KilledOnStop:
    """An engine with one worker that is killed when it is told to stop."""

    lanes = 2

    def __init__(self):
        self.works, self.stopped = [], False

    def ready(self):
        return ["w"]

    def submit(self, worker, work):
        self.works.append(work)

    def wait(self, seconds):
        works = self.works if self.stopped else []
        self.works = [] if self.stopped else self.works
        return [Crashed(work, "the worker died") for work in works]

    def running(self):
        return []

    def stop(self):
        self.stopped = True


def test_a_worker_that_is_killed_while_it_stops_is_held_against_no_job(tmp_path):
    jobs = [Job(f"j{i}", "p", f"j{i}.mkv", Setup("s", "m", "p", seed=i)) for i in range(5)]
    with Ledger(tmp_path) as ledger:
        ledger.take(jobs, lambda name: None)
        runner = Runner(ledger, KilledOnStop(), Results(str(tmp_path)), jobs, 4)
        runner.watch = lambda state: runner.stop.set()
        assert runner.run() == {"pending": 5, "running": 0, "done": 0, "failed": 0}
        assert [(row["tries"], row["crashes"]) for row in ledger.rows()] == [(1, 0), (1, 0), (0, 0), (0, 0), (0, 0)]


def test_a_result_that_cannot_be_written_is_a_failure(folder):
    manifest = write_manifest(folder, lines_of(3))
    (folder / "out/videos/j1.mkv").mkdir(parents=True)
    # It became a folder after the manifest was read.
    (folder / "out/videos/j1.mkv").rmdir()

    class Meddler(StandIn):
        def decide(self, *arguments):
            (folder / "out/videos/j1.mkv").mkdir(exist_ok=True)
            return super().decide(*arguments)

    counts = run_batch(manifest, folder / "out", Meddler)
    assert counts["done"] == 2 and "a folder has this name" in ledger_rows(folder / "out")["j1"]["error"]


def test_one_batch_at_a_time_in_a_folder(tmp_path):
    with Ledger(tmp_path), pytest.raises(InputError, match="another batch is running in"):
        Ledger(tmp_path)
    Ledger(tmp_path).close()


def test_a_ledger_of_another_version_or_none_at_all_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with sqlite3.connect(tmp_path / "a/ledger.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(InputError, match="version 99"):
        Ledger(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/ledger.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match=r"ledger.*cannot be used"):
        Ledger(tmp_path / "b")


def test_a_ledger_that_cannot_be_written_is_one_sentence(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.db.execute("PRAGMA query_only = ON")
        with pytest.raises(OutputError, match=r"ledger.*cannot be written"):
            ledger.take([Job("j", "p", "j.mkv", Setup("s", "m", "p"))], lambda name: None)
        ledger.db.execute("PRAGMA query_only = OFF")
        assert ledger.take([Job("j", "p", "j.mkv", Setup("s", "m", "p"))], lambda name: None).new == 1


def test_a_job_is_committed_once(tmp_path):
    one = Job("j", "p", "j.mkv", Setup("s", "m", "p"))
    with Ledger(tmp_path) as ledger:
        ledger.take([one], lambda name: None)
        [work] = ledger.passes(["j"], 4)
        ledger.begin(work)
        decision = Decision("host", "int8", 1)
        ledger.done(Outcome(one, video=b"one", seconds=1.0), decision)
        ledger.done(Outcome(one, video=b"four", seconds=2.0), decision)
        ledger.failed(one, "late")
        row = ledger.rows()[0]
        assert (row["state"], row["seconds"], row["commits"], row["error"]) == ("done", 1.0, 1, None)
        assert row["bytes"] == 3


def test_a_job_that_workers_die_with_is_set_aside_after_three_times_and_no_other(tmp_path):
    jobs = [Job(f"j{i}", f"p{i}", f"j{i}.mkv", Setup("s", "m", "p")) for i in range(4)]
    ids = [job.id for job in jobs]
    with Ledger(tmp_path) as ledger:
        ledger.take(jobs, lambda name: None)
        waiting, runs = ledger.passes(ids, 4), []
        while waiting:
            work = waiting.pop(0)
            ledger.begin(work)
            runs.append(sorted(work.missing))
            if "j2" in work.missing:
                waiting += ledger.crashed(work, "the worker died")
            else:
                for one in work.jobs:
                    ledger.done(Outcome(one, video=b"one", seconds=1.0), Decision("host", "int8", 1))
        assert runs == [ids, ids, ["j0"], ["j1"], ["j2"], ["j3"]]
        states = {row["id"]: (row["state"], row["tries"]) for row in ledger.rows()}
        assert states == {"j0": ("done", 3), "j1": ("done", 3), "j2": ("failed", 3), "j3": ("done", 3)}
        assert ledger.rows()[2]["error"] == "set aside: the worker died 3 times while it ran"


def test_a_worker_gets_the_source_that_it_holds():
    def work(number, source, crashes=0):
        one = Job(f"j{number}", "p", f"j{number}.mkv", Setup(source, "m", "p"))
        return Pass(number, (one,), frozenset({one.id}), crashes=crashes)

    waiting = Waiting([work(0, "a"), work(1, "b"), work(2, "a"), work(3, "c"), work(4, "b", crashes=1)])
    assert waiting.take("b", {"a"}, idle=True).id == 1
    assert waiting.take("b", {"a"}, idle=False).id == 3  # what crashed before waits for a worker of its own
    assert waiting.take("b", {"a"}, idle=True).id == 4
    assert waiting.take(None, {"a"}, idle=False).id == 0
    assert waiting.take("x", set(), idle=False).id == 2
    assert waiting.take("x", set(), idle=True) is None
