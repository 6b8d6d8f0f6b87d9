"""Manifests: what a line may say, and everything that is wrong with one at once."""

import csv
import json
import re
from dataclasses import fields as dataclass_fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlock_fast.batch import fields
from kvlock_fast.batch.editor import enter_uncaptured
from kvlock_fast.batch.fields import JobFields
from kvlock_fast.batch.jobs import Job
from kvlock_fast.batch.manifest import read_manifest
from kvlock_fast.cli import main
from kvlock_fast.config import PRESETS, LockConfig
from kvlock_fast.edit import EditSettings
from kvlock_fast.errors import InputError
from kvlock_fast.loop.windows import Windows
from kvlock_fast.media import MaskShape
from tests.support.batch_parts import job, write_clips, write_manifest


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    (folder / "out").mkdir()
    (folder / "elsewhere").mkdir()
    (folder / "out" / "link").symlink_to(folder / "elsewhere")
    (folder / "out" / "taken.mkv").mkdir()
    return folder


LONG = "x" * 300 + ".mkv"
WRONG = {
    "no json": ('{"id": "a",', "json", "cannot be read"),
    "a list": ("[1, 2]", "json", "must be an object"),
    "a number": ("17", "json", "must be an object"),
    "not a number": ('{"id": "n", "tau": NaN}', "json", "NaN"),
    "field twice": ('{"id": "a", "id": "b"}', "json", "twice"),
    "no id": ({"id": None}, "id", "null"),
    "id of a number": ({"id": 7}, "id", "must be a string, got 7"),
    "id empty": ({"id": ""}, "id", "''"),
    "id with a slash": ({"id": "a/b"}, "id", "slash"),
    "id too long": ({"id": "x" * 129}, "id", "128"),
    "source missing": ({"source": "no.mkv"}, "source", "'no.mkv'"),
    "source of a number": ({"source": 3}, "source", "got 3"),
    "source with NUL": ({"source": "a\0b"}, "source", "NUL"),
    "mask missing": ({"mask": "no.npy"}, "mask", "'no.npy'"),
    "mask empty": ({"mask": ""}, "mask", "''"),
    "source prompt of a list": ({"source_prompt": ["a"]}, "source_prompt", "['a']"),
    "no prompts": ({"prompt": []}, "prompt", "non-empty"),
    "empty prompt": ({"prompt": ["a", ""]}, "prompt", "none of them empty"),
    "prompt of a number": ({"prompt": 1}, "prompt", "got 1"),
    "lone surrogate": ('{"id": "u", "source": "s0.mkv", "mask": "m.npy", "source_prompt": "a", "prompt": "\\udce9"}',
                       "prompt", "no text"),
    "seed negative": ({"seed": -1}, "seed", "-1"),
    "seed too large": ({"seed": 2**63}, "seed", str(2**63)),
    "seed of text": ({"seed": "3"}, "seed", "'3'"),
    "seed true": ({"seed": True}, "seed", "True"),
    "steps 0": ({"steps": 0}, "steps", "got 0"),
    "steps beyond reason": ({"steps": 10**9}, "steps", "1000000000"),
    "steps of a fraction": ({"steps": 2.5}, "steps", "2.5"),
    "guidance negative": ({"guidance": -0.5}, "guidance", "-0.5"),
    "size": ({"size": "48"}, "size", "HEIGHTxWIDTH"),
    "size of numbers": ({"size": [48, 48]}, "size", "HEIGHTxWIDTH"),
    "preset": ({"preset": "papr"}, "preset", "'papr'"),
    "tau": ({"tau": -1}, "tau", "must be greater than 0 or 'auto', got -1"),
    "alpha": ({"alpha": 1.5}, "alpha", "1.5"),
    "variance_window": ({"variance_window": 1}, "variance_window", "must be a whole number of at least 2, got 1"),
    "kappa": ({"kappa": "all"}, "kappa", "'all'"),
    "layers twice": ({"layers": [1, 1]}, "layers", "distinct"),
    "lock_interval backwards": ({"lock_interval": [0.6, 0.2]}, "lock_interval", "start < stop <= 1, got"),
    "lock_interval of one": ({"lock_interval": [0.6]}, "lock_interval", "must be two shares of the steps"),
    "guidance_interval of text": ({"guidance_interval": "0-1"}, "guidance_interval", "must be two shares of the steps"),
    "lock_share": ({"lock_share": 0.5}, "lock_share", "is called 'lock_interval' now, and takes another value"),
    "detection": ({"detection": "local"}, "detection", "'local'"),
    "s_star": ({"s_star": "yes"}, "s_star", "'yes'"),
    "cache format": ({"cache_format": "fp7"}, "cache_format", "'fp7'"),
    "feather": ({"feather": 1000}, "feather", "1000"),
    "feather of text": ({"feather": "soft"}, "feather", "'soft'"),
    "compute": ({"compute": "fast"}, "compute", "must be one of full, foreground, got 'fast'"),
    "compute with s* over all": ({"compute": "foreground", "s_star_region": "all"}, "compute",
                                 "'foreground' does not go with s_star_region 'all'"),
    "compute with global detection": ({"compute": "foreground", "preset": "global-detection"}, "compute",
                                      "'foreground' does not go with detection 'global'"),
    "compute below alpha 1": ({"compute": "foreground", "alpha": 0.5}, "compute", "alpha 0.5"),
    "alpha_snap 0": ({"alpha_snap": 0}, "alpha_snap", "got 0"),
    "alpha_snap above 1": ({"alpha_snap": 1.01}, "alpha_snap", "1.01"),
    "alpha_lag": ({"alpha_lag": 3}, "alpha_lag", "must be 1 or 2, got 3"),
    "alpha_lag true": ({"alpha_lag": True}, "alpha_lag", "True"),
    "halo negative": ({"halo": -1}, "halo", "must be a whole number of at least 0, got -1"),
    "halo without the source's latents": ({"halo": 2, "preset": "paper"}, "halo", "2 needs background_latents"),
    "seam": ({"seam": "glue"}, "seam", "must be one of cut, blend, got 'glue'"),
    "mask_threshold 1": ({"mask_threshold": 1}, "mask_threshold", "less than 1, got 1"),
    "mask_threshold negative": ({"mask_threshold": -0.1}, "mask_threshold", "-0.1"),
    "mask_invert of a number": ({"mask_invert": 1}, "mask_invert", "got 1"),
    "mask_grow too far": ({"mask_grow": 1025}, "mask_grow", "1025"),
    "mask_grow of a fraction": ({"mask_grow": 1.5}, "mask_grow", "1.5"),
    "mask_feather negative": ({"mask_feather": -1}, "mask_feather", "-1"),
    "box of another form": ({"mask": "box:1,2,3"}, "mask", "'box:1,2,3' is not of the form"),
    "box without a frame": ({"mask": "box:0=1,1,5,5;2,2,5,5"}, "mask", "is not of the form"),
    "box twice at a frame": ({"mask": "box:3=1,1,5,5;3=2,2,5,5"}, "mask", "gives the box at frame 3 twice"),
    "clip_frames 1": ({"clip_frames": 1}, "clip_frames", "got 1"),
    "clip_overlap alone": ({"clip_overlap": 4}, "clip_overlap", "needs clip_frames, got 4 alone"),
    "clip_overlap of a whole window": ({"clip_frames": 9, "clip_overlap": 9}, "clip_overlap",
                                       "less than clip_frames, which is 9, got 9"),
    "clip_frames on disk": ({"clip_frames": 9, "cache_tier": "disk"}, "clip_frames",
                            "does not go with cache_tier 'disk', got 9"),
    "audio": ({"audio": "off"}, "audio", "'off'"),
    "graph of a job": ({"graph": "on"}, "graph", "no field"),
    "output a folder of images": ({"output": "frames"}, "output",
                                  "got 'frames': a result is one file, not a folder of images"),
    "unknown field": ({"sead": 3}, "sead", "did you mean 'seed'"),
    "output leaves": ({"output": "../a.mkv"}, "output", "'../a.mkv'"),
    "output leaves later": ({"output": "a/../../b.mkv"}, "output", "within"),
    "output absolute": ({"output": "/tmp/a.mkv"}, "output", "relative"),
    "output by a link": ({"output": "link/a.mkv"}, "output", "link"),
    "output with NUL": ({"output": "a\0.mkv"}, "output", "NUL"),
    "output too long": ({"output": LONG}, "output", "200 bytes"),
    "output of another kind": ({"output": "a.txt"}, "output", ".mkv"),
    "output a folder": ({"output": "taken.mkv"}, "output", "folder"),
    "output hidden": ({"output": ".a.mkv"}, "output", "dot"),
    "output with a backslash": ({"output": "a\\b.mkv"}, "output", "backslash"),
    "output among reports": ({"output": "reports/a.mkv"}, "output", "reports"),
}  # fmt: skip


