"""Captured steps, without a GPU: a recorder of operators stands for CUDA's capture.

It replays the operators of a step on the memory that they had, as a graph replays its kernels: a step that reads a
number of the host's, or memory that is not there the next time, comes out wrong.
"""

import warnings

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_dispatch import attention_backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kvlock_fast as kvf
from kvlock_fast import pipeline
from kvlock_fast.config import CacheConfig
from kvlock_fast.errors import InputWarning
from kvlock_fast.loop import epilogue
from kvlock_fast.loop.foreground import Saturation
from kvlock_fast.loop.graph import MOST_GRAPHS, MOST_LOOPS, CapturedLoops, StepGraphs
from tests.families.cases.cosmos import cosmos25
from tests.pipeline.test_pipeline import FRAMES, HEIGHT, WIDTH, a_mask, a_video, call, unipc
from tests.support.locks import paper
from tests.support.tiny import tiny_cogvideox, tiny_wan

ALIKE = kvf.LockConfig(guidance_skip=False)
"""A lock whose kinds of steps do not hang on the values of a run."""


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordedCapture:
    """As CudaCapture; but here to capture a step is to run it, so the first replay has been."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, work):
        recorder, self.captures, first = Recorder(), self.captures + 1, [True]
        with recorder:
            work()

        def replay():
            if first:
                first.clear()
            else:
                self.replays += 1
                recorder.replay()

        return replay


@pytest.fixture
def captured(monkeypatch):
    capture = RecordedCapture()
    monkeypatch.setattr(pipeline, "choose_capture", lambda wish, device, why: capture if why is None else None)
    return capture


@pytest.mark.parametrize("solver", [FlowMatchEulerDiscreteScheduler, unipc], ids=["euler", "unipc"])
@pytest.mark.parametrize(
    "lock",
    [
        "kvlock",
        "paper",
        "cfg-zero-star",
        paper(kappa=4, warmup_alpha=0.0),
        paper(guidance_batching="separate", s_star_region="foreground"),
    ],
)
def test_a_replay_is_the_step_bit_for_bit(monkeypatch, lock, solver):
    pipe = tiny_wan(solver())
    eager = call(pipe, lock=lock, steps=8, prompt=["a dog", "a cat"])
    capture = RecordedCapture()
    monkeypatch.setattr(pipeline, "choose_capture", lambda wish, device, why: capture if why is None else None)
    replayed = call(pipe, lock=lock, steps=8, prompt=["a dog", "a cat"], graph="on")
    assert torch.equal(replayed.latents, eager.latents) and replayed.trace.forwards == eager.trace.forwards
    assert capture.captures >= 1 and capture.replays >= 2
    for a, b in zip(eager.trace, replayed.trace, strict=True):
        assert (a.alpha, a.omega, a.s_star, a.variance) == (b.alpha, b.omega, b.s_star, b.variance)


@pytest.mark.parametrize("tier", ["resident", "host", "disk"])
def test_with_a_stored_source(tmp_path, captured, tier):
    pipe = tiny_wan(unipc())
    prompts = ["a dog", "a cat", "a circle"]
    cache = CacheConfig(tier=tier, root=str(tmp_path), prompts_at_once=2)
    out = call(pipe, steps=9, prompt=prompts, cache=cache, graph="on")
    slots = 1 if tier == "resident" else 2
    assert captured.captures == 2 * slots and captured.replays == 2 * (9 - 2 * slots)
    loop_as_it_is = call(pipe, steps=9, prompt=prompts, cache=CacheConfig(tier="resident", prompts_at_once=2))
    assert captured.captures == 2 * slots + 2  # it too was captured: the fixture asks for it
    assert torch.equal(out.latents, loop_as_it_is.latents)


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5"])
def test_text_in_self_attention(monkeypatch, tmp_path, kind):
    """At a size of its own too, where positions are not a table that the model holds."""
    for height in (32, 48):
        pipe, arguments = tiny_cogvideox(kind), {"steps": 8, "prompt": ["a dog", "a cat"], "guidance_scale": 3.0}
        arguments |= {"video": a_video(9, height, 48), "mask": a_mask(9, height, 48)}
        for cache in (CacheConfig(), CacheConfig(tier="host", root=str(tmp_path))):
            eager = call(pipe, lock=ALIKE, cache=cache, **arguments)
            capture = RecordedCapture()
            with monkeypatch.context() as patch:
                patch.setattr(pipeline, "choose_capture", lambda wish, device, why, c=capture: None if why else c)
                replayed = call(pipe, lock=ALIKE, cache=cache, graph="on", **arguments)
            assert torch.equal(replayed.latents, eager.latents) and capture.replays >= 2


def test_two_transformers_are_two_kinds(captured):
    pipe = tiny_wan(second=True)
    call(pipe, steps=8, graph="on")
    assert captured.captures == 2


def test_the_recorder_sees_a_step_that_cannot_be_replayed(captured, monkeypatch):
    """One that takes a number of the host's along."""
    advance = epilogue.DeviceStepper.advance

    def counting(self, k, source, cond, uncond):
        advance(self, k, source, cond * (1 + k / 10), uncond)

    pipe = tiny_wan()
    monkeypatch.setattr(epilogue.DeviceStepper, "advance", counting)
    wrong = call(pipe, steps=6, graph="on").latents
    monkeypatch.setattr(pipeline, "choose_capture", lambda *_: None)
    assert not torch.equal(wrong, call(pipe, steps=6).latents)


