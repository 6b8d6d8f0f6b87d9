"""The benchmarks of foreground-only computation, small: what they count is there, and a wrong edit stops them."""

import json

import numpy as np
import pytest
import torch

from bench.quality import foreground as foreground_quality
from bench.steps import foreground
from bench.steps.foreground_cases import FOREGROUND, FULL, ModelEdits, RandomEdits, box

QUICK = ["--device", "cpu", "--size", "32x48", "--steps", "2", "--rounds", "1", "--batches", "1", "2"]
EDIT_KEY = "speedup_edit_full_over_foreground"


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench") / "new" / "foreground.json"
    assert foreground.main([*QUICK, "--mask-share", "0.2", "0.4", "--json", str(output)]) == 0
    return json.loads(output.read_text(), parse_constant=pytest.fail)


def test_every_share_has_its_figures(figures):
    small, large = figures["rows"]
    assert 0.1 < small["mask_share"] < 0.3 < large["mask_share"] < 0.6
    for row in figures["rows"]:
        assert row["error"] < 1e-4 and row["speedup_step_full_over_foreground"] > 0
        assert set(row["cost_per_edit"]) == {FULL, FOREGROUND} and set(row["cost_per_edit"][FULL]) == {"1", "2"}
        assert row["share_of_bound"] == pytest.approx(row["speedup_step_full_over_foreground"] / row["bound"])
    assert small["bound"] > large["bound"] > 1


def test_the_edits_figure_stands_once_at_20_percent(figures):
    assert json.dumps(figures).count(f'"{EDIT_KEY}"') == 1
    row = figures["rows"][0]
    assert figures[EDIT_KEY] == row["edit_ratio"]
    assert figures["speedup_step_full_over_foreground"] == row["speedup_step_full_over_foreground"]
    assert foreground.headline(figures["rows"][1:]) == {}


def test_the_bound_is_the_models_own_arithmetic(tmp_path):
    """By hand, multiplications of both branches: products of N tokens, attention to all and to the text."""
    edits = ModelEdits("demo", (32, 48), 0.2, torch.device("cpu"), tmp_path)
    config = edits.pipe.model.transformers[0].config
    dim, tokens, layers = config.num_attention_heads * config.attention_head_dim, edits.tokens, config.num_layers
    computed = round(edits.share * tokens)

    def blocks(n):
        products = n * (6 * dim * dim + 2 * dim * config.ffn_dim)
        return 2 * 2 * layers * (products + 2 * n * (tokens + edits.pipe.model.text_length) * dim)

    full, sparse = (edits.flops(name) for name in (FULL, FOREGROUND))
    assert full - sparse == pytest.approx(blocks(tokens) - blocks(computed), rel=0.01)


def test_random_weights_have_steps_only():
    edits = RandomEdits("quick", 0.3, torch.device("cpu"), torch.float32)
    row = foreground.measure(edits, 0.3, 3, 1, (1, 2), torch.float32)
    assert row["edit_ratio"] is None and row["edit_seconds"] is None and row["bound"] > 1
    assert "| - | - |" in foreground.table([row])


def test_another_edit_stops_the_benchmark(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(foreground, "ALLOWED", {torch.float32: 0.0})
    output = tmp_path / "foreground.json"
    assert foreground.main([*QUICK, "--mask-share", "0.2", "--json", str(output)]) == 1
    assert "the foreground-only edit is another" in capsys.readouterr().err and not output.exists()


@pytest.mark.parametrize("share", [0.05, 0.2, 0.64])
def test_a_box_has_its_share(share):
    mask = box(3, 128, 192, share, 8)
    assert mask.mean() == pytest.approx(share, abs=0.03)
    cells = mask.reshape(3, 16, 8, 24, 8)
    assert np.array_equal(cells.any((2, 4)), cells.all((2, 4))), "whole cells"


def test_quality_reaches_its_shares():
    import kvlock_fast as kvf

    pipe = kvf.KVLockPipeline.from_pretrained("demo", torch_dtype=torch.float32)
    for share in (0.1, 0.4):
        case = foreground_quality.case_of_share(foreground_quality.SEEDS, "both", share, pipe)
        assert foreground_quality._share(case.mask, pipe) == pytest.approx(share, abs=0.06)
        assert not (case.source.mask & ~case.mask).any() and not (case.target.mask & ~case.mask).any()


def test_quality_compares_pairs():
    rows = type("Rows", (), {})()
    figures = {"psnr": 30.0, "ssim": 0.9, "ring_psnr": 20.0, "share": 0.2, "computed": 1.0}
    rows.rows = {
        f"kvlock/0.2/{what}/{i}": {"key": "", "right": i > 0, **figures, "psnr": 30.0 + i + shift}
        for i in range(3)
        for what, shift in (("full", 0.0), ("foreground", -0.5))
    }
    summary = foreground_quality.summarise(rows)
    change = summary["kvlock/0.2/foreground"]["change"]["psnr"]
    assert change["mean"] == pytest.approx(-0.5) and change["low"] == pytest.approx(-0.5)
    assert "change" not in summary["kvlock/0.2/full"] and "-0.50" in foreground_quality.table(summary)
