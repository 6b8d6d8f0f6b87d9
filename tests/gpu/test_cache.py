"""The cache's tiers on a CUDA device: streams, pinned memory, and the bytes that the planner predicts."""

import pytest
import torch

import kvlock_fast as kvf
from kvlock_fast.cache.layout import KVShape, StepLayout
from kvlock_fast.cache.store import HostStore, ResidentStore
from kvlock_fast.config import CacheConfig
from tests.pipeline.test_pipeline import a_mask, a_video, call
from tests.support.tiny import tiny_wan

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("format", ["native", "fp8_e4m3", "int8", "int4"])
def test_tiers_agree_bit_for_bit(tmp_path, format):
    pipe = tiny_wan().to("cuda")
    configs = {tier: CacheConfig(tier=tier, format=format, root=str(tmp_path)) for tier in ("resident", "host", "disk")}
    edits = {tier: call(pipe, cache=config).latents for tier, config in configs.items()}
    assert torch.equal(edits["resident"], edits["host"]) and torch.equal(edits["resident"], edits["disk"])
    assert torch.equal(call(pipe, cache=configs["disk"]).latents, edits["disk"])
    if format == "native":
        along = call(pipe, cache=CacheConfig(tier="lockstep")).latents
        torch.testing.assert_close(edits["host"], along, rtol=1e-5, atol=1e-5)


def test_copies_never_overtake_the_kernels_that_use_a_slot():
    """Long kernels on a slot, and the next copies on their way at once."""
    layout = StepLayout(KVShape((0, 1), 4096, 8, 64), "bf16", torch.bfloat16)
    device, steps = torch.device("cuda"), tuple(range(8))
    store = HostStore(layout, steps, device)
    filler = torch.randn(4096, 4096, device=device)
    for step in steps:
        with store.write(step) as places:
            filler = (filler @ filler).tanh()
            for packed in places.values():
                packed.codes.fill_(step)
    store.written()
    sums = []
    for _ in range(3):
        for step in steps:
            with store.read(step) as held:
                filler = (filler @ filler).tanh()
                sums.append((step, [packed.codes.float().mean() for packed in held.values()]))
    assert all(x.item() == step for step, means in sums for x in means)
    store.close()


@pytest.mark.parametrize("tier", ["resident", "host"])
def test_allocated_bytes_are_the_predicted_ones(tier):
    layout = StepLayout(KVShape(tuple(range(4)), 1000, 12, 128), "fp8_e4m3", torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    kind = ResidentStore if tier == "resident" else HostStore
    store = kind(layout, tuple(range(5)), torch.device("cuda"))
    on_device = (5 if tier == "resident" else 2) * layout.nbytes
    assert abs(torch.cuda.memory_allocated() - before - on_device) <= 2 * 1024 * 1024
    assert store.nbytes == layout.nbytes * (5 if tier == "resident" else 7)
    store.close()


def test_predicted_peak_is_within_5_percent():
    """Of a transformer of Wan-1.3B's width and 4 layers, at 33 frames of 480x832."""
    from diffusers import WanTransformer3DModel

    from kvlock_fast.planning.find_model import from_pipeline
    from kvlock_fast.planning.job import Job

    pipe = tiny_wan()
    torch.manual_seed(0)
    with torch.device("cuda"):
        pipe.transformer = WanTransformer3DModel(
            num_layers=4, num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, in_channels=4, out_channels=4,
            text_dim=16,
        ).to(torch.bfloat16)  # fmt: skip
    pipe.to("cuda")
    frames, height, width = 33, 480, 832
    video, mask = a_video(frames, height, width), a_mask(frames, height, width)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    size = from_pipeline(pipe)
    for tier in ("lockstep", "resident", "host"):
        torch.cuda.reset_peak_memory_stats()
        out = call(pipe, video=video, mask=mask, steps=3, cache=CacheConfig(tier=tier))
        background = int((~out.mask.tokens).sum())
        job = Job(size, frames, height, width, background, 3, 3, dtype=torch.bfloat16, variance_window=3)
        predicted = job.needed(tier, None if tier == "lockstep" else "fp8_e4m3", 1, gpu=True).gpu
        assert torch.cuda.max_memory_allocated() == pytest.approx(predicted, rel=0.05), tier


def test_disk_store_reads_through_pinned_memory(tmp_path):
    pipe = kvf.KVLockPipeline(tiny_wan().to("cuda"))
    pipe.invert(a_video(), a_mask(), tmp_path / "c", source_prompt="a red circle", num_inference_steps=4)
    out = pipe(
        a_video(), a_mask(), source_prompt="a red circle", prompt="a cat", num_inference_steps=4,
        cache=CacheConfig(tier="disk", path=str(tmp_path / "c")),
    )  # fmt: skip
    assert out.trace.cache["tier"] == "disk" and out.trace.forwards == 8
