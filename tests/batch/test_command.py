"""`kvlock-fast batch` from files to files, on a tiny model: what it writes, says, checks and shows."""

import csv
import html.parser
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvlock_fast.batch import watching
from kvlock_fast.batch.editor import ModelEditor, OutOfMemory
from kvlock_fast.batch.index import Index, result_rows
from kvlock_fast.batch.jobs import Decision, Setup
from kvlock_fast.batch.ledger import Ledger
from kvlock_fast.batch.places import Results, fetched, is_there
from kvlock_fast.batch.runner import State
from kvlock_fast.batch.worker import Running
from kvlock_fast.cli import main
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.errors import InputError, OutputError
from kvlock_fast.media import read_video, write_video
from kvlock_fast.media.clip import Clip
from tests.support.batch_parts import frame_hashes, job, ledger_rows, run_batch, write_clips, write_manifest
from tests.support.locks import paper
from tests.support.tiny import tiny_wan


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_wan().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    write_clips(tmp_path)
    return tmp_path


def batch(manifest: Path, output: Path, *more) -> int:
    return main(["batch", str(manifest), "--output", str(output), "--steps", "2", "--size", "32x48", *map(str, more)])


def test_a_batch_from_files_to_files(folder, model, capsys):
    lines = [job(i, source=i % 2, output=f"j{i}.mp4") for i in range(5)]
    lines[3]["prompt"] = "<script>alert('x')</script> & \"quotes\""
    lines[4]["mask"] = "box:0,0,99,99"
    manifest = write_manifest(folder, lines)
    metrics, figures = folder / "m.prom", folder / "f.json"
    options = ("--model", model, "--metrics-file", metrics, "--json", figures)
    assert batch(manifest, folder / "out", *options) == 1
    said = capsys.readouterr()
    assert "4 of 5 jobs done" in said.out and "batch: 4 of 5 done, 1 failed" in said.err
    assert re.search(r"job +tries +error\nj4 +1 +the mask 'box:0,0,99,99' does not lie", said.err)
    assert said.err.splitlines()[-1] == "error: 1 of 5 jobs failed (--retry-failed tries them again)"
    written = sorted(p.name for p in (folder / "out").iterdir() if not p.name.startswith("."))
    assert written == [
        "index.html",
        "j0.mp4",
        "j1.mp4",
        "j2.mp4",
        "j3.mp4",
        "ledger.sqlite",
        "reports",
        "results.jsonl",
    ]
    assert sorted(p.name for p in (folder / "out/reports").iterdir()) == [f"j{i}.html" for i in range(4)]
    # As the sources, whatever the size that the model worked at.
    assert read_video(folder / "out/j0.mp4").frames.shape == (3, 16, 16, 3)
    rows = [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"j{i}" for i in range(5)]
    assert [row["state"] for row in rows] == ["done"] * 4 + ["failed"]
    assert all(row["delivered_psnr"] is None and row["delivered_seam"] > 0 for row in rows[:4])  # nothing changed
    assert all(row["background_psnr"] > 0 and row["seam"] > 0 for row in rows[:4])
    assert json.loads(figures.read_text())["counts"] == {"pending": 0, "running": 0, "done": 4, "failed": 1}
    samples = dict(line.rsplit(" ", 1) for line in metrics.read_text().splitlines() if not line.startswith("#"))
    assert float(samples['kvlock_batch_jobs{state="done"}']) == 4
    assert float(samples['kvlock_batch_jobs{state="failed"}']) == 1
    assert float(samples["kvlock_batch_finished_total"]) == 5
    # Nothing is loaded for what is done.
    capsys.readouterr()
    assert batch(manifest, folder / "out", "--model", model) == 1
    assert "5 of 5 jobs are known here" in capsys.readouterr().err


WAYS = {
    "as it is": ({}, ""),
    "mask": ({"mask_grow": -1, "mask_feather": 2, "paste": "harmonic"},
             "--mask-grow -1 --mask-feather 2 --paste harmonic"),
    "mask inverted": ({"mask_invert": True, "composite": False, "feather": 2},
                      "--mask-invert --no-composite --feather 2"),
    "moving box": ({"mask": "box:0=2,2,4,4;16=8,8,6,6"}, "--mask box:0=2,2,4,4;16=8,8,6,6"),
    "compute": ({"compute": "foreground", "alpha_snap": 0.9, "alpha_lag": 2, "halo": 1, "seam": "blend"},
                "--compute foreground --alpha-snap 0.9 --alpha-lag 2 --halo 1 --seam blend"),
    "stretches": ({"clip_frames": 9, "clip_overlap": 4}, "--clip-frames 9 --clip-overlap 4"),
}  # fmt: skip