def test_kinds_are_bounded():
    ran, graphs = [], StepGraphs(lambda work: work)
    for _ in range(3):
        for kind in range(MOST_GRAPHS + 3):
            graphs.run(kind, lambda kind=kind: ran.append(kind))
    assert len(graphs.replays) == MOST_GRAPHS and len(ran) == 3 * (MOST_GRAPHS + 3)


def run(pipe, seed=1, prompt="a dog", steps=6, graph="on", mask=None, **changes):
    """A call of a KVLockPipeline that lasts over calls."""
    changes = {"lock": ALIKE} | changes
    return pipe(
        a_video(seed=seed), a_mask() if mask is None else mask, source_prompt="a cat", prompt=prompt,
        num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), output="latent", graph=graph,
        **changes,
    )  # fmt: skip


def moved_mask():
    """Another mask, of as many tokens as `a_mask`."""
    return np.roll(a_mask(), 16, axis=2)


@pytest.mark.parametrize("tier", ["lockstep", "resident", "host", "disk"])
def test_a_later_call_replays_what_an_earlier_one_captured(tmp_path, captured, monkeypatch, tier):
    """Other video, noise, mask and prompts, the same shapes: nothing is captured anew, and the bits are its own."""
    assert moved_mask().shape == (FRAMES, HEIGHT, WIDTH)
    cache = CacheConfig(tier=tier, root=str(tmp_path))
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan(unipc()))
    first = run(pipe, cache=cache)
    kept = first.latents.clone(), [vars(record) for record in first.trace]
    before, replays = captured.captures, captured.replays
    second = run(pipe, 2, "a circle", cache=cache, mask=moved_mask())
    assert captured.captures == before and captured.replays == replays + len(second.trace.records)
    monkeypatch.setattr(pipeline, "choose_capture", lambda *_: None)
    fresh = kvf.KVLockPipeline.from_pipe(tiny_wan(unipc()))
    eager = run(fresh, 2, "a circle", cache=CacheConfig(tier=tier, root=str(tmp_path / "b")), mask=moved_mask())
    assert torch.equal(second.latents, eager.latents) and second.trace.forwards == eager.trace.forwards
    for a, b in zip(second.trace, eager.trace, strict=True):
        assert (a.alpha, a.omega, a.s_star, a.variance) == (b.alpha, b.omega, b.s_star, b.variance)
    assert torch.equal(first.latents, kept[0]), "the first call's results are its own"
    again = run(fresh, mask=a_mask(), steps=1).mask
    assert torch.equal(first.mask.tokens, again.tokens) and torch.equal(first.mask.latents, again.latents)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_several_prompts_over_calls_and_batches(captured, monkeypatch, guidance):
    """The second batch, and the second call, are edited by their own prompts."""
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan(unipc()))
    changes = {"guidance_scale": guidance, "cache": CacheConfig(tier="resident", prompts_at_once=2)}
    calls = [(1, ["a dog", "a cat", "a circle", "a square"]), (2, ["a square", "red stripes", "a cat", "left"])]
    replayed = [run(pipe, seed, prompts, **changes).latents for seed, prompts in calls]
    monkeypatch.setattr(pipeline, "choose_capture", lambda *_: None)
    for (seed, prompts), latents in zip(calls, replayed, strict=True):
        fresh = kvf.KVLockPipeline.from_pipe(tiny_wan(unipc()))
        assert torch.equal(latents, run(fresh, seed, prompts, **changes).latents)


