"""Edits whose cache goes wrong, or for which memory runs out: made all the same, or refused in a sentence."""

import gc
import os
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import kvlock_fast as kvf
from kvlock_fast.config import CacheConfig
from kvlock_fast.errors import InputWarning
from kvlock_fast.planning import machine
from tests.pipeline.test_pipeline import a_mask, a_video, call
from tests.support.locks import paper
from tests.support.tiny import tiny_wan, untouched

ROOT = Path(__file__).resolve().parents[2]


def run_out_of_memory(pipe, monkeypatch, times, rows=0):
    """The next `times` forwards of more than `rows` rows find no memory."""
    forward, left = pipe.transformer.forward, [times]

    def failing(*args, **kwargs):
        if left[0] and kwargs["hidden_states"].shape[0] > rows:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", failing)


def warned(records):
    return [str(r.message) for r in records if issubclass(r.category, InputWarning)]


@pytest.mark.parametrize("tier", ["auto", "lockstep", "resident", "host", "disk"])
def test_a_smaller_way_is_taken_when_memory_runs_out(tmp_path, monkeypatch, tier):
    pipe = tiny_wan()
    expected = call(pipe, prompt=["a dog", "a cat"]).latents
    run_out_of_memory(pipe, monkeypatch, times=2)
    cache = CacheConfig(tier=tier, format="native", root=str(tmp_path))
    with pytest.warns(InputWarning, match="memory ran out: .* and try again") as records:
        out = call(pipe, prompt=["a dog", "a cat"], cache=cache)
    assert len(warned(records)) == 2
    assert out.latents.shape == expected.shape and len(out.trace.records) == 10
    assert (out.latents - expected).abs().max() < 0.5


def test_a_cache_that_is_there_is_read_in_a_lower_tier(tmp_path, monkeypatch):
    pipe = tiny_wan()
    kvf.KVLockPipeline(pipe).invert(
        a_video(), a_mask(), tmp_path / "c", source_prompt="a red circle", num_inference_steps=5,
        generator=torch.Generator().manual_seed(1), cache=CacheConfig(format="int4"), lock=paper(),
    )  # fmt: skip
    cache = CacheConfig(path=tmp_path / "c", tier="resident")
    expected = call(pipe, cache=cache).latents
    run_out_of_memory(pipe, monkeypatch, times=2)
    with pytest.warns(InputWarning, match="memory ran out") as records:
        out = call(pipe, cache=cache)
    assert len(warned(records)) == 2 and torch.equal(out.latents, expected) and out.trace.forwards == 10
    assert out.trace.cache["format"] == "int4" and out.trace.cache["tier"] == "disk"


def test_a_host_without_memory_is_a_reason_to_go_down_too(tmp_path, monkeypatch):
    from kvlock_fast.cache.layout import StepLayout

    new_arena, left = StepLayout.new_arena, [4]  # two slots, and two of five steps

    def failing(self, device):
        left[0] -= 1
        if left[0] < 0:
            left[0] = 10**9
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return new_arena(self, device)

    pipe = tiny_wan()
    expected = call(pipe).latents
    monkeypatch.setattr(StepLayout, "new_arena", failing)
    with pytest.warns(InputWarning, match="memory ran out"):
        out = call(pipe, cache=CacheConfig(tier="host", format="native", root=str(tmp_path)))
    assert (out.latents - expected).abs().max() < 0.5


def test_more_memory_than_there_ever_is_ends_in_one_sentence(monkeypatch):
    pipe = tiny_wan()
    run_out_of_memory(pipe, monkeypatch, times=10**9)
    with pytest.raises(kvf.InputError, match="too little memory on the device"), warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        call(pipe, prompt=["a dog", "a cat"], cache=CacheConfig(tier="resident"))
    assert untouched(pipe.transformer)


def test_at_most_five_rungs(monkeypatch):
    pipe = tiny_wan()
    tries = []

    def failing(*args, **kwargs):
        tries.append(kwargs["hidden_states"].shape[0])
        raise torch.OutOfMemoryError

    monkeypatch.setattr(pipe.transformer, "forward", failing)
    prompts = ["a dog", "a cat", "a circle", "a square", "a red cat", "a blue cat", "a green cat", "a dark cat"]
    with pytest.raises(kvf.InputError), warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        call(pipe, prompt=prompts, cache=CacheConfig(tier="resident", format="native"))
    assert 2 <= len(warned(records)) <= 5 and len(tries) == 1 + len(warned(records))


