"""Whole edits by the fast path: those of the generic one, whatever goes with them; and the flag on its way there."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlock_fast as kvf
from kvlock_fast import pipeline
from kvlock_fast.cli import main
from kvlock_fast.config import CacheConfig
from kvlock_fast.errors import InputError
from kvlock_fast.locking import fast_qkv
from tests.locking.test_lora import add_adapter
from tests.loop.test_graph import RecordedCapture
from tests.loop.test_sync_free import guarded  # noqa: F401
from tests.loop.test_windows import long
from tests.pipeline.test_pipeline import a_mask, a_video, call, stock, unipc
from tests.support.locks import paper
from tests.support.tiny import tiny_cogvideox, tiny_wan, untouched

EXAMPLES = settings().max_examples
PIPES = {
    "wan": tiny_wan,
    "wan, two transformers": lambda: tiny_wan(second=True),
    "cogvideox-2b": lambda: tiny_cogvideox("2b"),
    "cogvideox-5b": lambda: tiny_cogvideox("5b"),
    "cogvideox-1.5": lambda: tiny_cogvideox("1.5"),
}
pipes = pytest.mark.parametrize("make", PIPES.values(), ids=PIPES)
two_pipes = pytest.mark.parametrize("make", [PIPES["wan"], PIPES["cogvideox-5b"]], ids=["wan", "cogvideox-5b"])


@pytest.fixture
def prologues(monkeypatch):
    """How often the prologue ran, by what it did."""
    plain, counts = fast_qkv.prologue, Counter()

    def counted(*given, lock=None, capture=None, **named):
        counts["capture" if capture is not None else "along" if lock.k is None else "stored"] += 1
        return plain(*given, lock=lock, capture=capture, **named)

    monkeypatch.setattr(fast_qkv, "prologue", counted)
    return counts


def assert_same(one, other, tolerance=1e-5):
    torch.testing.assert_close(other.latents, one.latents, rtol=tolerance, atol=tolerance)
    assert other.trace.forwards == one.trace.forwards
    for a, b in zip(one.trace, other.trace, strict=True):
        for name in ("alpha", "omega", "s_star", "variance", "tokens"):
            said, wanted = getattr(b, name), getattr(a, name)
            assert said is wanted is None or said == pytest.approx(wanted, rel=1e-4), name


def both(pipe, **changes):
    return [call(pipe, processors=wish, **changes) for wish in ("generic", "fast")]


@pytest.mark.parametrize(
    "name, tier",
    [*((name, tier) for name in PIPES for tier in ("lockstep", "resident")), ("wan", "host"), ("wan", "disk")],
)
def test_every_tier(prologues, tmp_path, name, tier):
    pipe = PIPES[name]()
    one, other = (
        call(pipe, processors=wish, steps=3, cache=CacheConfig(tier=tier, root=str(tmp_path / wish)))
        for wish in ("generic", "fast")
    )
    assert_same(one, other)
    assert prologues == ({"along": 9} if tier == "lockstep" else {"capture": 9, "stored": 9})
    assert all(map(untouched, (pipe.transformer, getattr(pipe, "transformer_2", None) or pipe.transformer)))


@pytest.mark.parametrize("format", ["native", "bf16", "fp8_e4m3", "int8", "int4"])
def test_every_format(format):
    assert_same(*both(tiny_cogvideox("5b"), cache=CacheConfig(tier="resident", format=format), steps=3))


@st.composite
def locks(draw):
    return paper(
        alpha=draw(st.sampled_from(["dynamic", 0.0, 0.5, 1.0])),
        tau=draw(st.sampled_from([0.01, 0.5, "auto"])),
        kappa=draw(st.integers(0, 5)),
        warmup_alpha=draw(st.sampled_from([0.0, 0.4, 1.0])),
        layers=draw(st.sampled_from([None, (1,), (0, 2)])),
        background_latents=draw(st.sampled_from(["model", "source"])),
        guidance_batching=draw(st.sampled_from(["auto", "separate"])),
        source_path=draw(st.sampled_from(["renoise", "invert"])),
    )


SHARED = {name: make() for name, make in PIPES.items()}


@settings(max_examples=max(8, EXAMPLES // 10), deadline=None)
@given(
    name=st.sampled_from(list(PIPES)),
    lock=locks(),
    tier=st.sampled_from(["lockstep", "resident"]),
    seed=st.integers(0, 9),
)
def test_any_lock(name, lock, tier, seed):
    mask = np.random.default_rng(seed).random((9, 2, 3)) < 0.4
    mask[0, 0, 0] = True
    mask = mask.repeat(16, 1).repeat(16, 2)
    prompts = ["a dog", "a cat"][: 1 + seed % 2]
    assert_same(*both(SHARED[name], lock=lock, mask=mask, prompt=prompts, steps=3, cache=CacheConfig(tier=tier)), 1e-4)


def test_stretches_of_a_long_clip():
    for cache in (CacheConfig(), CacheConfig(tier="resident")):
        assert_same(*both(tiny_wan(), **long(cache=cache, steps=3)))


@two_pipes
def test_foreground_only_steps_among_those_that_lock(prologues, make):
    """What a source leaves behind by the prologue serves the foreground's own attention."""
    lock = paper(compute="foreground", tau=0.5, kappa=3)
    for tier in ("lockstep", "resident"):
        assert_same(*both(make(), lock=lock, steps=5, cache=CacheConfig(tier=tier, format="native")), 1e-4)
    assert prologues["capture"] and prologues["stored"] and prologues["along"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_its_rounding(dtype):
    """The prologue rounds once where the modules round after each step: it is not further from fp32."""
    pipe = tiny_wan()
    exact = call(pipe, steps=3).latents
    pipe.transformer.to(dtype)
    generic, fast = (out.latents for out in both(pipe, steps=3))
    assert (fast - exact).abs().max() <= 1.5 * (generic - exact).abs().max()
    assert (fast - exact).square().mean() <= 1.5 * (generic - exact).square().mean()


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_without_a_lock_it_is_diffusers_bit_for_bit(prologues, guidance):
    pipe = tiny_wan()
    off = paper(alpha=0.0, omega="constant", s_star=False, guidance_batching="separate")
    latents = call(pipe, lock=off, guidance_scale=guidance, processors="fast").latents
    assert torch.equal(latents, stock(pipe, guidance_scale=guidance)) and not prologues


@pytest.mark.parametrize("tier", ["lockstep", "resident"])
def test_adapters_count(tier):
    pytest.importorskip("peft")
    pipe = tiny_wan()
    add_adapter(pipe.transformer)
    assert_same(*both(pipe, cache=CacheConfig(tier=tier)))


# Captured steps


@pytest.mark.parametrize("tier", ["lockstep", "resident", "host"])
@two_pipes
def test_a_replay_is_the_step_bit_for_bit(monkeypatch, make, tier):
    cache = CacheConfig(tier=tier)
    pipe, arguments = make(), {"steps": 7, "prompt": ["a dog", "a cat"], "cache": cache, "processors": "fast"}
    eager, capture = call(pipe, **arguments), RecordedCapture()
    monkeypatch.setattr(pipeline, "choose_capture", lambda wish, device, why: capture if why is None else None)
    replayed = call(pipe, graph="on", **arguments)
    assert torch.equal(replayed.latents, eager.latents) and capture.replays >= 2


def test_a_step_of_one_path_does_not_serve_the_other(monkeypatch):
    pipe, capture = kvf.KVLockPipeline.from_pipe(tiny_wan(unipc())), RecordedCapture()
    monkeypatch.setattr(pipeline, "choose_capture", lambda wish, device, why: capture if why is None else None)

    def edit(wish):
        return pipe(
            a_video(), a_mask(), source_prompt="a cat", prompt="a dog", num_inference_steps=6, output="latent",
            generator=torch.Generator().manual_seed(0), graph="on", processors=wish,
        ).latents  # fmt: skip

    counts = []
    for wish in ("fast", "generic", "fast", "generic"):
        edit(wish)
        counts.append(capture.captures)
    assert counts[1] == 2 * counts[0] and counts[2:] == [counts[1]] * 2


@two_pipes
def test_nothing_waits_for_the_device(guarded, make):  # noqa: F811
    for cache in (CacheConfig(tier="lockstep"), CacheConfig(tier="resident"), CacheConfig(tier="host", format="int4")):
        call(make(), cache=cache, prompt=["a dog", "a cat"], processors="fast")
    assert len(guarded) == 3


# The flag


@pytest.mark.parametrize("wish", ["quick", "", None])
def test_an_unknown_wish_is_said(wish):
    with pytest.raises(InputError, match=f"processors must be one of auto, generic, fast, got {wish!r}"):
        call(tiny_wan(), processors=wish)


def test_a_model_without_it_is_refused_before_anything_is_computed(monkeypatch):
    pipe = tiny_wan()
    monkeypatch.setattr(type(pipe.vae), "encode", None)
    for block in pipe.transformer.blocks:
        block.attn1.processor = object()
    for run in (call, lambda pipe, **named: kvf.KVLockPipeline(pipe).invert(a_video(), a_mask(), "x", **named)):
        with pytest.raises(InputError, match=r"processors is 'fast', but there is no fast path for blocks\.0\.attn1"):
            run(pipe, source_prompt="a cat", processors="fast")


def test_a_source_that_was_kept_by_one_path_serves_the_other(tmp_path, prologues):
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan())
    for wish in ("generic", "fast"):
        pipe.invert(
            a_video(), a_mask(), tmp_path / wish, source_prompt="a red circle", num_inference_steps=4,
            generator=torch.Generator().manual_seed(1), lock=paper(), processors=wish,
        )  # fmt: skip
    assert prologues["capture"] == 12
    edits = [
        call(pipe.pipe, steps=4, processors=by, cache=CacheConfig(path=tmp_path / kept, tier="resident"))
        for by in ("generic", "fast")
        for kept in ("generic", "fast")
    ]
    for other in edits[1:]:
        assert_same(edits[0], other)