def wrong_line(i: int, what) -> dict | str:
    return what if isinstance(what, str) else {**job(i), **what}


def test_every_wrong_line_is_listed_at_once_and_nothing_is_run(clips, capsys):
    assert len(WRONG) >= 70
    good = job(1000)
    lines = [good, *(wrong_line(i, what) for i, (what, _, _) in enumerate(WRONG.values())), job(1000), "{}",
             job(1001, output="videos/j1000.mkv")]  # fmt: skip
    manifest = write_manifest(clips, lines)
    before = sorted((clips / "out").iterdir())
    assert main(["batch", str(manifest), "--output", str(clips / "out")]) == 2
    *listed, last = capsys.readouterr().err.splitlines()
    found = [re.fullmatch(r"line (\d+): (\S+): (.+)", line).groups() for line in listed]
    by_line: dict[int, list] = {}
    for number, name, sentence in found:
        by_line.setdefault(int(number), []).append((name, sentence))
    assert sorted(by_line) == list(range(2, len(lines) + 1))
    for number, (_, name, text) in enumerate(WRONG.values(), start=2):
        assert [n for n, _ in by_line[number]] == [name], by_line[number]
        assert text in by_line[number][0][1], by_line[number]
    end = len(WRONG) + 2
    assert by_line[end] == [("id", "'j1000' is that of line 1 already"), ("output", by_line[end][1][1])]
    assert {name for name, _ in by_line[end + 1]} == {"id", "source", "mask", "source_prompt", "prompt"}
    assert by_line[end + 2] == [("output", "'videos/j1000.mkv' is that of line 1 already")]
    assert last == f"error: the manifest '{manifest}' has {len(WRONG) + 3} wrong lines, listed above: nothing was run"
    assert sorted((clips / "out").iterdir()) == before