def test_samples_that_differ_in_what_is_computed_keep_their_prompts(captured, monkeypatch):
    """Some are computed for their foreground alone: which prompts these have is the batch's and the call's."""
    monkeypatch.setattr(Saturation, "samples", lambda self, k: (0,) if k < 5 else (0, 1))
    lock = paper(alpha=1.0, compute="foreground")
    changes = {"lock": lock, "steps": 9, "cache": CacheConfig(tier="resident", prompts_at_once=2)}
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan())
    calls = [(1, ["a dog", "a cat", "a circle", "a square"]), (2, ["a square", "red stripes", "a cat", "left"])]
    replayed = [run(pipe, seed, prompts, **changes).latents for seed, prompts in calls]
    assert captured.replays > 8
    monkeypatch.setattr(pipeline, "choose_capture", lambda *_: None)
    for (seed, prompts), latents in zip(calls, replayed, strict=True):
        fresh = kvf.KVLockPipeline.from_pipe(tiny_wan())
        assert torch.equal(latents, run(fresh, seed, prompts, **changes).latents)


def out_of_memory_once(method):
    failing = iter([True])

    def once(*arguments, **named):
        if next(failing, False):
            raise torch.OutOfMemoryError("none left")
        return method(*arguments, **named)

    return once


def test_memory_that_runs_out_gives_the_loops_back_and_the_prompts_stay(captured, monkeypatch):
    """The same way is tried again first, with the captured loops given up."""
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan())
    prompts = ["a dog", "a cat", "a circle", "a square"]
    arguments = {"source_prompt": "a cat", "num_inference_steps": 5, "graph": "on", "prompt": prompts,
                 "cache": CacheConfig(tier="lockstep", prompts_at_once=2)}  # fmt: skip
    monkeypatch.setattr(pipe.model, "decode", out_of_memory_once(pipe.model.decode))
    found = pipe(a_video(), a_mask(), generator=torch.Generator().manual_seed(1), **arguments)
    monkeypatch.setattr(pipeline, "choose_capture", lambda *_: None)
    fresh = kvf.KVLockPipeline.from_pipe(tiny_wan())
    expected = fresh(a_video(), a_mask(), generator=torch.Generator().manual_seed(1), **arguments)
    assert torch.equal(found.latents, expected.latents)


def test_a_call_without_graphs_has_their_memory_back(captured, monkeypatch):
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan())
    run(pipe)
    kept = pipe._loops
    assert kept.loops
    monkeypatch.setattr(pipe.model, "predict", out_of_memory_once(pipe.model.predict))
    monkeypatch.setattr(pipeline, "choose_capture", lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)  # no smaller way is taken
        run(pipe, graph="off")
    assert not kept.loops


def test_inference_mode_or_not_between_calls(captured):
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan())
    for cache in (CacheConfig(), CacheConfig(tier="resident")):
        with torch.inference_mode():
            first = run(pipe, cache=cache).latents.clone()
        assert torch.equal(run(pipe, cache=cache).latents, first)
        with torch.inference_mode():
            assert torch.equal(run(pipe, cache=cache).latents, first)


def test_compiled_blocks_and_another_attention_are_captured_for_themselves(captured, monkeypatch):
    plain, counted = torch.nn.Module.compile, []

    def backend(graph, inputs):
        counted.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend=backend))
    torch.compiler.reset()
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan())
    run(pipe)
    captures = captured.captures
    run(pipe, compile="regional")
    assert counted and captured.captures > captures
    captures = captured.captures
    for block in pipe.pipe.transformer.blocks:
        block.attn1.processor._attention_backend = "_native_math"
    run(pipe)
    assert captured.captures > captures


