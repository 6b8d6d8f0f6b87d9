"""LoRA adapters of peft under the lock: loaded before it they count, loaded after it they are refused."""

import pytest
import torch
from test_pipeline import a_mask, a_video, call
from tiny import tiny_wan, untouched

import kvlock_fast as kvf
from kvlock_fast.config import CacheConfig
from kvlock_fast.models.locking import Mode, TransformerLock
from kvlock_fast.models.wan import WAN

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def add_adapter(transformer, seed=0, name="default"):
    transformer.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, weight in transformer.named_parameters():
        if "lora_" in key and f".{name}." in key:
            weight.data = torch.randn(weight.shape, generator=generator)


def merged(seed=0):
    """A pipeline whose weights are those of the adapter added up: W + B A alpha / r."""
    adapted, plain = tiny_wan(), tiny_wan()
    add_adapter(adapted.transformer, seed)
    for name, layer in adapted.transformer.named_modules():
        if hasattr(layer, "lora_A"):
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
            plain.transformer.get_submodule(name).weight.data += delta.detach()
    return plain


@pytest.mark.parametrize("tier", ["lockstep", "resident"])
@pytest.mark.parametrize("lock", ["paper", "kvlock"])
def test_an_adapter_is_part_of_the_keys_and_values(lock, tier):
    adapted = tiny_wan()
    without = call(adapted, lock=lock).latents
    add_adapter(adapted.transformer)
    cache = CacheConfig(tier=tier, format="native")
    out = call(adapted, lock=lock, cache=cache).latents
    torch.testing.assert_close(out, call(merged(), lock=lock, cache=cache).latents, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out, without, atol=1e-2)
    assert untouched(adapted.transformer)


def test_an_adapter_after_the_lock_is_refused():
    transformer = tiny_wan().transformer
    lock = TransformerLock(transformer, WAN)
    add_adapter(transformer)
    late = pytest.raises(RuntimeError, match=r"replaced after the lock was attached.*load adapters first")
    with late, lock.forward(Mode.OFF):
        pass
    lock.detach()
    assert untouched(transformer)


def test_captured_steps_know_their_adapters():
    """What weighs an adapter is a number on the host, which a captured step has taken along."""
    from kvlock_fast.graph import launch_facts

    pipe = tiny_wan()
    facts = [launch_facts(pipe.transformer)]
    add_adapter(pipe.transformer)
    facts.append(launch_facts(pipe.transformer))
    pipe.transformer.set_adapters(["default"], [0.5])
    facts.append(launch_facts(pipe.transformer))
    pipe.transformer.disable_adapters()
    facts.append(launch_facts(pipe.transformer))
    assert len(set(facts)) == len(facts)
    assert launch_facts(pipe.transformer) == facts[-1]


def test_with_compiled_blocks(monkeypatch):
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend="aot_eager"))
    pipe = tiny_wan(num_layers=12)
    add_adapter(pipe.transformer)
    ours = kvf.KVLockPipeline.from_pipe(pipe)
    arguments = {"source_prompt": "a cat", "prompt": "a dog", "num_inference_steps": 3, "output": "latent"}
    edits = [
        ours(a_video(), a_mask(), generator=torch.Generator().manual_seed(0), compile=wish, **arguments).latents
        for wish in ("off", "regional")
    ]
    torch.testing.assert_close(*edits, rtol=1e-4, atol=1e-4)
