"""Nothing of weight 0 is run: steps that do not lock, steps that are not guided, and what the run itself turns out."""

from dataclasses import replace

import pytest
import torch

import kvlock_fast as kvf
from kvlock_fast import pipeline
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.loop import solver
from kvlock_fast.loop.foreground import GuidanceSkips
from kvlock_fast.loop.schedule import in_interval, may_skip_guidance
from tests.loop.test_graph import RecordedCapture
from tests.loop.test_reference import keen_wan
from tests.pipeline.test_pipeline import call, unipc
from tests.support.tiny import tiny_wan

STEPS = 10
PARTS = {"lock_interval": (0.1, 0.5), "guidance_interval": (0.0, 0.55)}
STATIC = LockConfig(alpha=1.0, omega="constant", edit_path="free", **PARTS)
LOCKED, GUIDED = 4, 6  # steps 1 to 4, and 0 to 5: a part of a step counts as one
CALM = LockConfig(kappa=8, tau=0.5, min_predictions=2, edit_path="free")


def of(out, name):
    return [getattr(record, name) for record in out.trace]


def test_intervals_of_shares_meet_without_a_gap():
    for steps in (1, 3, 7, 20):
        halves = [[in_interval(half, steps, k) for k in range(steps)] for half in ((0.0, 0.55), (0.55, 1.0))]
        assert all(a != b for a, b in zip(*halves, strict=True))
        assert all(in_interval(None, steps, k) and in_interval((0.0, 1.0), steps, k) for k in range(steps))


@pytest.mark.parametrize("batching", ["separate", "batched"])
@pytest.mark.parametrize("tier", ["lockstep", "resident"])
def test_what_lies_outside_the_intervals_is_not_run(tier, batching):
    """Forwards are counted: the source's of locked steps, one or two of the edit's."""
    lock = replace(STATIC, guidance_batching=batching)
    out = call(tiny_wan(), lock=lock, steps=STEPS, cache=CacheConfig(tier=tier))
    assert out.trace.forwards == LOCKED + STEPS + GUIDED
    assert of(out, "alpha") == [1.0 if 1 <= k < 5 else 0.0 for k in range(STEPS)]
    assert of(out, "omega") == [5.0 if k < 6 else 1.0 for k in range(STEPS)]
    assert all(s == 1 for s in of(out, "s_star")[6:])


def test_a_coupled_edit_still_has_the_sources_velocity():
    out = call(tiny_wan(), lock=replace(STATIC, edit_path="coupled", skip_share=0.0), steps=STEPS)
    assert out.trace.forwards == STEPS + STEPS + GUIDED


def test_the_variance_decides_again_after_steps_without_guidance():
    lock = LockConfig(edit_path="free", tau=0.05, guidance_interval=(0.5, 1.0), guidance_skip=False)
    omega = of(call(keen_wan(), lock=lock, steps=STEPS), "omega")
    assert omega[:5] == [1.0] * 5 and all(1 < x < 5 for x in omega[5:])  # not the scale that was given


@pytest.mark.parametrize("lock", [STATIC, CALM, replace(CALM, **PARTS)], ids=["static", "dynamic", "both"])
def test_a_scheduler_without_a_table_does_the_same(monkeypatch, lock):
    by_table = call(keen_wan(unipc()), lock=lock, steps=STEPS)
    monkeypatch.setattr(solver, "solver_table", lambda _: (_ for _ in ()).throw(solver.InputError("none")))
    by_scheduler = call(keen_wan(unipc()), lock=lock, steps=STEPS)
    assert by_scheduler.trace.forwards == by_table.trace.forwards
    size = float(by_table.latents.abs().max())
    torch.testing.assert_close(by_scheduler.latents, by_table.latents, rtol=0, atol=1e-4 * size)
    for name in ("alpha", "omega"):
        assert of(by_scheduler, name) == pytest.approx(of(by_table, name), abs=1e-4)


@pytest.mark.parametrize("batching", ["separate", "batched"])
@pytest.mark.parametrize("tier", ["lockstep", "host"])
def test_a_scale_of_1_skips_the_other_branch(tier, batching):
    """v = s* u + 1 (c - s* u) = c: the same latents, by one forward fewer in each such step."""
    runs = {
        skip: call(
            keen_wan(), steps=STEPS, cache=CacheConfig(tier=tier, format="native"),
            lock=replace(CALM, guidance_skip=skip, guidance_batching=batching),
        )
        for skip in (True, False)
    }  # fmt: skip
    calm = sum(omega == 1 for omega in of(runs[False], "omega"))
    assert 2 <= calm < STEPS
    assert runs[False].trace.forwards == 3 * STEPS and runs[True].trace.forwards == 3 * STEPS - calm
    size = float(runs[False].latents.abs().max())
    torch.testing.assert_close(runs[True].latents, runs[False].latents, rtol=0, atol=2e-5 * size)
    assert of(runs[True], "omega") == pytest.approx(of(runs[False], "omega"), rel=1e-3)
    skipped = [k for k, omega in enumerate(of(runs[True], "omega")) if omega == 1]
    assert [of(runs[True], "s_star")[k] for k in skipped] == pytest.approx([1.0] * calm)


@pytest.mark.parametrize("skip", [True, False])
def test_captured_steps_skip_as_others_do(monkeypatch, skip):
    capture = RecordedCapture()
    monkeypatch.setattr(pipeline, "choose_capture", lambda wish, device, why: None if why else capture)
    lock = replace(CALM, guidance_skip=skip)
    captured = call(keen_wan(), lock=lock, steps=STEPS, graph="on")
    monkeypatch.undo()
    plain = call(keen_wan(), lock=lock, steps=STEPS)
    assert capture.replays > 3 and captured.trace.forwards == plain.trace.forwards
    assert (captured.trace.forwards < 3 * STEPS) == skip
    assert torch.equal(captured.latents, plain.latents)


def test_one_sample_that_is_guided_keeps_the_branch_for_all():
    watch = GuidanceSkips(replace(CALM, kappa=20), STEPS, 2, torch.device("cpu"))
    for omegas, skipped in (([1.0, 3.0], False), ([1.0, 1.0], True), ([1.5, 1.5], False)):
        watch.publish(4, torch.tensor(omegas))
        assert watch.skipped(4) == skipped
    assert not watch.skipped(1)  # before two predictions exist, omega is the scale that was given


@pytest.mark.parametrize("changes", [{"guidance_skip": False}, {"omega": "constant"}, {"omega_floor": 0.0}], ids=str)
def test_nothing_is_watched_where_no_scale_can_be_1(changes):
    assert may_skip_guidance(LockConfig()) and not may_skip_guidance(replace(LockConfig(), **changes))


def test_an_interval_of_guidance_without_guidance_is_said():
    with pytest.warns(UserWarning, match=r"guidance_interval \(0.0, 0.5\) changes nothing"):
        call(tiny_wan(), lock=LockConfig(guidance_interval=(0, 0.5)), steps=3, guidance_scale=1.0)


@pytest.mark.parametrize(
    "value", [(0.5, 0.5), (0.6, 0.2), (-0.1, 1), (0, 1.1), (0.5,), "0-1", (True, 1), (0, float("nan"))]
)
@pytest.mark.parametrize("name", ["lock_interval", "guidance_interval"])
def test_other_intervals_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be two shares of the steps"):
        LockConfig(**{name: value})


def test_a_guider_has_its_own_start_and_stop():
    with pytest.raises(kvf.InputError, match="a guider's own start and stop say when it guides"):
        kvf.KVLockGuidance(4.0, lock={"preset": "kvlock", "guidance_interval": (0.0, 0.5)})