def test_a_line_with_several_faults_lists_them_all(clips):
    reading = read_manifest(write_manifest(clips, [job(0, tau=-1, seed="x", colour="red")]), clips / "out", {})
    assert [name for _, name, _ in sorted(reading.problems)] == ["colour", "seed", "tau"]


WHOLE = {
    "source_prompt": ["a", "ein Würfel, \"rot\"", "two\nlines"], "prompt": ["b", ["c", "d"], "[no list"],
    "negative_prompt": ["bad"], "seed": [0, 7, 2**63 - 1], "steps": [1, 50], "guidance": [0.0, 3.5], "size": ["32x48"],
    "max_frames": [5], "composite": [True, False], "feather": [2], "paste": ["hard", "harmonic"],
    "preset": list(PRESETS), "alpha": ["dynamic", 0.5],
    "tau": ["auto", 0.02], "layers": [[0, 2]], "lock_interval": [[0.0, 0.5]],
    "variance_window": [4], "s_star": [False], "cache_tier": ["host"],
    "cache_stride": [2], "prompts_at_once": [3], "frames_policy": ["trim"], "compute": ["foreground"],
    "alpha_snap": [0.95, 1.0], "alpha_lag": [1, 2], "halo": [0], "seam": ["blend"], "mask_threshold": [0, 0.25],
    "mask_invert": [True], "mask_grow": [-3, 4], "mask_feather": [5], "audio": [True, False],
    "mask": ["box:0=1,2,3,4;2=5,6,3,4"], "clip_frames": [9, 17],
}  # fmt: skip


@given(st.data())
def test_json_and_csv_say_the_same(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("m")
    names = data.draw(st.lists(st.sampled_from(sorted(WHOLE)), unique=True))
    lines = []
    for i in range(data.draw(st.integers(1, 3))):
        lines.append({**job(i), **{name: data.draw(st.sampled_from(WHOLE[name])) for name in names}})
    with (folder / "jobs.csv").open("w", newline="") as file:
        columns = list(lines[0])
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for line in lines:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in line.items()})
    by_json = read_manifest(write_manifest(folder, lines), folder, {})
    by_csv = read_manifest(folder / "jobs.csv", folder, {})
    # Values that are each right may be wrong together.
    by_json_wrong, by_csv_wrong = ([problem[1:] for problem in by.problems] for by in (by_json, by_csv))
    assert by_json_wrong == by_csv_wrong
    assert all("does not go with" in sentence for _, sentence in by_json_wrong)
    assert by_json.jobs == by_csv.jobs
    for found in by_json.jobs:
        assert Job.from_spec(found.spec()) == found
        assert hash(Job.from_spec(found.spec()).setup) == hash(found.setup)


