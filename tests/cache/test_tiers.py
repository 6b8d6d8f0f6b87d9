"""The source's K and V in every tier: the same edit as with the source running along, to the format's rounding."""

import numpy as np
import pytest
import torch

import kvlock_fast as kvf
from kvlock_fast.config import CacheConfig, LockConfig
from tests.pipeline.test_pipeline import a_mask, a_video, call, unipc
from tests.support.locks import paper
from tests.support.tiny import tiny_wan

pytestmark = pytest.mark.numeric

TIERS = ("resident", "host", "disk")


def config(tmp_path, tier, format="native", **more):
    return CacheConfig(tier=tier, format=format, root=str(tmp_path / "root"), **more)


@pytest.mark.parametrize(
    "lock",
    [paper(), "kvlock", paper(tau="auto"), paper(layers=(0, 2), kappa=3)],
)
@pytest.mark.parametrize("tier", TIERS)
def test_native_is_lockstep(tmp_path, tier, lock):
    pipe = tiny_wan(unipc())
    along = call(pipe, lock=lock, cache=CacheConfig(tier="lockstep"))
    kept = call(pipe, lock=lock, cache=config(tmp_path, tier))
    torch.testing.assert_close(kept.latents, along.latents, rtol=1e-5, atol=1e-5)
    assert along.trace.forwards == kept.trace.forwards == 5 * 3
    for a, b in zip(along.trace, kept.trace, strict=True):
        assert a.alpha == pytest.approx(b.alpha, abs=1e-4)
        assert (a.variance or 0) == pytest.approx(b.variance or 0, rel=1e-4)


@pytest.mark.parametrize("format", ["native", "bf16", "fp8_e4m3", "int8", "int4"])
def test_tiers_agree_bit_for_bit(tmp_path, format):
    pipe = tiny_wan()
    edits = {tier: call(pipe, cache=config(tmp_path, tier, format)).latents for tier in TIERS}
    again = call(pipe, cache=config(tmp_path, "disk", format))
    assert torch.equal(edits["resident"], edits["host"]) and torch.equal(edits["resident"], edits["disk"])
    assert torch.equal(again.latents, edits["disk"]) and again.trace.forwards == 5 * 2
    lossy = format not in ("native",)
    along = call(pipe, cache=CacheConfig(tier="lockstep")).latents
    assert (edits["disk"] - along).abs().max() < (0.5 if lossy else 1e-5)
    assert not lossy or not torch.equal(edits["disk"], along)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("changes", [{"step_stride": 2}, {"steps": "dynamic"}, {"step_stride": 3, "steps": "dynamic"}])
def test_fewer_steps_are_stored(tmp_path, tier, changes):
    pipe = tiny_wan()
    lock = paper(kappa=4)
    out = call(pipe, steps=7, lock=lock, cache=config(tmp_path, tier, **changes))
    locked = 4 if changes.get("steps") == "dynamic" else 7
    along = 7 - locked
    stored = -(-locked // changes.get("step_stride", 1))
    assert out.trace.forwards == 7 * 2 + along + stored
    exact = call(pipe, steps=7, lock=lock, cache=CacheConfig(tier="lockstep")).latents
    if "step_stride" in changes:
        assert 0 < (out.latents - exact).abs().max() < 1
    else:
        torch.testing.assert_close(out.latents, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tier", [*TIERS, "lockstep"])
def test_prompts_in_batches_are_the_prompts_together(tmp_path, tier):
    pipe = tiny_wan(unipc())
    prompts = ["a blue circle", "a green square", "a dog"]
    together = call(pipe, prompt=prompts, cache=CacheConfig(tier="lockstep"))
    apart = call(pipe, prompt=prompts, cache=config(tmp_path, tier, prompts_at_once=2))
    torch.testing.assert_close(apart.latents, together.latents, rtol=1e-5, atol=1e-5)
    assert [(r.step, r.sample) for r in apart.trace] == [(r.step, r.sample) for r in together.trace]
    assert apart.trace.forwards == 5 * (3 * 2 + (2 if tier == "lockstep" else 1))


def test_two_transformers(tmp_path):
    pipe = tiny_wan(second=True)
    along = call(pipe, steps=6, cache=CacheConfig(tier="lockstep")).latents
    for tier in TIERS:
        kept = call(pipe, steps=6, cache=config(tmp_path, tier)).latents
        torch.testing.assert_close(kept, along, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source_path", ["renoise", "invert"])
@pytest.mark.parametrize("tier", ["auto", *TIERS])
def test_inverted_once_edited_many_times(tmp_path, tier, source_path):
    pipe, folder = tiny_wan(), tmp_path / "cache"
    lock = paper(source_path=source_path)
    kvf.KVLockPipeline(pipe).invert(
        a_video(), a_mask(), folder, source_prompt="a red circle", num_inference_steps=5, lock=lock,
        generator=torch.Generator().manual_seed(1), cache=CacheConfig(format="native"),
    )  # fmt: skip
    for prompt in ("a blue circle", "a cat"):
        expected = call(pipe, prompt=prompt, lock=lock)
        edit = kvf.KVLockPipeline(pipe)(
            a_video(), a_mask(), source_prompt="a red circle", prompt=prompt, num_inference_steps=5, lock=lock,
            cache=CacheConfig(tier=tier, path=folder), output="latent",
        )  # fmt: skip
        torch.testing.assert_close(edit.latents, expected.latents, rtol=1e-5, atol=1e-5)
        assert edit.trace.forwards == 5 * 2


@pytest.fixture
def inverted(tmp_path):
    pipe = tiny_wan()
    kvf.KVLockPipeline(pipe).invert(
        a_video(), a_mask(), tmp_path / "cache", source_prompt="a red circle", num_inference_steps=5,
        generator=torch.Generator().manual_seed(1), lock=paper(layers=(0, 1)), cache=CacheConfig(format="native"),
    )  # fmt: skip
    return pipe, tmp_path / "cache"


def edit(pipe, folder, **changes):
    arguments = {"lock": paper(layers=(0, 1)), "cache": CacheConfig(path=folder), "seed": 1}
    return call(pipe, **{**arguments, **changes})


def test_a_larger_mask_needs_no_new_cache(inverted):
    pipe, folder = inverted
    grown = a_mask()
    grown[:, :, :20] = True
    expected = call(pipe, lock=paper(layers=(0, 1)), mask=grown)
    found = edit(pipe, folder, mask=grown)
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-5, atol=1e-5)
    assert found.trace.forwards == 10


def other_video():
    video = a_video()
    video[3, 4, 5, 1] ^= 1
    return video


def smaller_mask():
    mask = np.zeros_like(a_mask())
    mask[:, :4, 4:8] = True
    return mask


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"video": other_video()}, "another video"),
        ({"mask": smaller_mask()}, "of the background's tokens: the mask may grow"),
        ({"seed": 2}, "other noise"),
        ({"source_prompt": "a dark circle"}, r"another source prompt \(a red circle, not a dark circle\)"),
        ({"steps": 6}, "another schedule"),
        ({"height": 48}, "another length or working size"),
        ({"lock": paper()}, "holds layers 0-1 only, and the edit locks 0-2"),
        ({"lock": paper(layers=(2,))}, "holds layers 0-1 only, and the edit locks 2"),
        (
            {"lock": paper(layers=(0, 1), source_path="invert")},
            "another way to the source's latents",
        ),
    ],
)
def test_a_cache_of_another_source_is_refused(inverted, changes, words):
    pipe, folder = inverted
    with pytest.raises(kvf.InputError, match=words):
        edit(pipe, folder, **changes)
    edit(pipe, folder)


