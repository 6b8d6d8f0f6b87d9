"""The benchmarks, as far as they go without a GPU: every row is built and checked on tiny shapes, none is invented."""

import json
import math
from dataclasses import replace

import pytest
import torch

from bench.kernels import __main__ as kernels
from bench.kernels import measure, ncu, path_cases, plot, tables
from bench.kernels.attention_cases import tiles
from bench.kernels.measure import Case, Contender, check, input_sets, time_case
from bench.kernels.shapes import SHAPES, Plan, Shape, plans
from kvlock_fast.kernels import attention
from kvlock_fast.kernels.attention import Tiles

pytest.importorskip("triton")

TINY = Shape("tiny", 70, 2, 64, "rms_across_heads", 1, (2, 2, 6, 8))
FEW = replace(TINY, queries=20)
ROWS = {
    "attention": Plan("attention", TINY),
    "few queries": Plan("attention", FEW),
    "sweep": Plan("sweep", replace(TINY, heads=1, tokens=40)),
    "splits": Plan("sweep", FEW),
    "dispatch": Plan("dispatch", TINY, "fp8_e4m3"),
    "dispatch few": Plan("dispatch", FEW, "native"),
    "locked": Plan("locked", TINY),
    "locked, layer norm": Plan("locked", replace(TINY, norm="layer", angle_heads=0)),
    "locked, angles by head": Plan("locked", replace(TINY, norm="rms", angle_heads=2)),
    "prologue": Plan("prologue", TINY, "int4"),
    "prologue unlocked": Plan("prologue", TINY, "none"),
    "blend": Plan("blend", TINY, "int8"),
    "blend native": Plan("blend", TINY, "native"),
    **{f"quantize {f}": Plan("quantize", TINY, f) for f in ("bf16 k", "fp8_e4m3 k", "fp8_e4m3 k 128", "int4 v")},
    "dequantize": Plan("dequantize", TINY, "int4 k"),
    "epilogue": Plan("epilogue", TINY),
    **{f: Plan("guidance", TINY, f) for f in ("cfg_projection", "guided_prediction", "windowed_variance")},
}


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setattr(path_cases, "_compiled", lambda lines: lines)
    monkeypatch.setattr(kernels, "count_launches", lambda contender: 1)
    torch.manual_seed(0)


@pytest.fixture
def _briefly(monkeypatch):
    """Two samples of everything: Triton's interpreter is slow."""
    for name in ("LEAST_SAMPLES", "MOST_SAMPLES"):
        monkeypatch.setattr(measure, name, 2)
    monkeypatch.setattr(measure, "WARM_UP_CALLS", 1)


class Clock:
    """A device on which calls last 1, 2 or 3 ms."""

    def __init__(self):
        self.order = []

    def sample(self, contender, calls, first, sets):
        self.order.append(contender)
        contender.before()
        contender.run(first % sets)
        return 1e-3 * (1 + len(self.order) % 3), 1e-5, False

    def wait(self):
        pass


@pytest.mark.parametrize("plan", [pytest.param(plan, id=name) for name, plan in ROWS.items()])
def test_every_contender_computes_its_row(plan):
    case = kernels.PARTS[plan.part](plan.shape, plan.variant, "cpu")
    found = check(case)
    assert any(name.startswith(("triton", "route triton")) for name in found)
    failed = {name: f["problem"] for name, f in found.items() if f["problem"] and "cudnn" not in name}
    assert not failed and all(f["error"] is None or math.isfinite(f["error"]) for f in found.values())


@pytest.mark.usefixtures("_briefly")
def test_a_row_has_figures_for_what_ran_and_null_for_what_did_not():
    row = kernels.measure_row(Plan("attention", TINY), Clock(), "cpu")
    json.dumps(row, allow_nan=False)
    ours, cudnn, absent = (row["contenders"][name] for name in ("triton", "cudnn", "flash-attn 3"))
    assert 1 <= ours["ms"] <= 3 and ours["tflops"] == pytest.approx(4 * 70 * 70 * 2 * 64 / ours["ms"] / 1e9)
    assert ours["percent_of_ceiling"] > 0 and ours["samples"] == 2 and ours["host_us"] == pytest.approx(10)
    assert cudnn["ms"] is None and cudnn["problem"] and absent["problem"] == "not installed"
    sdpa = row["contenders"]["sdpa"]["ms"] / ours["ms"]
    assert {peer: r for peer, r in row["ratios"]["triton"].items() if r} == {"sdpa": sdpa}
    assert set(row["ratios"]["triton"]) >= {"cudnn", "flash-attn 2", "flash-attn 3", "flash-attn 4", "sageattention"}
    assert "unmeasured" not in row and "TFLOP/s" in kernels.lines(row)


