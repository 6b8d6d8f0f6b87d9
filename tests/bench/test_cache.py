"""The cache's benchmark: its arithmetic and measures against oracles, and all of it once, quickly."""

import json
import math
import platform
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_wan

from bench.cache import __main__ as cache
from bench.cache import plot, speed, tables
from bench.cache.quality import (
    Edits,
    Setting,
    Variant,
    capture,
    case_of,
    finite_psnr,
    neighbour,
    rotate,
    sqnr,
    variants,
)
from bench.cache.speed import Disk, interleaved, packing, shape_of
from bench.quality.demo_model import Rows
from kvlock_fast.loop.stored_source import thinned_steps
from kvlock_fast.planning.job import Job
from kvlock_fast.planning.known_models import MODELS

SETTING = Setting()


@pytest.fixture(scope="module")
def editor():
    return cache.load_editor()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The file of a quick run, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **options: printed.append(" ".join(map(str, words))))
        options = ["--quick", "--commit", "abc", "--work", str(folder / "w.jsonl"), "--output", str(folder / "c.json")]
        assert cache.main(options) == 0
    return folder / "c.json", "\n".join(printed)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_sqnr_is_that_of_fp64(scale):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2, 30, 3, 8)) * scale).astype(np.float32)
    out = (x + rng.normal(size=x.shape) * 0.01 * scale).astype(np.float32)
    noise = x.astype(np.float64) - out.astype(np.float64)
    want = 10 * np.log10(np.square(x, dtype=np.float64).sum() / np.square(noise).sum())
    assert sqnr(torch.from_numpy(x), torch.from_numpy(out)) == pytest.approx(want, rel=1e-12)
    assert want == pytest.approx(40, abs=0.5)


def test_sqnr_of_nothing_lost_and_of_everything_lost():
    x = torch.randn(3, 4)
    assert sqnr(x, x.clone()) == math.inf and sqnr(x, torch.zeros_like(x)) == pytest.approx(0)


def test_captured_keys_are_those_that_attention_gets(editor, monkeypatch):
    """After RoPE: bit for bit what diffusers hands to its attention."""
    seen, stock = [], transformer_wan.dispatch_attention_fn

    def recorded(query, key, value, **options):
        if key.shape[1] == query.shape[1]:
            seen.append((key.clone(), value.clone()))
        return stock(query, key, value, **options)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", recorded)
    case, seed = case_of(0)
    found = {(stage, layer): x for _, stage, layer, x in capture(editor, case, seed, (2,), Setting(steps=4))}
    layers = len(editor.model.arch.attentions(editor.model.transformers[0]))
    assert len(seen) == layers and len(found) == 3 * layers
    for layer, (key, value) in enumerate(seen):
        held = found["K after RoPE", layer]
        background = [int((key == held[:, i : i + 1]).all((2, 3)).nonzero()[0, 1]) for i in range(held.shape[1])]
        assert background == sorted(set(background)) and len(background) < key.shape[1]
        assert torch.equal(found["V", layer], value[:, background])
        assert not torch.equal(found["K before RoPE", layer], held)


def test_rotation_keeps_lengths():
    x, angle = torch.randn(1, 5, 2, 8, dtype=torch.float64), torch.randn(1, 5, 1, 4, dtype=torch.float64)
    angle = angle.repeat_interleave(2, -1)
    torch.testing.assert_close(rotate(x, angle.cos(), angle.sin()).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(rotate(x, angle.cos(), angle.sin()), angle.cos(), -angle.sin()), x)


def test_every_variant_is_there_once_and_the_important_are_first():
    rows = variants()
    assert len({row.name for row in rows}) == len(rows) == 2 * (1 + 5 * 3 * 2) + 8
    assert rows[0].format is None and set(variants(quick=True)) <= set(rows)
    names = [row.name for row in rows]
    for latents in ("model", "source"):  # lockstep is compared with, so it comes before
        assert names.index(f"{latents}/lockstep") == min(i for i, row in enumerate(rows) if row.latents == latents)


@pytest.mark.parametrize(
    ("variant", "steps"),
    [
        (Variant("model"), []),
        (Variant("model", "int8"), list(range(20))),
        (Variant("model", "int8", 4), [1, 5, 9, 13, 17]),
        (Variant("model", "int8", 4, "dynamic"), [13, 17]),
        (Variant("source", "int8", 4, "all", 0), [0, 4, 8, 12, 16]),
        (Variant("source", "int8", 4, "all", 3), [3, 7, 11, 15, 19]),
        (Variant("source", "int8", 4, "all", 3, 0), [3, 7, 11, 15, 16]),
    ],
    ids=lambda value: value.name if isinstance(value, Variant) else "",
)
def test_the_steps_that_are_stored(variant, steps):
    assert variant.stored_steps(SETTING) == steps


