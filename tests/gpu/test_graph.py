"""Captured steps on a CUDA device: the same bits as eager ones, and no step waits for the host."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import kvlock_fast as kvf
from kvlock_fast.config import CacheConfig
from kvlock_fast.loop import trace
from tests.loop.test_graph import moved_mask, run
from tests.pipeline.test_pipeline import call, unipc
from tests.support.locks import paper
from tests.support.tiny import tiny_wan

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tier", ["lockstep", "resident", "host", "disk"])
@pytest.mark.parametrize("solver", [FlowMatchEulerDiscreteScheduler, unipc], ids=["euler", "unipc"])
def test_replay_is_eager_bit_for_bit(tmp_path, solver, tier):
    pipe = tiny_wan(solver()).to("cuda")
    cache = CacheConfig(tier=tier, root=str(tmp_path))
    eager = call(pipe, steps=9, cache=cache).latents
    for _ in range(3):
        assert torch.equal(call(pipe, steps=9, cache=cache, graph="on").latents, eager)


@pytest.mark.parametrize("tier", ["lockstep", "resident", "host"])
def test_a_later_call_replays_what_an_earlier_one_captured(tier):
    """Other noise, prompt and mask: its own bits, and no new graph."""
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan(unipc()).to("cuda"))
    run(pipe, cache=CacheConfig(tier=tier))
    graphs = [len(held.graphs.replays) for held in pipe._loops.loops.values()]
    second = run(pipe, 2, "a circle", mask=moved_mask(), cache=CacheConfig(tier=tier)).latents
    assert [len(held.graphs.replays) for held in pipe._loops.loops.values()] == graphs
    eager = run(pipe, 2, "a circle", graph="off", mask=moved_mask(), cache=CacheConfig(tier=tier)).latents
    assert torch.equal(second, eager)


@pytest.mark.parametrize("lock", ["kvlock", "paper", paper(kappa=4, warmup_alpha=0.0)])
def test_no_step_waits(monkeypatch, lock):
    """CUDA's own word: every call that synchronises raises."""
    begin, end = trace.Recorder.begin, trace.Recorder.end
    monkeypatch.setattr(trace.Recorder, "begin", lambda self: (begin(self), torch.cuda.set_sync_debug_mode("error"))[0])
    monkeypatch.setattr(
        trace.Recorder, "end", lambda self, *ended: (torch.cuda.set_sync_debug_mode("default"), end(self, *ended))[1]
    )
    pipe = tiny_wan().to("cuda")
    call(pipe, lock=lock, steps=2)
    try:
        call(pipe, lock=lock, prompt=["a dog", "a cat"])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_steady_state_allocates_nothing():
    """Replays of a captured step: the allocator's count of allocations stands still."""
    pipe, counts = tiny_wan().to("cuda"), []
    watch = lambda stage, done, total: counts.append(torch.cuda.memory_stats()["allocation.all.allocated"])  # noqa: E731
    call(pipe, steps=12, graph="on", progress=lambda *args: watch(*args) if args[0] == "denoise" else None)
    assert len(set(counts[4:12])) == 1


def test_same_seed_same_bits_over_10_runs():
    pipe = tiny_wan().to("cuda")
    first = call(pipe, graph="on").latents
    assert all(torch.equal(call(pipe, graph="on").latents, first) for _ in range(9))
