"""The benchmark of whole steps, on the CPU: its contenders agree, and what it counts is there to be counted."""

import json

import pytest
import torch

from bench.steps import __main__ as steps
from bench.steps.cases import SHAPES, Steps

OURS = ("ours, lockstep", "ours, resident fp8", "ours, host fp8", "ours, lockstep, fast", "ours, resident fp8, fast")


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    output = tmp_path_factory.mktemp("step") / "step.json"
    assert steps.main(["--quick", "--cpu", "--steps", "5", "--rounds", "1", "--output", str(output)]) == 0
    return json.loads(output.read_text())


def test_every_contender_is_measured(figures):
    assert figures["machine"]["gpu"] is None
    assert [shape["shape"] for shape in figures["shapes"]] == ["quick", "quick cogvideox"]
    names = {"diffusers, no lock", "lock in plain torch", *OURS}
    assert all(set(shape["contenders"]) == names for shape in figures["shapes"])
    for row in (row for shape in figures["shapes"] for row in shape["contenders"].values()):
        assert row["problem"] is None and row["ms"] > 0 and row["floor_ms"] > 0
        assert row["share_of_floor"] is None  # an H200's floor says nothing of a CPU


def test_our_loop_is_the_lock_in_plain_torch(figures):
    """Two programs that share nothing but the model agree on the latents."""
    for rows in (shape["contenders"] for shape in figures["shapes"]):
        for name in OURS:
            assert rows[name]["error"] < (1e-3 if "fp8" in name else 1e-5), name


@pytest.mark.parametrize("shape", [0, 1], ids=["wan", "cogvideox"])
def test_our_steps_read_nothing_and_launch_less(figures, shape):
    rows = figures["shapes"][shape]["contenders"]
    plain = rows["lock in plain torch"]
    assert plain["host_reads"] > 0
    for name in OURS:
        assert rows[name]["host_reads"] == 0
        assert rows[name]["launches"] < plain["launches"] and rows[name]["allocations"] < plain["allocations"]
    for name in ("ours, lockstep", "ours, resident fp8"):
        assert rows[f"{name}, fast"]["launches"] < rows[name]["launches"]


def test_the_steady_state_is_steady():
    """Every step after the first two launches and allocates the same."""
    made = Steps(SHAPES["quick"], torch.device("cpu"), torch.float32)
    with torch.no_grad(), steps.Counter() as counter:
        made.contenders()["ours, lockstep"](7, counter.mark)
    assert len(counter.steps) == 7
    steady = counter.steps[2:-1]
    assert all(one == steady[0] for one in steady), steady


def test_a_wrong_contender_is_found(monkeypatch, capsys):
    ours = Steps.ours

    def wrong(self, *given, **named):
        run = ours(self, *given, **named)
        return lambda steps, mark: run(steps, mark) * 1.01

    monkeypatch.setattr(Steps, "ours", wrong)
    assert steps.main(["--quick", "--cpu", "--steps", "4", "--rounds", "1"]) == 1
    assert "wrong: relative error" in capsys.readouterr().out


def test_the_counter_counts():
    x = torch.ones(3)
    with steps.Counter() as counter:
        y = x + 1  # a launch, a storage
        y.add_(1)  # a launch
        y.view(3)  # neither
        counter.mark()
        y.sum().item()  # a launch and a storage, and a read
        counter.mark()
    first, second = counter.steps
    assert first == {"launches": 2, "host_reads": 0, "allocations": 1}
    assert second["host_reads"] == 1 and second["launches"] == 1