def test_a_neighbour_stands_for_its_own_run_only():
    from kvlock_fast.loop import stored_source

    with neighbour(2):
        slots = stored_source.thinned_steps([0, 1, 2, 3, 4, 5], 4, lambda k: 0)
    assert slots == {0: 2, 1: 2, 2: 2, 3: 2, 4: 5, 5: 5}
    with neighbour(0, last=1):
        assert stored_source.thinned_steps([0, 1, 3, 4, 5], 2, lambda k: 0) == {0: 0, 1: 0, 3: 3, 4: 3, 5: 5}
    assert stored_source.thinned_steps is thinned_steps


def test_packing_is_the_layouts_and_the_planners():
    rows = packing()
    assert len(rows) == 4 * 4
    for row in rows:
        name, frames = row["shape"].split()
        model, frames = MODELS[name], int(frames.removesuffix("f"))
        shape = shape_of(name, frames, row["format"])
        job = Job(model, frames, model.height, model.width, row["background"], 50, 50)
        assert (row["tokens"], row["naive_bytes_per_step"]) == (job.tokens, job.naive_bytes_per_step)
        assert row["bytes_per_step"] == job.layout(row["format"]).nbytes == shape.layout.new_arena("meta").nbytes
        assert row["equal_steps"] == job.naive_bytes_per_step / row["bytes_per_step"]
        assert row["kept_steps"] == pytest.approx(2.5 * row["equal_steps"])
        assert row["host_tier"] == pytest.approx(25 * row["equal_steps"])


@pytest.mark.parametrize(("dim", "model"), [(128, "wan-1.3b"), (64, "cogvideox-5b")])
def test_packing_by_hand(dim, model):
    """Bytes a number, but for the alignment: fp8 1 + 4 / D, which in heads of 64 stand for 128 tokens; int4 half and
    two bf16 of every 64.
    """
    by = {row["format"]: row for row in packing() if row["shape"].startswith(model)}
    assert by["bf16"]["equal_steps"] == pytest.approx(1 / 0.8, rel=1e-4)
    assert by["fp8_e4m3"]["equal_steps"] == pytest.approx(
        2 / (1 + 4 / (dim if dim > 64 else 128 * dim)) / 0.8, rel=1e-4
    )
    assert by["int4"]["equal_steps"] == pytest.approx(2 / (0.5 + 4 / 64) / 0.8, rel=1e-3)