def test_a_cache_of_another_model_is_refused(inverted):
    pipe, folder = inverted
    with torch.no_grad():
        pipe.transformer.blocks[1].attn1.to_q.bias[3] += 1e-3
    with pytest.raises(kvf.InputError, match="another model"):
        edit(pipe, folder)
    other = tiny_wan(unipc())
    with pytest.raises(kvf.InputError, match="another schedule"):
        edit(other, folder)


def test_a_cache_of_another_autoencoder_or_text_encoder_is_refused(inverted):
    pipe, folder = inverted
    for part in (pipe.vae.decoder.conv_out, pipe.text_encoder.shared):
        kept = part.weight.detach().clone()
        with torch.no_grad():
            part.weight.view(-1)[0] += 1
        with pytest.raises(kvf.InputError, match="another model"):
            edit(pipe, folder)
        with torch.no_grad():
            part.weight.copy_(kept)
    edit(pipe, folder)


def test_a_cache_of_another_split_of_the_stages_is_refused(tmp_path):
    pipe = tiny_wan(second=True)
    kvf.KVLockPipeline(pipe).invert(
        a_video(), a_mask(), tmp_path / "c", source_prompt="a red circle", num_inference_steps=5,
        generator=torch.Generator().manual_seed(1), lock=paper(layers=(0, 1)),
    )  # fmt: skip
    pipe.register_to_config(boundary_ratio=0.95)
    with pytest.raises(kvf.InputError, match="another model"):
        edit(pipe, tmp_path / "c")


def test_no_cache_there(tmp_path):
    with pytest.raises(kvf.InputError, match="no cache in"):
        edit(tiny_wan(), tmp_path)


def test_tau_auto_follows_the_predictions_that_a_cache_has(inverted):
    pipe, folder = inverted
    lock = paper(layers=(0, 1), tau="auto")
    found, expected = edit(pipe, folder, lock=lock), call(pipe, lock=lock)
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-5, atol=1e-5)
    assert found.trace.forwards == 10


def test_what_invert_refuses(tmp_path):
    pipe = kvf.KVLockPipeline(tiny_wan())
    given = {"source_prompt": "a cat", "num_inference_steps": 2}
    with pytest.raises(kvf.InputError, match="never locks"):
        pipe.invert(a_video(), a_mask(), tmp_path / "c", lock=LockConfig.preset("cfg"), **given)
    with pytest.raises(kvf.InputError, match="cache must not have a path"):
        pipe.invert(a_video(), a_mask(), tmp_path / "c", cache=CacheConfig(path="x"), **given)
    assert not (tmp_path / "c").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(kvf.InputError, match="file"):
        pipe.invert(a_video(), a_mask(), tmp_path / "file", **given)
