"""Kandinsky 5 beyond the conformance suite: the lock without diffusers' rounding, half precision, what is refused."""

import pytest
import torch
from diffusers import Kandinsky5T2IPipeline
from diffusers.models.transformers import transformer_kandinsky

import kvlock_fast as kvf
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.locking.lock import Mode
from kvlock_fast.models import kandinsky5
from tests.families.cases.kandinsky5 import CASES, tiny_kandinsky5
from tests.support.conformance import Scene, attention_calls, blend_at_call

VIDEO, IMAGE = CASES


class Unrounded:
    """torch, whose bf16 is fp32."""

    bfloat16 = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.mark.parametrize("case", [VIDEO, IMAGE], ids=lambda case: case.name)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@torch.no_grad()
def test_without_diffusers_rounding_locking_is_blending_at_the_attention_call(monkeypatch, case, alpha):
    """What the suite allows for is the rounding of rotated keys to bf16, and nothing else."""
    monkeypatch.setattr(transformer_kandinsky, "torch", Unrounded())
    scene = Scene(case)
    told, of_source = scene.told
    seen = {}
    with attention_calls(scene, lambda i, k, v: seen.update({i: (k, v)}) or (k, v)):
        scene.predict(scene.source, of_source)

    def blended(i, *kv):
        return tuple(blend_at_call(x, source, scene, alpha) for x, source in zip(kv, seen[i], strict=True))

    with attention_calls(scene, blended):
        expected = scene.predict(scene.latents, told)
    background = (~scene.inside).nonzero()[:, 0]
    kept, lock = scene.kept(scene.source, background), scene.lock(background)
    with lock.forward(Mode.STORED, scene.weight(alpha), kept, scene.tokens):
        locked = scene.predict(scene.latents, told)
    lock.detach()
    torch.testing.assert_close(locked, expected, rtol=0, atol=2e-6)


@torch.no_grad()
def test_texts_of_different_lengths_in_one_forward_are_those_alone(monkeypatch):
    for module in (transformer_kandinsky, kandinsky5):
        monkeypatch.setattr(module, "torch", Unrounded())
    scene = Scene(VIDEO)
    texts = ["a dog", "a blue circle moves left over a green square", "a cat"]
    told = [scene.model.condition([text], scene.given) for text in texts]
    together = scene.model.condition(texts, scene.given)
    assert "mask" not in told[0] and together["mask"].sum(1).tolist() == [part["text"].shape[1] for part in told]
    rows = torch.cat([scene.latents, scene.source, scene.source + 1])
    answers = scene.predict(rows, together)
    for answer, row, one in zip(answers, rows, told, strict=True):
        torch.testing.assert_close(answer, scene.predict(row[None], one)[0], rtol=1e-4, atol=1e-5)
    assert all(type(m.processor).__name__ == "Kandinsky5AttnProcessor" for m in scene.transformer.modules()
               if hasattr(m, "processor"))  # fmt: skip


@pytest.mark.parametrize("cache", [None, "native", "fp8_e4m3"])
def test_half_precision_edits(cache):
    """Keys are fp32 where the model's values are bf16."""
    pipe = VIDEO.make()
    pipe.transformer.to(torch.bfloat16)
    config = CacheConfig() if cache is None else CacheConfig(tier="resident", format=cache)
    lock = LockConfig.preset("kvlock", kappa=2)
    out, along = VIDEO.edit(pipe, lock=lock, cache=config), VIDEO.edit(pipe, lock=lock)
    assert out.latents.isfinite().all()
    assert (out.latents - along.latents).norm() < 0.1 * along.latents.norm()


def test_sparse_attention_and_image_editing_are_refused():
    more = {"attention_type": "nabla", "attention_P": 0.9, "attention_wT": 3, "attention_wH": 3, "attention_wW": 3}
    with pytest.raises(InputError, match=r"attention is 'nabla'.*only 'regular' attention can be locked"):
        kvf.KVLockPipeline.from_pipe(tiny_kandinsky5(**more))
    with pytest.raises(InputError, match="made for Kandinsky5I2IPipeline"):
        kvf.KVLockPipeline.from_pipe(tiny_kandinsky5(Kandinsky5T2IPipeline, IMAGE.make().vae, visual_cond=True))