def test_pieces_are_interleaved_and_only_they_are_timed(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def takes(name, seconds):
        order.append(name)
        clock[0] += seconds

    work = {"a": lambda: takes("a", 1.0), "b": lambda: takes("b", 3.0)}
    found = interleaved(work, 4, before=lambda: takes("before", 9.0), after=lambda: takes("after", 9.0), warm_up=2)
    assert {name: (f["seconds"], f["rounds"]) for name, f in found.items()} == {"a": (1.0, 4), "b": (3.0, 4)}
    pieces = [name for name in order if name in work]
    assert len(pieces) == 12 and all({*pieces[i : i + 2]} == {"a", "b"} for i in range(0, 12, 2))
    assert order.count("before") == order.count("after") == 12


def test_what_is_read_is_compared_with_what_was_written(tmp_path):
    disk = Disk(tmp_path, 1, 2)
    assert disk.wrong() == [] and 0.9e6 < disk.nbytes <= 1e6
    for ways in (disk.writes(), disk.reads()):
        for run in ways.values():
            run()
    for tensors in disk.tensors.values():
        next(iter(tensors.values())).view(torch.uint8).bitwise_xor_(1)
    assert disk.wrong() == ["ours", "load_file"]


def test_psnr_of_the_same_video_is_finite():
    video = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    assert finite_psnr(video, video) == pytest.approx(100)
    assert finite_psnr(video, video ^ 1) == pytest.approx(20 * math.log10(255))


def test_finished_edits_are_not_made_again(tmp_path, monkeypatch):
    made = []

    def one(self, variant, i):
        made.append((variant.name, i))
        return {"psnr": 30.0 + i, "psnr_locked": 31.0 + i * (variant.format is not None), "right": i > 0}

    monkeypatch.setattr(Edits, "one", one)
    for _ in range(2):
        edits = Edits(None, Rows(tmp_path / "w.jsonl", {"a": 1}), SETTING)
        for variant in (Variant("model"), Variant("model", "int4", 4)):
            row = edits.run(variant, range(2))
    assert edits.finished(Variant("model"), range(2)) and not edits.finished(Variant("model"), range(3))
    assert len(made) == 4 and row["cases"] == 2 and row["stored_steps"] == [1, 5, 9, 13, 17]
    assert row["psnr"]["mean"] == 30.5 and row["change"]["psnr_locked"]["mean"] == 0.5 and row["right"]["mean"] == 0.5


def test_no_row_is_begun_after_the_budget_but_finished_ones_are_told(monkeypatch):
    rows = variants(quick=True)
    edits = SimpleNamespace(
        setting=SETTING,
        run=lambda variant, cases: {"name": variant.name, "psnr": {"mean": 1.0}},
        finished=lambda variant, cases: variant == rows[2],
    )
    clock = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr(cache.time, "monotonic", lambda: next(clock))
    found = cache.measure_edits(edits, rows, range(1), budget=10)
    assert ["unmeasured" in row for row in found] == [False, True, False]


def test_a_quick_run_measures_every_part(quick):
    file, printed = quick
    text = file.read_text()
    found = json.loads(text)
    assert found["machine"]["commit"] == "abc" and "gpu" in found["machine"] and found["settings"]["kappa"] == 1
    assert {row["stage"] for row in found["errors"]} == {"K before RoPE", "K after RoPE", "V"}
    assert all(5 < row["sqnr_db"]["mean"] < 70 for row in found["errors"])
    lockstep, int4, _ = found["edits"]
    assert "bytes" not in lockstep and int4["ratio"]["mean"] > 4 and int4["psnr"]["mean"] > 5
    assert len(found["packing"]) == 16
    hits = found["hits"]
    assert set(hits) == {"lockstep", "resident native", "host native", "disk native"}
    assert all(f["error"] <= speed.NATIVE_ERROR and f["seconds"] > 0 for f in hits.values())
    assert hits["lockstep"]["forwards"] == 9 and hits["disk native"]["forwards"] == 6
    assert found["disk"]["wrong"] == [] and found["disk"]["write"]["ours"]["gbps"] > 0
    assert platform.node() not in text and str(file.parent) not in text and "/" not in found["settings"]["model"]
    assert file.with_suffix(".png").stat().st_size > 10_000
    assert all(len(line) <= 100 for line in printed.splitlines()) and "Targets" in printed


def test_the_targets_are_met_missed_or_unmeasured(quick):
    file, _ = quick
    found = json.loads(file.read_text())
    lines = tables.targets(found).splitlines()[1:]
    assert lines[0].startswith("met ") and lines[0].endswith(": 2.42 2.42 2.50 2.50")
    assert sum(line.startswith("met ") for line in lines) == 6  # those of fp8, and int4's records
    assert sum(line.startswith("unmeasured (GPU)") for line in lines) == 2 and "on this CPU" in lines[-2]
    assert tables.targets(found | {"packing": None, "hits": None}).count("unmeasured") == 8


def test_tables_and_picture_from_the_file(quick, tmp_path, capsys):
    file, printed = quick
    assert tables.main([str(file)]) == 0
    assert capsys.readouterr().out.strip() in printed
    copy = tmp_path / "c.json"
    copy.write_bytes(file.read_bytes())
    assert plot.main([str(copy)]) == 0 and copy.with_suffix(".png").exists()


def test_a_dry_run_lists_the_rows_without_figures(tmp_path, capsys):
    file = tmp_path / "sub" / "c.json"
    assert cache.main(["--dry-run", "--output", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [row["name"] for row in found["edits"]] == [variant.name for variant in variants()]
    assert all(row["unmeasured"] == "a dry run" for row in found["edits"])
    assert (found["errors"], found["hits"], found["disk"]) == (None, None, None)
    assert (
        "unmeasured (a dry run): lockstep, native/1/all" in capsys.readouterr().out
        and not file.with_suffix(".png").exists()
    )
    assert plot.main([str(file)]) == 2
    assert "nothing to draw" in capsys.readouterr().err


@pytest.mark.parametrize("module", [tables, plot], ids=["tables", "plot"])
def test_bad_files_are_one_sentence(module, capsys):
    assert module.main(["/no/such/file"]) == 2
    assert capsys.readouterr().err.startswith("error: give one file of figures")


def test_a_wrong_hit_or_read_fails_the_run():
    hits = {"lockstep": {"error": 0.0}, "host native": {"error": 0.1}, "host fp8_e4m3": {"error": 0.1}}
    lines = cache.wrong({"hits": hits, "disk": {"wrong": ["ours"]}})
    assert [line.partition(":")[0] for line in lines] == ["host native", "ours"]


def row(bytes, psnr, right):
    return {"bytes": {"mean": bytes}, "psnr_locked": {"mean": psnr}, "right": {"mean": right}}


def test_the_front_is_what_nothing_beats():
    rows = [row(4, 30, 1.0), row(2, 30, 1.0), row(1, 29, 1.0), row(3, 29, 0.9), row(2, 30, 1.0)]
    assert [tables.on_front(r, rows) for r in rows] == [False, True, True, False, True]