def test_a_list_of_prompts_is_a_job_each(clips):
    reading = read_manifest(write_manifest(clips, [job(0, prompt=["red", "blue"])]), clips / "out", {})
    assert [(j.id, j.prompt, j.output) for j in reading.jobs] == [
        ("j0-1", "red", "videos/j0-1.mkv"), ("j0-2", "blue", "videos/j0-2.mkv")
    ]  # fmt: skip
    lines = [job(0, prompt=["red", "blue"]), job(1, id="j0-2")]
    assert (
        "line 2: id: 'j0-2' is that of line 1 already"
        in read_manifest(write_manifest(clips, lines), clips / "out", {}).sentences()
    )


def test_settings_arrive_as_edit_takes_them(clips):
    line = job(0, compute="foreground", alpha_snap=0.9, alpha_lag=2, halo=3, seam="blend", mask_threshold=0.25,
               mask_invert=True, mask_grow=-2, mask_feather=4, clip_frames=17, clip_overlap=5, variance_window=6,
               composite=True, audio=False)  # fmt: skip
    [found] = read_manifest(write_manifest(clips, [line]), clips / "out", {}).jobs
    settings = found.edit_settings()
    assert settings.lock == LockConfig.preset(
        "kvlock", compute="foreground", alpha_snap=0.9, alpha_lag=2, halo=3, seam="blend", variance_window=6
    )
    assert settings.mask_shape == MaskShape(0.25, True, -2, 4)
    assert (settings.clip_frames, settings.clip_overlap) == (17, 5)
    assert (settings.composite, settings.feather, settings.composite_feather) == (True, None, 0)
    assert not found.finish.audio and found.setup.windows() == Windows(17, 5)


def test_what_is_not_given_is_what_edit_does(clips):
    [found] = read_manifest(write_manifest(clips, [job(0)]), clips / "out", {}).jobs
    assert found.edit_settings() == EditSettings("a square", ["prompt 0"])
    assert found.finish.audio


def test_a_fault_of_a_list_of_prompts_is_said_once(clips, capsys):
    manifest = write_manifest(clips, [job(0, prompt=["a", "b"], source="no.mkv", output="q.mkv")])
    assert main(["batch", str(manifest), "--output", str(clips / "out")]) == 2
    assert capsys.readouterr().err.count("line 1: source:") == 1


def test_lock_parameters_arrive_and_presets_stay(clips):
    line = job(0, preset="paper", kappa=7, layers=[2, 0], alpha=0.25)
    setup = read_manifest(write_manifest(clips, [line]), clips / "out", {}).jobs[0].setup
    assert setup.lock == LockConfig.preset("paper", kappa=7, layers=(0, 2), alpha=0.25)
    assert read_manifest(write_manifest(clips, [job(0)]), clips / "out", {}).jobs[0].setup.lock == LockConfig.preset(
        "kvlock"
    )


@pytest.mark.parametrize("suffix", [".yaml", ".toml"])
def test_lines_above_flags_above_the_defaults_file(clips, capsys, suffix):
    write_manifest(clips, [job(0, seed=3), job(1)])
    text = "seed: 1\nsteps: 4\nkappa: 9\n" if suffix == ".yaml" else "seed = 1\nsteps = 4\nkappa = 9\n"
    (clips / f"d{suffix}").write_text(text)
    from kvlock_fast.batch.command import BatchSettings, _read

    reading = _read(
        BatchSettings(clips / "jobs.jsonl", clips / "out", clips / f"d{suffix}", {"steps": 6}, ("tau=0.5",))
    )
    assert [(j.setup.seed, j.setup.steps, j.setup.lock.kappa, j.setup.lock.tau) for j in reading.jobs] == [
        (3, 6, 9, 0.5), (1, 6, 9, 0.5)
    ]  # fmt: skip


BAD_DEFAULTS = {
    "no file": (["--defaults", "no.yaml"], "the defaults 'no.yaml' cannot be read"),
    "another kind": (["--defaults", "d.ini"], "'d.ini' must be a .yaml, .yml or .toml file"),
    "set without a value": (["--set", "seed"], "--set must be NAME=VALUE, like --set kappa=15, got 'seed'"),
    "set of no field": (["--set", "sead=3"], "--set: sead: is no field of a job; did you mean 'seed'?"),
    "set out of range": (["--set", "tau=-1"], "--set: tau: must be greater than 0 or 'auto', got -1"),
    "set of an id": (["--set", "id=a"], "--set: id: is each job's own"),
    "set twice": (["--set", "seed=1", "--set", "seed=2"], "--set names 'seed' twice"),
    "size": (["--size", "10"], "size: must be HEIGHTxWIDTH"),
    "engine": (["--engine", "slurm"], "--engine must be local or ray, got 'slurm'"),
    "dtype": (["--dtype", "fp7"], "--dtype must be one of bf16, fp16, fp32, auto, got 'fp7'"),
    "address without ray": (["--address", "auto"], "--address is for --engine ray only, got 'auto'"),
    "model": (["--model", "./no-model"], "./no-model"),
    "device": (["--device", "toaster"], "device 'toaster'"),
    "graph": (["--graph", "maybe"], "--graph must be one of off, auto, on, got 'maybe'"),
    "graph without a GPU": (["--graph", "on", "--device", "cpu"], "the device is cpu, not cuda"),
    "graph on cores": (["--graph", "on", "--engine", "ray", "--cpus-per-worker", "2"], "--cpus-per-worker 2"),
    "compile": (["--compile", "whole"], "--compile must be one of off, regional, got 'whole'"),
    "results": (["--results", "nosuch://a/b"], "nosuch://a/b"),
}