def case_of(**contenders) -> Case:
    return Case(contenders, lambda: torch.ones(8), sets=3)


def test_what_computes_something_else_is_not_timed():
    def fails(i):
        raise RuntimeError("no such kernel\nmore")

    case = case_of(
        right=Contender(lambda i: torch.ones(8), "ours"),
        near=Contender(lambda i: torch.full((8,), 1.005), "ours"),
        off=Contender(lambda i: torch.full((8,), 1.02), "ours"),
        nan=Contender(lambda i: torch.tensor([float("nan")] * 8), "peer"),
        broken=Contender(fails, "peer"),
    )
    found = check(case)
    assert [found[name]["problem"] for name in ("right", "near")] == [None, None]
    assert found["off"]["problem"].startswith("wrong: relative error 0.02")
    assert found["nan"] == {"error": None, "problem": "wrong: relative error inf, allowed 0.01"}
    assert found["broken"]["problem"] == "RuntimeError: no such kernel"
    empty = {"kind": "ours", "problem": "wrong"}
    rows = [{"part": "p", "shape": "s", "variant": "", "contenders": {"triton": empty, "x": empty | {"kind": "peer"}}}]
    assert kernels.wrong(rows) == ["p s : triton: wrong"]


def test_samples_are_interleaved_and_inputs_rotate():
    seen = {name: [] for name in "ab"}
    case = case_of(**{name: Contender(seen[name].append, "ours") for name in seen})
    clock = Clock()
    figures = time_case(case, list(seen), clock)
    turns = clock.order[2:]  # after the two first guesses
    pairs = [set(map(id, turns[i : i + 2])) for i in range(0, len(turns), 2)]
    assert len(turns) == 2 * figures["a"]["samples"] and all(len(pair) == 2 for pair in pairs)
    assert all(set(sets) == {0, 1, 2} for sets in seen.values())
    assert all(f["ms_low"] <= f["ms"] <= f["ms_high"] for f in figures.values())


def test_inputs_fill_more_than_the_cache():
    assert input_sets(1 << 30) == 2 and input_sets(32 << 20) * (32 << 20) >= 2 * (50 << 20)
    assert input_sets(1) <= 64


def test_a_candidate_replaces_the_tiles_only_while_it_runs():
    q, before = torch.empty(1, 8, 1, 128, device="meta"), dict(attention.TILES[80])
    with tiles(attention.TILES, q, (64, 32, 4, 2)):
        assert attention.TILES[80][128] == Tiles(64, 32, 4, 2)
    assert attention.TILES[80] == before