def test_the_command_line(monkeypatch, tmp_path, capsys, prologues):
    """edit, invert and batch take it; a wrong word is one sentence."""
    from kvlock_fast.media import write_video

    write_video(tmp_path / "clip.mp4", np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8), 8)
    clip = ["--source", str(tmp_path / "clip.mp4"), "--mask", "box:8,8,16,16", "--steps", "2", "--size", "32x32", "-q"]
    told = ["--source-prompt", "a red circle", "--prompt", "a blue circle", "--output", str(tmp_path / "e.mp4")]
    assert main(["edit", *clip, *told, "--processors", "fast"]) == 0
    assert prologues
    kept = ["--source-prompt", "a red circle", "--output", str(tmp_path / "kept")]
    assert main(["invert", *clip, *kept, "--processors", "fast"]) == 0
    assert prologues["capture"]
    job = {"id": "a", "source": "clip.mp4", "mask": "box:8,8,16,16", "source_prompt": "a red circle", "steps": 2}
    (tmp_path / "jobs.jsonl").write_text(json.dumps({**job, "size": "32x32", "prompt": "a blue circle"}) + "\n")
    prologues.clear()
    run = ["batch", str(tmp_path / "jobs.jsonl"), "--output", str(tmp_path / "out"), "-q"]
    assert main([*run, "--processors", "fast"]) == 0
    assert prologues
    capsys.readouterr()
    assert main([*run, "--processors", "quick"]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("--processors must be one of auto, generic, fast, got 'quick'")
    )
    assert main(["edit", *clip, *told, "--processors", "quick"]) == 2
    assert "processors must be one of auto, generic, fast, got 'quick'" in capsys.readouterr().err.splitlines()[-1]


def test_ranges_say_prologue(prologues):
    """Where the ranges are on, each locked layer has one."""
    from torch.profiler import ProfilerActivity, profile

    from kvlock_fast.nvtx import switched_on

    with switched_on(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        call(tiny_wan(), steps=2, processors="fast")
    assert sum(event.name == "prologue" for event in profiler.events()) == sum(prologues.values()) > 0