@pytest.mark.parametrize("name", list(BAD_DEFAULTS))
def test_bad_options_are_one_sentence(clips, capsys, tmp_path, name):
    arguments, expected = BAD_DEFAULTS[name]
    manifest = write_manifest(clips, [job(0)], f"{name.replace(' ', '-')}.jsonl")
    status = main(["batch", str(manifest), "--output", str(tmp_path / "o"), *arguments])
    error = capsys.readouterr().err
    assert status == 2 and expected in error and "Traceback" not in error, error
    assert not list((tmp_path / "o").rglob("*.mkv"))


def test_jobs_that_no_graph_can_hold_are_wrong_lines_of_graph_on(clips):
    lines = [job(0), job(1, clip_frames=9), job(2, preset="cfg"), job(3, tau="auto"), job(4, preset="paper")]
    reading = read_manifest(write_manifest(clips, lines), clips / "out", {})
    assert reading.sentences() == []
    enter_uncaptured(reading)
    assert [(line, name) for line, name, _ in reading.problems] == [(2, "clip_frames"), (3, "preset"), (4, "tau")]
    assert all("which --graph on cannot capture" in sentence for sentence in reading.sentences())


def test_bad_defaults_files(tmp_path):
    from kvlock_fast.batch.manifest import read_defaults

    for name, text, expected in (
        ("a.yaml", "- 1", "names with values"), ("b.yaml", "a: [", "cannot be read"), ("c.toml", "a = ", "cannot be"),
        ("d.yaml", "seed: -1", "seed: "), ("e.yaml", "!!python/object/apply:os.system ['x']", "cannot be read"),
        ("f.toml", "output = 'a.mp4'", "output: is each job's own"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=re.escape(expected)):
            read_defaults(tmp_path / name)


def test_manifests_that_cannot_be_read_at_all(tmp_path):
    for name, data, expected in (
        ("a.txt", b"{}", "must be a .jsonl or .csv"),
        ("b.jsonl", b"\n\n", "holds no job"),
        ("c.csv", b"id,id\n1,2\n", "twice"),
        ("d.csv", b'id\n"a', "CSV"),
        ("e.csv", b"\xff\xfe", "UTF-8"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=expected):
            read_manifest(tmp_path / name, tmp_path, {})
    with pytest.raises(InputError, match="cannot be read"):
        read_manifest(tmp_path / "no.jsonl", tmp_path, {})


def test_the_schema_knows_every_field_and_is_printed(capsys):
    assert main(["batch", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(JobFields.model_fields) >= {"id", "tau", "layers", "output", "cache_tier"}
    assert set(schema["required"]) == {"id", "source", "mask", "source_prompt", "prompt"}
    assert set(fields.LOCK_NAMES) | set(MaskShape().as_dict()) <= set(JobFields.model_fields)


ELSEWHERE = {"lock", "cache", "mask_shape", "prompts", "graph", "compile", "processors", "dtype", "device"}


def test_a_job_can_say_all_that_an_edit_can():
    said = {f.name for f in dataclass_fields(EditSettings)} - ELSEWHERE
    assert said <= set(JobFields.model_fields)


def test_a_job_reads_in_a_ledger_as_before():
    """In another order, every job that is done would count as changed."""
    from kvlock_fast.batch.jobs import Setup

    names = (
        "id prompt output composite feather paste audio source mask source_prompt model dtype negative_prompt steps "
        "guidance guidance_2 seed size max_frames frames_policy lock cache mask_shape clip_frames clip_overlap"
    )
    assert list(json.loads(Job("a", "b", "a.mp4", Setup("s", "m", "p")).spec())) == names.split()