def test_tiles_decode_what_memory_does_not(monkeypatch):
    pipe = tiny_wan()
    decode, tiled = pipe.vae.decode, []

    def failing(*args, **kwargs):
        tiled.append(pipe.vae.use_tiling)
        if not pipe.vae.use_tiling:
            raise torch.OutOfMemoryError
        return decode(*args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", failing)
    with pytest.warns(InputWarning, match="decode the video in tiles"):
        out = call(pipe, output="frames")
    assert out.frames[0].shape == a_video().shape and tiled[-1] and not pipe.vae.use_tiling


def test_a_plan_that_fits_nowhere_shows_its_table(monkeypatch):
    monkeypatch.setattr(machine.Machine, "here", classmethod(lambda cls, *_: cls(None, 1000, 1000)))
    with pytest.raises(kvf.InputError, match=r"(?s)too little memory.*lockstep.*too little memory: "):
        call(tiny_wan())


def test_a_tier_that_does_not_fit_is_replaced(monkeypatch):
    pipe = tiny_wan()
    expected = call(pipe).latents
    from kvlock_fast.planning import planner

    needed = planner.Job.needed

    def greedy(job, tier, *args, **kwargs):
        bytes_ = needed(job, tier, *args, **kwargs)
        return bytes_ if tier == "lockstep" else planner.Bytes(bytes_.gpu, 10**18, bytes_.disk)

    monkeypatch.setattr(planner.Job, "needed", greedy)
    for tier in ("resident", "host"):
        with pytest.warns(InputWarning, match=f"too little memory for the tier {tier}: the source is run along"):
            assert torch.equal(call(pipe, cache=CacheConfig(tier=tier)).latents, expected)


def test_prompts_that_do_not_fit_at_once_go_in_batches(monkeypatch):
    """And then the source is stored, as its second use saves a forward."""
    pipe = tiny_wan()
    prompts = ["a dog", "a cat", "a circle", "a square"]
    expected = call(pipe, prompt=prompts)
    from kvlock_fast.planning import costs, planner

    monkeypatch.setattr(costs, "COPY_BANDWIDTH", 1e30)  # or reading the cache of so small a model costs more than it
    needed = planner.Job.needed

    def greedy(job, tier, format, count, gpu):
        bytes_ = needed(job, tier, format, count, gpu)
        return bytes_ if count <= 2 else planner.Bytes(bytes_.gpu, 10**15, bytes_.disk)

    monkeypatch.setattr(planner.Job, "needed", greedy)
    monkeypatch.setattr(machine.Machine, "here", classmethod(lambda cls, *_: cls(None, 10**12, 10**12)))
    out = call(pipe, prompt=prompts, cache=CacheConfig(format="native"))
    torch.testing.assert_close(out.latents, expected.latents, rtol=1e-5, atol=1e-5)
    assert out.trace.forwards == 5 * (2 * 4 + 1)


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("when", ["a shard", "the manifest"])
def test_a_full_disk_leaves_the_edit_in_lockstep(tmp_path, monkeypatch, when):
    from kvlock_fast.cache import entry

    pipe = tiny_wan()
    expected = call(pipe).latents
    monkeypatch.setattr(entry, "write_shard" if when == "a shard" else "fsync", no_space)
    with pytest.warns(InputWarning, match=r"cannot write the cache '.*': No space left on device; the source is run"):
        out = call(pipe, cache=CacheConfig(tier="disk", root=str(tmp_path / "root")))
    assert torch.equal(out.latents, expected)
    assert not list((tmp_path / "root").rglob("*.safetensors"))


def test_a_root_that_cannot_be_made_leaves_the_edit_in_lockstep(tmp_path):
    (tmp_path / "file").write_text("mine")
    pipe = tiny_wan()
    expected = call(pipe).latents
    with pytest.warns(InputWarning, match="the source is run along instead"):
        out = call(pipe, cache=CacheConfig(tier="disk", root=str(tmp_path / "file")))
    assert torch.equal(out.latents, expected) and (tmp_path / "file").read_text() == "mine"


FULL_DISK = """
import resource, signal, sys, warnings
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path.insert(0, sys.argv[2])
from tests.pipeline.test_pipeline import call
from tests.support.tiny import tiny_wan
from kvlock_fast.config import CacheConfig
warnings.simplefilter("always")
pipe = tiny_wan()
expected = call(pipe).latents
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
out = call(pipe, cache=CacheConfig(tier="disk", root=sys.argv[1]))
assert out.latents.equal(expected)
"""


def test_a_file_size_limit_leaves_the_edit_in_lockstep(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "root"), str(ROOT)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "File too large; the source is run along instead" in run.stderr
    assert not list((tmp_path / "root").rglob("*.safetensors"))


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="cannot mount")
def test_a_full_file_system_leaves_the_edit_in_lockstep(tmp_path):
    root = tmp_path / "small"
    root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", root], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("cannot mount a tmpfs")
    try:
        pipe = tiny_wan()
        expected = call(pipe).latents
        with pytest.warns(InputWarning, match="No space left on device"):
            out = call(pipe, cache=CacheConfig(tier="disk", root=str(root)))
        assert torch.equal(out.latents, expected)
        assert not list(root.rglob("*.safetensors"))
    finally:
        subprocess.run(["umount", root], check=True)


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["manifest.json", "step-00002.safetensors", "source.safetensors"])
def test_damage_to_an_automatic_cache_is_set_aside_and_made_anew(tmp_path, file):
    pipe, cache = tiny_wan(), CacheConfig(tier="disk", format="native", root=str(tmp_path))
    expected = call(pipe, cache=cache).latents
    (path,) = tmp_path.rglob(file)
    flip(path, 0.7)
    with pytest.warns(InputWarning, match="is damaged.*set aside"):
        again = call(pipe, cache=cache)
    assert torch.equal(again.latents, expected) and again.trace.forwards == 15
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(pipe, cache=cache).trace.forwards == 10