def test_the_attention_of_all_families_counts(captured):
    """Of Cosmos too, whose transformer has no list of its processors; for a layer, and for all of diffusers."""
    pipe = kvf.KVLockPipeline.from_pipe(cosmos25())
    attention = pipe.pipe.transformer.transformer_blocks[0].attn1
    assert not hasattr(pipe.pipe.transformer, "attn_processors")
    run(pipe, 1, "a cat")
    captures = captured.captures
    run(pipe, 1, "a cat")
    assert captured.captures == captures
    own = attention.processor
    attention.set_processor(type(own)())
    run(pipe, 1, "a cat")
    assert captured.captures > captures
    captures = captured.captures
    with attention_backend("_native_math"):
        run(pipe, 1, "a cat")
    assert captured.captures > captures


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 7},
        {"prompt": ["a dog", "a cat"]},
        {"lock": paper(tau=0.02)},
        {"guidance_scale": 1.0},
        {"guidance_scale": 4.0},
        {"cache": CacheConfig(tier="resident")},
        {"cache": CacheConfig(tier="resident", format="int8")},
        {"mask": np.ones_like(a_mask()[:1]) & (np.arange(WIDTH) < 16)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_kind_of_call_is_captured_for_itself(captured, monkeypatch, change):
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan(unipc()))
    run(pipe)
    out = run(pipe, **change)
    monkeypatch.setattr(pipeline, "choose_capture", lambda *_: None)
    assert torch.equal(out.latents, run(kvf.KVLockPipeline.from_pipe(tiny_wan(unipc())), **change).latents)


def test_what_changes_the_weights_is_captured_for_itself(captured):
    """Other weights in other memory, as an adapter's or another device's."""
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan())
    before = run(pipe).latents
    captures, layer = captured.captures, pipe.pipe.transformer.blocks[0].attn1.to_k
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2, requires_grad=False)
    assert not torch.equal(run(pipe).latents, before) and captured.captures > captures
    layer.weight.data.mul_(0.5)  # in place, where the captured steps read it
    captures = captured.captures
    assert torch.equal(run(pipe).latents, before) and captured.captures == captures


def test_kept_loops_are_bounded_and_the_last_used_stays():
    loops = CapturedLoops(lambda work: work)
    first = loops.take("a", {"x": torch.zeros(2)}, [])
    assert loops.take("a", {"x": torch.ones(2)}, []) is first and torch.equal(first.tensors["x"], torch.ones(2))
    for name in map(str, range(MOST_LOOPS - 1)):
        loops.take(name, {"x": torch.zeros(2)}, [])
    assert loops.take("a", {"x": torch.zeros(2)}, []) is first
    loops.take("another", {"x": torch.zeros(2)}, [])
    assert len(loops.loops) == MOST_LOOPS and loops.take("a", {"x": torch.zeros(2)}, []) is first
    assert loops.take("a", {"x": torch.zeros(3)}, []) is not first
    loops.clear()
    assert loops.take("a", {"x": torch.zeros(2)}, []) is not first


def test_what_cannot_be_captured_is_said(monkeypatch):
    pipe = tiny_wan()
    with monkeypatch.context() as early:  # before the video is encoded, and once for all batches
        early.setattr(pipe.vae, "encode", lambda *_: pytest.fail("encoded first"))
        with pytest.raises(kvf.InputError, match=r"graph is .on."):
            call(pipe, graph="on")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call(pipe, graph="auto", prompt=["a dog", "a cat"], cache=CacheConfig(prompts_at_once=1))
    assert [str(w.message) for w in said if "captured" in str(w.message)] == [
        "steps are not captured in a CUDA graph: the device is cpu, not cuda"
    ]
    with pytest.raises(kvf.InputError, match=r"graph is .on., but .*: the device is cpu, not cuda"):
        call(pipe, graph="on")
    with pytest.warns(InputWarning, match="not captured in a CUDA graph: the device is cpu"):
        call(pipe, graph="auto")
    with pytest.raises(kvf.InputError, match="graph must be one of off, auto, on, got 'yes'"):
        call(pipe, graph="yes")


def test_why_a_run_declines(monkeypatch):
    said = []
    monkeypatch.setattr(pipeline, "choose_capture", lambda wish, device, why: said.append(why))
    pipe = tiny_wan()
    call(pipe, lock="cfg")
    call(pipe, lock=paper(tau="auto"))
    pipe.transformer._hf_hook = object()
    call(pipe)
    del pipe.transformer._hf_hook
    pipe.transformer.blocks[0].ffn.forward = pipe.transformer.blocks[0].ffn.forward
    call(pipe)
    words = ["scheduler's own", "tau='auto'", "replaced, as by offloading", "replaced, as by offloading"]
    assert all(word in reason for word, reason in zip(words, said, strict=True))