@pytest.mark.parametrize("way", list(WAYS))
def test_the_frames_are_those_of_edit(folder, model, way):
    fields, flags = WAYS[way]
    frames = np.random.default_rng(1).integers(0, 256, (17, 16, 16, 3), dtype=np.uint8)
    write_video(folder / "s0.mkv", frames, 8)
    manifest = write_manifest(folder, [job(0, **{"output": "a.mkv", "seed": 3, **fields})])
    tier = ("--set", "cache_tier=lockstep")
    assert batch(manifest, folder / "out", "--model", model, *tier, "--no-reports", "--quiet") == 0
    arguments = ["edit", "--source", folder / "s0.mkv", "--mask", folder / "m.npy", "--source-prompt", "a square"]
    arguments += ["--prompt", "prompt 0", "--seed", 3, "--steps", 2, "--size", "32x48"]
    arguments += ["--output", folder / "b.mkv", "--model", model]
    assert main([*map(str, arguments), "--cache-tier", "lockstep", "--quiet", *flags.split()]) == 0
    assert np.array_equal(read_video(folder / "out/a.mkv").frames, read_video(folder / "b.mkv").frames)


def test_a_csv_with_defaults_and_a_list_of_prompts(folder, model):
    with (folder / "jobs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "source", "mask", "prompt", "seed"])
        writer.writerow(["a", "s0.mkv", "m.npy", '["red", "blue"]', ""])
        writer.writerow(["b", "s1.mkv", "box:2,2,8,8", "green", "4"])
    (folder / "d.yaml").write_text(f"model: {model}\nsource_prompt: a square\nsteps: 1\n")
    arguments = [folder / "jobs.csv", "--output", folder / "out", "--defaults", folder / "d.yaml", "--no-reports"]
    assert main(["batch", *map(str, arguments), "--quiet"]) == 0
    assert sorted(p.name for p in (folder / "out").glob("*.mp4")) == ["a-1.mp4", "a-2.mp4", "b.mp4"]


def test_edits_of_one_source_share_a_pass_and_still_come_out_again_the_same(folder, model):
    manifest = write_manifest(folder, [job(i, output=f"j{i}.mkv") for i in range(5)])
    options = (
        "--model",
        model,
        "--no-reports",
        "--quiet",
        "--set",
        "cache_tier=resident",
        "--set",
        "prompts_at_once=2",
    )
    assert batch(manifest, folder / "whole", *options) == 0
    with Ledger(folder / "whole") as ledger:
        found = [tuple(row) for row in ledger.db.execute("SELECT width, tier, format, at_once FROM passes")]
    assert found == [(5, "resident", "fp8_e4m3", 2)]
    before = frame_hashes(folder / "whole")
    (folder / "whole/j3.mkv").unlink()
    assert batch(manifest, folder / "whole", *options) == 0
    assert frame_hashes(folder / "whole") == before


def test_memory_that_runs_out_on_the_device_is_told_apart(model, monkeypatch):
    from kvlock_fast import edits

    editor = ModelEditor("cpu")
    clip = Clip(np.zeros((5, 32, 48, 3), np.uint8), np.zeros((5, 32, 48), bool), 8)
    clip.mask[:, 4:9, 4:9] = True
    setup = Setup("s", "m", "a square", model=str(model), steps=2)
    decision = editor.decide(setup, clip, 3)
    assert decision.at_once == 3 and not decision.ladder
    frames, trace = editor.edit(setup, clip, ["a", "b"], Decision("host", "int8", 1), lambda *a: None)
    assert [f.shape for f in frames] == [(5, 32, 48, 3)] * 2
    assert trace["cache"]["tier"] == "host" and trace["cache"]["format"] == "int8"

    def full(*arguments):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(edits, "denoise", full)
    with pytest.raises(OutOfMemory):
        editor.edit(setup, clip, ["a", "b"], Decision("host", "int8", 1), lambda *a: None)
    with pytest.raises(InputError, match="too little memory"), pytest.warns(UserWarning):
        editor.edit(setup, clip, ["a", "b"], Decision("host", "int8", 1, ladder=True), lambda *a: None)


def test_a_model_that_cannot_be_loaded_is_tried_once(model, monkeypatch):
    from kvlock_fast.batch import editor as room

    calls = []

    def refuse(*arguments):
        calls.append(arguments)
        raise InputError("no such model")

    monkeypatch.setattr(room, "load_pipeline", refuse)
    editor = ModelEditor("cpu")
    for _ in range(3):
        with pytest.raises(InputError, match="no such model"):
            editor._load(Setup("s", "m", "p", model="some/model"))
    assert len(calls) == 1


FOREGROUND = LockConfig.preset("kvlock", compute="foreground", kappa=1)


@pytest.mark.parametrize("more", [{}, {"lock": paper(kappa=1, warmup_alpha=0.0)},
                                  {"guidance": 1.0, "cache": CacheConfig(step_stride=2, format="int8")},
                                  {"size": (48, 32), "frames_policy": "trim"},
                                  {"lock": FOREGROUND}, {"lock": FOREGROUND, "mask": "all"}])  # fmt: skip
def test_the_planner_is_asked_what_an_edit_would_ask(model, monkeypatch, more):
    from kvlock_fast.planning import plan_edit

    asked, plan = [], plan_edit.plan

    def noted(job, machine, formats, tiers):
        asked.append((job, formats))  # what was decided is what the edit asks for: the tiers differ
        return plan(job, machine, formats, tiers)

    monkeypatch.setattr(plan_edit, "plan", noted)
    clip = Clip(np.zeros((6, 32, 48, 3), np.uint8), np.zeros((6, 32, 48), bool), 8)
    clip.mask[:, 4:9, 4:9] = True
    if more.get("mask") == "all":  # then there is nothing that foreground-only steps could leave out
        clip.mask[:] = True
    setup = Setup(**{"source": "s", "mask": "m", "source_prompt": "a", "model": str(model), "steps": 3, **more})
    editor = ModelEditor("cpu")
    decision = editor.decide(setup, clip, 2)
    editor.edit(setup, clip, ["a", "b"], replace(decision, ladder=True), lambda *a: None)
    assert len(asked) == 2 and asked[0] == asked[1]


@pytest.mark.parametrize("tier, expected", [("auto", "lockstep"), ("resident", "resident")])
def test_a_clip_in_stretches_is_not_planned_and_runs(model, monkeypatch, tier, expected):
    from kvlock_fast.planning import plan_edit

    monkeypatch.setattr(plan_edit, "plan", None)
    clip = Clip(np.zeros((17, 32, 48, 3), np.uint8), np.zeros((17, 32, 48), bool), 8)
    clip.mask[:, 4:9, 4:9] = True
    cache = CacheConfig(tier=tier, prompts_at_once=2)
    setup = Setup("s", "m", "a square", model=str(model), steps=2, clip_frames=9, cache=cache)
    editor = ModelEditor("cpu")
    decision = editor.decide(setup, clip, 3)
    assert decision == Decision(expected, "fp8_e4m3", 2)
    frames, trace = editor.edit(setup, clip, ["a", "b", "c"], decision, lambda *a: None)
    assert [f.shape for f in frames] == [(17, 32, 48, 3)] * 3 and trace["cache"]["tier"] == expected


def test_a_window_is_what_has_to_fit_the_models_position_codes(model):
    from kvlock_fast.batch.check import model_size
    from kvlock_fast.batch.fit import fit_extent

    size = model_size(str(model))
    frames = 4 * size.geometry.most_tokens + 1
    with pytest.raises(InputError, match=f"{frames} frames of 32x48 are too many"):
        fit_extent((frames, 32, 48), None, Setup("s", "m", "p"), size)
    assert fit_extent((frames, 32, 48), None, Setup("s", "m", "p", clip_frames=17), size).frames == frames


def test_speed_goes_to_every_edit_and_onto_its_page(folder, model, monkeypatch, capsys):
    from kvlock_fast.batch import editor as room

    asked, call = [], room.call_pipeline

    def noted(pipe, clip, settings, *more, **named):
        asked.append((settings.graph, settings.compile))
        return call(pipe, clip, replace(settings, compile="off"), *more, **named)

    monkeypatch.setattr(room, "call_pipeline", noted)
    manifest = write_manifest(folder, [job(i, source=i) for i in range(2)])
    assert batch(manifest, folder / "out", "--model", model, "--graph", "auto", "--compile", "regional") == 0
    assert asked == [("auto", "regional")] * 2
    assert capsys.readouterr().err.count("steps are not captured in a CUDA graph: the device is cpu") == 1
    assert "regional" in (folder / "out/reports/j0.html").read_text()


def test_a_models_folder_is_relative_to_where_the_command_was_given(model):
    setup = Setup("s", "m", "p", model=model.name)
    assert ModelEditor("cpu", folder=model.parent)._load(setup).model.device.type == "cpu"
    with pytest.raises(InputError, match="cannot be loaded"):
        ModelEditor("cpu", folder=model)._load(Setup("s", "m", "p", model="./nowhere/at/all"))


def test_the_model_is_loaded_once(folder, model, monkeypatch):
    from kvlock_fast.batch import editor as room

    loaded, load = [], room.load_pipeline
    monkeypatch.setattr(room, "load_pipeline", lambda *a: loaded.append(a[0]) or load(*a))
    manifest = write_manifest(folder, [job(i, source=i % 2, seed=i) for i in range(4)])
    assert batch(manifest, folder / "out", "--model", model, "--no-reports", "--quiet") == 0
    assert loaded == [str(model)]


def test_check_decodes_nothing_twice_and_loads_no_model(folder, model, monkeypatch, capsys):
    from kvlock_fast.batch import check
    from kvlock_fast.media import read_mask

    read, loaded = [], []
    monkeypatch.setattr(check, "read_video", lambda path, **more: read.append(str(path)) or read_video(path, **more))
    monkeypatch.setattr(check, "read_mask", lambda path, **more: read.append(str(path)) or read_mask(path))
    monkeypatch.setattr("kvlock_fast.pipeline.load_diffusers", lambda *a: loaded.append(a))
    for i in range(2, 8):
        (folder / f"s{i}.mkv").write_bytes((folder / "s0.mkv").read_bytes())
    lines = [job(i, source=i % 8, seed=i % 3, mask="m.npy" if i % 2 else "box:1,1,5,5") for i in range(2000)]
    lines[5]["max_frames"] = 2
    manifest = write_manifest(folder, lines)
    assert batch(manifest, folder / "out", "--check", "--model", model, "--json", folder / "c.json") == 0
    assert sorted(read) == sorted({str(folder / f"s{i}.mkv") for i in range(8)} | {str(folder / "m.npy")})
    assert not loaded and not (folder / "out").exists()
    figures = json.loads((folder / "c.json").read_text())
    assert figures["jobs"] == 2000 and figures["files_read"] == 9 and sum(figures["ways"].values()) == 2000
    assert "2000 jobs in" in capsys.readouterr().out


def test_check_looks_into_the_files_and_asks_the_planner(folder, model, capsys, monkeypatch):
    from kvlock_fast.planning.machine import Machine

    (folder / "bad.mkv").write_bytes(b"no video" * 99)
    np.save(folder / "wide.npy", np.ones((8, 64), bool))
    np.save(folder / "empty.npy", np.zeros((16, 16), bool))
    np.save(folder / "grey.npy", np.full((16, 16), 100, np.uint8))
    lines = [
        job(0),
        {**job(1), "source": "bad.mkv"},
        {**job(2), "mask": "wide.npy"},
        {**job(3), "mask": "empty.npy"},
        {**job(4), "layers": [7]},
        {**job(5), "model": "./nowhere"},
        {**job(6), "size": "9999x16"},
        {**job(7), "frames_policy": "error", "max_frames": 2},
        {**job(8), "clip_frames": 4, "clip_overlap": 3},
        {**job(9), "compute": "foreground", "layers": [0]},
        {**job(10), "mask_grow": -9},
        {**job(11), "mask": "box:0=0,0,4,4;2=14,0,4,4"},
        {**job(12), "mask": "grey.npy"},
        {**job(13), "mask": "grey.npy", "mask_threshold": 0.25},
        {**job(14), "mask": "grey.npy", "mask_invert": True},
    ]
    assert batch(write_manifest(folder, lines), folder / "out", "--check", "--model", model, "--quiet") == 2
    *listed, last = capsys.readouterr().err.splitlines()
    found = [re.fullmatch(r"line (\d+): (\w+): .+", line).groups() for line in listed]
    assert found == [
        ("2", "source"), ("3", "mask"), ("4", "mask"), ("5", "layers"), ("6", "model"), ("7", "size"), ("8", "size"),
        ("9", "clip_frames"), ("10", "layers"), ("11", "mask"), ("12", "mask"), ("13", "mask"),
    ]  # fmt: skip
    assert "12 wrong lines" in last
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, *a, **m: cls(None, 1000, 1000)))
    assert batch(write_manifest(folder, [job(0)]), folder / "out", "--check", "--model", model, "--quiet") == 2
    assert "line 1: memory: there is too little memory" in capsys.readouterr().err