def test_the_plan_covers_the_models_and_every_part():
    rows = plans()
    assert len(set(rows)) == len(rows) and {plan.part for plan in rows} == set(kernels.PARTS)
    assert {plan.shape.name for plan in rows if plan.part == "attention"} == set(SHAPES)
    assert {plan.part for plan in plans(quick=True)} == set(kernels.PARTS)
    for shape in SHAPES.values():
        frames, height, width = shape.latents[1:]
        text = {"cogvideox-2b": 226, "cogvideox-5b": 226, "hunyuan-video": 256}.get(shape.name, 0)
        if shape.name not in ("ltx", "985-on-62k"):
            assert frames * (height // 2) * (width // 2) == shape.tokens - text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    assert kernels.main(["--output", str(tmp_path / "k.json")]) == 2
    error = capsys.readouterr().err
    assert error == "error: there is no CUDA device to measure on; --dry-run lists the rows\n"
    assert not (tmp_path / "k.json").exists()


def test_a_dry_run_lists_the_rows_with_every_figure_null(tmp_path, capsys):
    file = tmp_path / "sub" / "k.json"
    assert kernels.main(["--quick", "--dry-run", "--commit", "abc", "--output", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["machine"]["commit"] == "abc" and set(found["ceilings"].values()) == {None}
    assert {row["part"] for row in found["rows"]} == set(kernels.PARTS)
    for row in found["rows"]:
        assert row["unmeasured"] == "a dry run" and {"tokens", "heads", "dim"} <= set(row)
        assert all(f[name] is None for f in row["contenders"].values() for name in kernels.FIGURES)
        assert all(ratio is None for by_peer in row["ratios"].values() for ratio in by_peer.values())
    assert "unmeasured" in capsys.readouterr().out
    assert tables.main([str(file)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Unmeasured") or torch.cuda.is_available()
    assert "(met)" not in text and "(missed)" not in text
    assert plot.main([str(file), str(tmp_path / "plots")]) == 2
    assert "nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize("module", [tables, plot], ids=["tables", "plot"])
def test_bad_files_are_one_sentence(module, capsys):
    assert module.main(["/no/such/file", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: give ")


def test_an_unknown_shape_is_one_sentence(capsys):
    assert kernels.main(["--dry-run", "--shapes", "wan-9b"]) == 2
    assert capsys.readouterr().err.endswith(", got 'wan-9b'\n")


@pytest.fixture
def measured(tmp_path):
    """A file of figures that are made up, for what reads them."""
    about = dict(tokens=70, queries=70, heads=2, dim=64, variant="")

    def row(part, shape="wan-1.3b", variant="", **times):
        made = {}
        for name, ms in times.items():
            kind = "ours" if name.startswith(("triton", "route")) else "peer"
            made[name] = kernels.EMPTY | {"kind": "unlocked" if "unlocked" in name else kind, "ms": ms}
            made[name] |= {"tflops": ms and 100 / ms, "launches": 3}
        more = {"part": part, "shape": shape, "variant": variant, "contenders": made}
        return about | more | {"ratios": kernels.ratios(made)}

    rows = [
        row("locked", **{"triton": 1.0, "triton fp8": 2.0, "unlocked triton": 2.0, "eager + cudnn": 2.0}),
        row("attention", triton=2.0, sdpa=2.0, cudnn=None),
        row("epilogue", triton=1.0, eager=4.0),
        row("dispatch", "70-on-70", "native", **{"route fused": 2.0, "route triton": 1.0, "route cudnn": None}),
    ]
    machine = {"gpu": "A GPU", "versions": {"torch": "2"}, "commit": "abc"}
    ceilings = {"copy_gbps": 4000.0, "bf16_tflops": 700.0, "fp8_tflops": None}
    file = tmp_path / "k.json"
    file.write_text(json.dumps({"machine": machine, "ceilings": ceilings, "rows": rows}))
    return file


def test_tables_say_met_missed_or_unmeasured(measured, capsys):
    assert tables.main([str(measured)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("One A GPU; torch 2; commit abc. Ceilings measured beside it: copy gbps 4000, bf16")
    path, compiled, wide, narrow, prologue, unlocked, epilogue, *later = lines[4:17]
    assert path.endswith("| bf16 2x (met), fp8 1x (missed) |")
    assert compiled.endswith("bf16 unmeasured, fp8 unmeasured |")
    assert wide.endswith("| cuDNN unmeasured, default 1x (missed) |") and narrow.endswith("cuDNN unmeasured |")
    assert unlocked.endswith("| triton 0.5 (met), prologue + cudnn unmeasured |")
    assert epilogue.endswith("| 4x (missed), launches 3 (met) |") and prologue.endswith("| unmeasured |")
    assert len(later) == 6 and all(line.endswith("| unmeasured |") for line in later)
    assert "| locked wan-1.3b | triton | 1.0000 | eager + cudnn | 2.0000 | 2.00x |" in lines
    assert lines[-1] == "| 70 | 70 | 2 x 64 | native | triton | 2.0000 | 1.0000 | - | - |"


def test_pictures_are_drawn_of_what_was_measured(measured, tmp_path):
    assert plot.main([str(measured), str(tmp_path / "plots")]) == 0
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["ratios.png", "roofline.png"]


def test_the_profilers_figures_by_kernel(tmp_path):
    text = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"
"","","us","register/thread"
"0","_blend_kernel","1,234.5","32"
"1","_blend_kernel","10","32"
"""
    (tmp_path / "ncu.csv").write_text(text)
    assert ncu.read(tmp_path / "ncu.csv") == [
        {"kernel": "_blend_kernel", "gpu__time_duration.sum, us": 1234.5, "launch__registers_per_thread": 32.0},
        {"kernel": "_blend_kernel", "gpu__time_duration.sum, us": 10.0, "launch__registers_per_thread": 32.0},
    ]
