"""Manifests: what a line may say, and everything that is wrong with one at once."""

import csv
import json
import re

import pytest
from batch_parts import job, write_clips, write_manifest
from hypothesis import given
from hypothesis import strategies as st

from kvlock_fast import cli, inputs
from kvlock_fast.batch import fields
from kvlock_fast.batch.fields import JobFields
from kvlock_fast.batch.jobs import Job
from kvlock_fast.batch.manifest import read_manifest
from kvlock_fast.cli import main
from kvlock_fast.config import PRESETS, LockConfig
from kvlock_fast.errors import InputError


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
    "window": ({"window": 1}, "window", "must be a whole number of at least 2, got 1"),
    "kappa": ({"kappa": "all"}, "kappa", "'all'"),
    "layers twice": ({"layers": [1, 1]}, "layers", "distinct"),
    "detection": ({"detection": "local"}, "detection", "'local'"),
    "s_star": ({"s_star": "yes"}, "s_star", "'yes'"),
    "cache format": ({"cache_format": "fp7"}, "cache_format", "'fp7'"),
    "feather": ({"feather": 1000}, "feather", "1000"),
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
    assert len(WRONG) >= 40
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
    "max_frames": [5], "composite": [True, False], "feather": [3], "preset": list(PRESETS), "alpha": ["dynamic", 0.5],
    "tau": ["auto", 0.02], "layers": [[0, 2]], "window": [4], "s_star": [False], "cache_tier": ["host"],
    "cache_stride": [2], "prompts_at_once": [3], "frames_policy": ["trim"],
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
    assert by_json.sentences() == by_csv.sentences() == []
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
    "address without ray": (["--address", "auto"], "--address is for --engine ray only, got 'auto'"),
    "model": (["--model", "./no-model"], "./no-model"),
    "device": (["--device", "toaster"], "device 'toaster'"),
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


def test_bad_defaults_files(tmp_path):
    from kvlock_fast.batch.defaults import read_defaults

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
    assert set(fields.LOCK_NAMES) <= set(JobFields.model_fields)


def test_limits_are_those_of_edit():
    assert (fields.MOST_SEED, fields.MOST_STEPS) == (cli.MOST_SEED, inputs.MOST_STEPS)
