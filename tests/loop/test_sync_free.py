"""Between the first and the last step nothing asks the device for a value, whatever the lock, solver and tier."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.loop import trace
from tests.pipeline.test_pipeline import a_video, call, unipc
from tests.support.locks import paper
from tests.support.tiny import tiny_cogvideox, tiny_wan

HOST_READS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "allclose", "bincount", "repeat_interleave.Tensor",
}  # fmt: skip


class NoHostReads(TorchDispatchMode):
    """Raises where a CUDA tensor would make the host wait: values asked for, shapes that hang on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet, overload = func._schema.name.split("::")[1], func._overloadname
        if packet in HOST_READS or f"{packet}.{overload}" in HOST_READS:
            raise AssertionError(f"the host reads the device: {func}")
        if packet in ("index", "index_put", "index_put_") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1] if i is not None
        ):
            raise AssertionError(f"a shape hangs on a mask: {func}")
        return func(*args, **(kwargs or {}))


def refuse(*_, **__):
    raise AssertionError("the host reads a whole tensor")


@pytest.fixture
def guarded(monkeypatch):
    """The loop under the guard, from its first step to its last; how often it ran."""
    ran, guards = [], []
    begin, end = trace.Recorder.begin, trace.Recorder.end

    def begin_guarded(self):
        run = begin(self)
        guards.append((NoHostReads(), pytest.MonkeyPatch()))
        for name in ("tolist", "cpu", "numpy", "__array__"):
            guards[-1][1].setattr(torch.Tensor, name, refuse)
        guards[-1][0].__enter__()
        return run

    def end_guarded(self, steps, waited=0.0):
        mode, patch = guards.pop()
        mode.__exit__(None, None, None)
        patch.undo()
        ran.append(True)
        end(self, steps, waited)

    monkeypatch.setattr(trace.Recorder, "begin", begin_guarded)
    monkeypatch.setattr(trace.Recorder, "end", end_guarded)
    yield ran
    for mode, patch in guards:
        mode.__exit__(None, None, None)
        patch.undo()


def test_the_guard_sees_what_it_is_for():
    x = torch.arange(4.0)
    for read in (
        lambda: x.sum().item(),
        lambda: bool(x.sum() > 1),
        lambda: float(x[0]),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: torch.equal(x, x),
    ):
        with pytest.raises(AssertionError, match=r"the host reads|a shape hangs"), NoHostReads():
            read()
    with NoHostReads():
        torch.where(x > 1, x, 0.0).index_select(0, torch.tensor([1]))


LOCKS = {
    "kvlock": LockConfig.preset("kvlock", guidance_skip=False),
    "intervals": paper(lock_interval=(0.2, 0.8), guidance_interval=(0.0, 0.5)),
    "mean": LockConfig.preset("paper"),
    "paper": paper(),
    "auto tau": paper(tau="auto"),
    "cfg-zero-star": LockConfig.preset("cfg-zero-star"),
    "window": paper(kappa=3, warmup_alpha=0.0),
    "foreground s*": paper(s_star_region="foreground", detection="global"),
    "separate": paper(guidance_batching="separate"),
}


@pytest.mark.parametrize("solver", [FlowMatchEulerDiscreteScheduler, unipc], ids=["euler", "unipc"])
@pytest.mark.parametrize("lock", list(LOCKS))
def test_the_loop_reads_nothing(guarded, lock, solver):
    out = call(tiny_wan(solver()), lock=LOCKS[lock], prompt=["a dog", "a cat"])
    assert guarded and out.latents.isfinite().all()


@pytest.mark.parametrize("tier", ["resident", "host", "disk"])
@pytest.mark.parametrize("format", ["native", "fp8_e4m3", "int4"])
def test_nor_with_a_stored_source(guarded, tmp_path, tier, format):
    cache = CacheConfig(tier=tier, format=format, root=str(tmp_path), prompts_at_once=1)
    call(tiny_wan(second=True), prompt=["a dog", "a cat"], cache=cache)
    assert len(guarded) == 2


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5"])
@pytest.mark.parametrize("cache", [CacheConfig(), CacheConfig(tier="host")], ids=["along", "kept"])
def test_nor_with_text_in_self_attention(guarded, kind, cache):
    for width in (48, 64):  # of the model's own and another, whose positions are made in the loop
        mask = np.zeros((9, 32, width), bool)
        mask[:, :16, :16] = True
        call(tiny_cogvideox(kind), prompt=["a dog", "a cat"], cache=cache, video=a_video(9, 32, width), mask=mask)
    assert len(guarded) == 2


def test_a_scheduler_without_a_table_is_called_and_edits_the_same():
    """DPM++ with an SDE-free but non-linear setting has none; Euler's own steps and its table agree."""
    from kvlock_fast.loop import solver

    pipe = tiny_wan(unipc())
    by_table = call(pipe).latents
    original = solver.solver_table
    try:
        solver.solver_table = lambda scheduler: (_ for _ in ()).throw(solver.InputError("none"))
        by_scheduler = call(pipe).latents
    finally:
        solver.solver_table = original
    torch.testing.assert_close(by_table, by_scheduler, rtol=1e-5, atol=1e-5)