def test_an_automatic_cache_of_another_source_under_this_ones_name_is_not_used(tmp_path):
    pipe, cache = tiny_wan(), CacheConfig(tier="disk", format="native", root=str(tmp_path))
    expected = call(pipe, cache=cache).latents
    (mine,) = [path.parent for path in tmp_path.rglob("manifest.json")]
    call(pipe, cache=cache, source_prompt="a dog")
    (other,) = [path.parent for path in tmp_path.rglob("manifest.json") if path.parent != mine]
    shutil.rmtree(mine)
    other.rename(mine)
    with pytest.warns(InputWarning, match="another source prompt"):
        again = call(pipe, cache=cache)
    assert torch.equal(again.latents, expected) and again.trace.forwards == 15
    assert call(pipe, cache=cache).trace.forwards == 10


def test_the_quota_evicts_the_least_recently_used(tmp_path):
    pipe = tiny_wan()
    cache = CacheConfig(tier="disk", format="native", root=str(tmp_path))
    call(pipe, cache=cache, steps=3)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    quota = CacheConfig(tier="disk", format="native", root=str(tmp_path), quota=int(2.5 * size))
    for seed in (2, 3, 4):
        call(pipe, cache=quota, steps=3, seed=seed)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 2.5 * size
    assert call(pipe, cache=quota, steps=3, seed=4).trace.forwards == 6
    small = CacheConfig(tier="disk", format="native", root=str(tmp_path), quota=10)
    with pytest.warns(InputWarning, match="quota"):
        assert call(pipe, cache=small, steps=3, seed=9).trace.forwards == 9


def memory():
    gc.collect()
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


@pytest.mark.large
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
@pytest.mark.parametrize("tier", ["resident", "host", "disk"])
def test_memory_does_not_grow_over_200_edits(tmp_path, tier):
    pipe = tiny_wan()
    video, mask = np.tile(a_video(), (1, 2, 2, 1)), np.tile(a_mask(), (1, 2, 2))
    cache = CacheConfig(tier=tier, root=str(tmp_path), quota=10**7)
    used = []
    for seed in range(200):
        call(pipe, cache=cache, steps=2, seed=seed % 5, video=video, mask=mask, lock=paper(kappa=2))
        used.append(memory())
    assert used[-1] < 1.01 * max(used[20:60])


def test_an_interrupted_source_pass_leaves_nothing(tmp_path):
    pipe = tiny_wan()

    def stop(stage, done, total):
        if stage == "source pass" and done == 3:
            raise KeyboardInterrupt

    for tier in ("resident", "host", "disk"):
        with pytest.raises(KeyboardInterrupt):
            call(pipe, cache=CacheConfig(tier=tier, root=str(tmp_path)), progress=stop)
        assert not list(tmp_path.rglob("*.safetensors"))
        assert untouched(pipe.transformer)
