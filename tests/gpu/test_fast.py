"""The fast path on a CUDA device: the kernel at real widths, 16-bit edits, replays of captured steps, no waits."""

from dataclasses import replace

import pytest
import torch

from kvlock_fast.config import CacheConfig
from kvlock_fast.kernels.attention import attention, attention_reference
from kvlock_fast.kernels.prologue import Capture, Lock, Places, QKNorm, RoPE, prologue
from kvlock_fast.kernels.quantize import quantize_kv
from kvlock_fast.locking.fast_trial import disagreement
from kvlock_fast.locking.lock import TransformerLock
from kvlock_fast.loop import trace
from kvlock_fast.models.wan import WAN
from tests.pipeline.test_pipeline import call, unipc
from tests.support.conformance import all_cases
from tests.support.locks import paper
from tests.support.tiny import tiny_cogvideox, tiny_wan

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

CUDA = torch.device("cuda")
MODELS = {
    "wan-1.3b": (12, 128, "rms_across_heads", 1),
    "cogvideox-5b": (48, 64, "layer", 1),
    "ltx": (32, 64, "rms_across_heads", 32),
    "hunyuan-video": (24, 128, "rms", 1),
}
models = pytest.mark.parametrize("model", MODELS)
HALVES = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
CASES = {case.name: case for case in all_cases() if case.name in ("wan-2.1", "cogvideox-5b", "ltx", "hunyuan-video")}


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, device=CUDA).to(dtype)


@models
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_a_trial_agrees(model, dtype):
    heads, dim, norm, _ = MODELS[model]
    assert disagreement(CUDA, dtype, heads, dim, norm) is None


@models
@pytest.mark.parametrize("way", ["along", "stored", "kept"])
def test_the_kernel_is_its_reference_at_real_widths(model, way):
    """bf16: one rounding apart at the most, a thousand tokens in any order."""
    torch.manual_seed(0)
    heads, dim, norm, angle_heads = MODELS[model]
    tokens, background, dtype = 1003, 700, torch.bfloat16
    q, k, v = normal(2, tokens, 3 * heads * dim, dtype=dtype).chunk(3, 2)
    size = heads * dim if norm == "rms_across_heads" else dim
    weights = [1 + 0.1 * normal(size) for _ in range(2)]
    angle = normal(tokens, angle_heads, dim // 2)
    rows = (torch.randperm(tokens, device=CUDA) - (tokens - background)).int()
    weight = torch.rand(2, tokens, device=CUDA).round(decimals=1)
    named = {"norm": QKNorm(norm, *(w.to(dtype) for w in weights)), "rope": RoPE(angle.cos(), angle.sin())}
    places = Places(rows, background)
    if way == "along":
        named |= {"foreground": 0, "lock": Lock(weight[1:])}
    elif way == "stored":
        kv = (quantize_kv(normal(1, background, heads, dim, dtype=dtype), "fp8_e4m3", kind) for kind in "kv")
        named |= {"places": places, "lock": Lock(weight, *kv, stage="normed")}
    else:
        named |= {"places": places, "capture": Capture("fp8_e4m3", "normed")}
    ours, truth = (prologue(q, k, v, heads, **named, backend=backend) for backend in ("triton", "reference"))
    for name in "qkv":
        a, b = getattr(ours, name).float(), getattr(truth, name).float()
        assert ((a - b).abs() <= 2.0**-7 * b.abs() + 1e-3).all(), name
    if way == "kept":
        for name in ("captured_k", "captured_v"):
            a, b = (getattr(x, name).dequantize(torch.float32) for x in (ours, truth))
            assert ((a - b).abs() <= b.abs() / 8 + 1e-3).all() and (a == b).float().mean() > 0.99, name


@pytest.mark.parametrize("dtype", HALVES)
def test_the_librarys_attention(dtype):
    torch.manual_seed(0)
    q, k, v = (normal(2, 1000, 4, 128, dtype=dtype) for _ in range(3))
    got, want = attention(q, k, v, attention="library"), attention_reference(q.double(), k, v, 128**-0.5)
    assert (got.double() - want).norm() <= 2.0**-6 * want.norm()


def test_auto_takes_it():
    transformer = tiny_wan().transformer.to("cuda")
    lock = TransformerLock(transformer, WAN, processors="auto")
    assert lock.fast is not None
    lock.detach()


@pytest.mark.parametrize("format", ["native", "fp8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_edits_are_the_generic_ones(case, format):
    """In fp32, along and stored."""
    pipe = case.make().to("cuda")
    for tier in ("lockstep", "resident"):
        cache = CacheConfig(tier=tier, format=format)
        fast, generic = (case.edit(pipe, processors=wish, cache=cache).latents for wish in ("fast", "generic"))
        torch.testing.assert_close(fast, generic, rtol=1e-2, atol=1e-2 if "8" in format or "4" in format else 1e-3)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_in_bf16_it_is_as_close_as_the_generic_path(case):
    exact = case.edit(case.make().to("cuda"), steps=3, processors="generic").latents
    pipe = case.make().to("cuda")
    pipe.transformer.to(torch.bfloat16)
    generic, fast = (case.edit(pipe, steps=3, processors=wish).latents for wish in ("generic", "fast"))
    assert (fast - exact).square().mean() <= 2 * (generic - exact).square().mean()


@pytest.mark.parametrize("tier", ["lockstep", "resident", "host"])
@pytest.mark.parametrize("make", [lambda: tiny_wan(unipc()), lambda: tiny_cogvideox("5b")], ids=["wan", "cogvideox-5b"])
def test_a_replay_is_the_step_bit_for_bit(make, tier):
    pipe, cache = make().to("cuda"), CacheConfig(tier=tier)
    eager = call(pipe, steps=9, cache=cache, processors="fast").latents
    for _ in range(2):
        assert torch.equal(call(pipe, steps=9, cache=cache, processors="fast", graph="on").latents, eager)


@pytest.mark.parametrize("lock", ["kvlock", paper(kappa=4, warmup_alpha=0.0)])
def test_no_step_waits(monkeypatch, lock):
    """CUDA's own word: every call that synchronises raises."""
    begin, end = trace.Recorder.begin, trace.Recorder.end
    monkeypatch.setattr(trace.Recorder, "begin", lambda self: (begin(self), torch.cuda.set_sync_debug_mode("error"))[0])
    monkeypatch.setattr(
        trace.Recorder, "end", lambda self, *ended: (torch.cuda.set_sync_debug_mode("default"), end(self, *ended))[1]
    )
    pipe = tiny_wan().to("cuda")
    for cache in (CacheConfig(tier="lockstep"), CacheConfig(tier="resident")):
        call(pipe, lock=lock, steps=2, cache=cache, processors="fast")
        try:
            call(pipe, lock=lock, cache=replace(cache), prompt=["a dog", "a cat"], processors="fast")
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled_blocks_give_the_same():
    pipe = tiny_wan(num_layers=12).to("cuda")
    for cache in (CacheConfig(tier="lockstep"), CacheConfig(tier="resident")):
        one, other = (call(pipe, cache=cache, processors="fast", compile=wish).latents for wish in ("off", "regional"))
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)