class Page(html.parser.HTMLParser):
    """The texts, links and tags of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src")]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_escapes_what_it_shows_and_needs_nothing_else(folder):
    evil = "<img src=x onerror=alert(1)> & 'quotes' \"two\""
    lines = [job(0, prompt=evil), {**job(1), "source_prompt": "</script><b>", "id": "ä #1?", "output": "v/ä #1?.mkv"}]
    lines.append(job(2, prompt="nan"))
    run_batch(write_manifest(folder, lines), folder / "out")
    with Ledger(folder / "out") as ledger:
        Index(folder / "out", ledger, Results(str(folder / "out")), "<title>").write()
        rows = result_rows(ledger)
    page = Page((folder / "out/index.html").read_text())
    assert page.tags.count("article") == 3 and page.tags.count("img") == 2 and page.tags.count("b") == 0
    assert evil in page.texts and "<title>" in page.texts
    outside = [link for link in page.links if not link.startswith(("data:", "./"))]
    assert outside == [] and "./v/%C3%A4%20%231%3F.mkv" in page.links
    assert [row["error"] is None for row in rows] == [True, True, False]
    assert [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()] == rows


def test_a_parquet_table_where_pyarrow_is_there(folder):
    parquet = pytest.importorskip("pyarrow.parquet")
    run_batch(write_manifest(folder, [job(0), job(1)]), folder / "out")
    with Ledger(folder / "out") as ledger:
        Index(folder / "out", ledger, Results(str(folder / "out")), "t").write()
        assert parquet.read_table(folder / "out/results.parquet").to_pylist() == result_rows(ledger)


def test_sources_and_results_in_a_file_system_of_fsspec(folder, model):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("s0.mkv", "m.npy"):
        memory.pipe_file(f"/in/{name}", (folder / name).read_bytes())
    lines = [
        {**job(0), "source": "memory://in/s0.mkv", "mask": "memory://in/m.npy"},
        {**job(1), "source": f"file://{folder}/s0.mkv"},
        {**job(2), "source": "memory://in/gone.mkv"},
    ]
    manifest = write_manifest(folder, lines[:2])
    options = ("--model", model, "--quiet", "--results", "memory://results/run")
    assert batch(manifest, folder / "out", *options) == 0
    assert sorted(memory.find("/results/run")) == [
        "/results/run/reports/j0.html", "/results/run/reports/j1.html", "/results/run/videos/j0.mkv",
        "/results/run/videos/j1.mkv",
    ]  # fmt: skip
    rows = ledger_rows(folder / "out")
    assert rows["j0"]["bytes"] == memory.size("/results/run/videos/j0.mkv")
    assert 'href="memory://results/run/videos/j0.mkv"' in (folder / "out/index.html").read_text()
    memory.rm("/results/run/videos/j1.mkv")
    assert batch(manifest, folder / "out", *options) == 0
    assert {id: row["commits"] for id, row in ledger_rows(folder / "out").items()} == {"j0": 1, "j1": 2}


def test_places(folder):
    assert is_there("s0.mkv", folder) and is_there(f"file://{folder}/s0.mkv", Path())
    assert not is_there("no.mkv", folder) and not is_there("x" * 5000, folder) and not is_there("memory://no", folder)
    with pytest.raises(InputError, match=r"nosuch://a.*cannot be reached"):
        is_there("nosuch://a", folder)
    with pytest.raises(InputError, match="'memory://no' does not exist"), fetched("memory://no", folder):
        pass
    results = Results("memory://there")
    results.write("a/b.txt", b"one")
    results.write("a/b.txt", b"second")
    assert results.size("a/b.txt") == 6 and results.size("a") is None and results.size("a/c.txt") is None
    (folder / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        Results(str(folder / "file"))


def state(**more) -> State:
    counts = {"pending": 5, "running": 2, "done": 3, "failed": 0}
    running = [Running(1, ("a", "b"), "denoise", 5, 20, 10.0), Running(2, ("c",), "read", 0, 1, 1.0)]
    return State(**{"counts": counts, "running": running, "finished": 4, "made": 3, "seconds": 60.0, **more})


def test_what_is_shown():
    assert watching.summary_line(state()) == "3 of 10 done, 2 running, 180 an hour, 2:20 left"
    assert watching.running_line(state().running[0]) == "a and 1 more: denoising 5/20, 0:30 left"
    assert watching.running_line(state().running[1]) == "c: reading"
    assert watching.clock(3725) == "1:02:05"


def test_lines_where_there_is_no_terminal(capsys):
    with watching.shown(quiet=False) as watch:
        for _ in range(3):
            watch(state())
        watch(state(counts={"pending": 0, "running": 0, "done": 9, "failed": 1}, running=[]))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("batch: 3 of 10 done") and "9 of 10 done, 1 failed" in lines[1]
    with watching.shown(quiet=True) as watch:
        watch(state())
    assert capsys.readouterr().err == ""


def test_a_display_on_a_terminal():
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with watching.shown(quiet=False, stream=stream) as watch:
        watch(state())
    assert "3 of 10 done" in stream.getvalue() and "a and 1 more: denoising 5/20" in stream.getvalue()


def test_the_figures_for_prometheus_are_well_formed():
    from prometheus_client.parser import text_string_to_metric_families

    sample = re.compile(r"[a-z_]+(\{[a-z]+=\"[a-z ]+\"\})? (NaN|[0-9.e+-]+)")
    for text in (watching.metrics_text(state()), watching.metrics_text(state(made=0, running=[]))):
        lines = text.splitlines()
        names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
        assert len(names) == len(set(names)) and text.endswith("\n")
        for line in lines:
            assert line.startswith(("# HELP kvlock_batch_", "# TYPE kvlock_batch_")) or sample.fullmatch(line), line
            assert line.startswith("#") or re.match(r"[a-z_]+", line)[0] in names
    families = list(text_string_to_metric_families(watching.metrics_text(state())))
    assert {family.name: family.type for family in families} == {
        "kvlock_batch_jobs": "gauge",
        "kvlock_batch_passes_running": "gauge",
        "kvlock_batch_finished": "counter",
        "kvlock_batch_edits_per_hour": "gauge",
        "kvlock_batch_seconds_left": "gauge",
        "kvlock_batch_updated_seconds": "gauge",
    }
    found = {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}
    assert time.time() - found.pop(("kvlock_batch_updated_seconds",)) < 60
    assert found == {
        ("kvlock_batch_jobs", "pending"): 5,
        ("kvlock_batch_jobs", "running"): 2,
        ("kvlock_batch_jobs", "done"): 3,
        ("kvlock_batch_jobs", "failed"): 0,
        ("kvlock_batch_passes_running", "denoise"): 1,
        ("kvlock_batch_passes_running", "read"): 1,
        ("kvlock_batch_finished_total",): 4,
        ("kvlock_batch_edits_per_hour",): 180,
        ("kvlock_batch_seconds_left",): 140,
    }


def test_a_figure_file_that_cannot_be_written_costs_no_job(folder):
    metrics = folder / "there" / "m.prom"
    metrics.parent.mkdir()

    class Remover:
        def __call__(self, state):
            metrics.unlink(missing_ok=True)
            if metrics.parent.exists():
                metrics.parent.rmdir()

    states = []
    watch = watching.all_of([Remover(), watching.MetricsFile(metrics), states.append])
    with pytest.warns(UserWarning, match=r"cannot write '.*m.prom'") as warned:
        for _ in range(3):
            watch(state(ended=True))
    assert len(warned) == 1 and len(states) == 3
