"""Foreground-only computation on a CUDA device: the same foreground, no wait but for alpha, replayed bit for bit."""

import pytest
import torch

from kvlock_fast.config import CacheConfig
from kvlock_fast.loop import trace
from tests.locking.test_foreground import assert_same, both, tokens
from tests.pipeline.test_pipeline import call, unipc
from tests.support.locks import paper
from tests.support.tiny import tiny_wan

pytestmark = pytest.mark.gpu
DYNAMIC = {"alpha": "dynamic", "tau": 0.5, "kappa": 4, "steps": 9}


@pytest.mark.parametrize("format", ["native", "fp8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("tier", ["lockstep", "resident", "host"])
def test_the_edit_is_the_same(tier, format):
    cache = CacheConfig(tier=tier, format=format)
    full, sparse = both(tiny_wan(unipc()).to("cuda"), prompt=["a dog", "a cat"], cache=cache)
    assert_same(full, sparse, 1e-4)
    assert (tokens(sparse) == int(full.mask.tokens.sum())).all()


def test_in_bf16_as_close_as_its_rounding():
    pipe = tiny_wan().to("cuda")
    exact = call(pipe, lock=paper(alpha=1.0, compute="foreground")).latents
    pipe.transformer.to(torch.bfloat16)
    full, sparse = both(pipe, steps=5)
    rounding = (full.latents - exact).abs().max()
    assert (sparse.latents - full.latents).abs().max() <= 2 * rounding


@pytest.mark.parametrize("lag", [1, 2])
def test_alpha_decides_as_it_does_on_the_cpu(lag):
    on_cpu = both(tiny_wan(unipc()), alpha_lag=lag, **DYNAMIC)[1]
    full, sparse = both(tiny_wan(unipc()).to("cuda"), alpha_lag=lag, **DYNAMIC)
    assert_same(full, sparse, 1e-4)
    assert (tokens(sparse) == tokens(on_cpu)).all() and sparse.trace.alpha_wait_seconds > 0


@pytest.mark.parametrize(
    "lock", [{"alpha": 1.0}, {"tau": 0.5, "kappa": 4}, {"tau": 0.5, "kappa": 4, "alpha_lag": 2}], ids=str
)
def test_a_replay_is_the_step_bit_for_bit(lock):
    pipe, lock = tiny_wan(unipc()).to("cuda"), paper(compute="foreground", **lock)
    for cache in (CacheConfig(), CacheConfig(tier="resident"), CacheConfig(tier="host")):
        eager = call(pipe, lock=lock, steps=9, cache=cache)
        replayed = call(pipe, lock=lock, steps=9, cache=cache, graph="on")
        assert torch.equal(replayed.latents, eager.latents) and (tokens(replayed) == tokens(eager)).all()


def test_only_alpha_is_waited_for(monkeypatch):
    """By an event, which is no synchronisation of the device: CUDA's own word raises at every other."""
    begin, end = trace.Recorder.begin, trace.Recorder.end
    monkeypatch.setattr(trace.Recorder, "begin", lambda self: (begin(self), torch.cuda.set_sync_debug_mode("error"))[0])
    monkeypatch.setattr(
        trace.Recorder, "end", lambda self, *ended: (torch.cuda.set_sync_debug_mode("default"), end(self, *ended))[1]
    )
    pipe, lock = tiny_wan().to("cuda"), paper(compute="foreground", tau=0.5, kappa=3)
    call(pipe, lock=lock, steps=2)
    try:
        call(pipe, lock=lock, steps=8, prompt=["a dog", "a cat"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
