"""LoRA adapters of peft under the lock: loaded before it they count, loaded after it they are refused."""

import pytest
import torch

import kvlock_fast as kvf
from kvlock_fast.config import CacheConfig
from kvlock_fast.locking.lock import Mode, TransformerLock
from kvlock_fast.models.wan import WAN
from tests.pipeline.test_pipeline import a_mask, a_video, call, stock
from tests.support.tiny import tiny_wan, untouched

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


def weighed(*adapters):
    """A pipeline whose weights are those of adapters, (seed, weight) each, added up."""
    plain, base = tiny_wan(), dict(tiny_wan().transformer.named_parameters())
    for seed, weight in adapters:
        added = dict(merged(seed).transformer.named_parameters())
        for name, ours in plain.transformer.named_parameters():
            ours.data += weight * (added[name].data - base[name].data)
    return plain


def alike(pipe, other, **arguments):
    """Whether both edit alike, locked, and to their source's stored keys and values."""
    for cache in (CacheConfig(), CacheConfig(tier="resident", format="native")):
        ours, theirs = (call(x, lock="kvlock", cache=cache, steps=3, **arguments).latents for x in (pipe, other))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert untouched(pipe.transformer)


def two_adapters(pipe):
    add_adapter(pipe.transformer, 0, "first")
    add_adapter(pipe.transformer, 1, "second")
    pipe.transformer.set_adapters(["first", "second"], [1.0, 0.5])


def a_scaled_adapter(pipe):
    add_adapter(pipe.transformer, 0, "first")
    add_adapter(pipe.transformer, 1, "second")
    pipe.transformer.set_adapters("second", 0.25)


def a_fused_adapter(pipe):
    add_adapter(pipe.transformer)
    pipe.transformer.fuse_lora(lora_scale=0.5)


def an_unloaded_adapter(pipe):
    add_adapter(pipe.transformer)
    pipe.transformer.unload_lora()


def a_disabled_adapter(pipe):
    add_adapter(pipe.transformer)
    pipe.transformer.disable_lora()


def a_hotswapped_adapter(pipe):
    """Another's weights in the place of those that an edit has used; without its alphas they weigh 1, not 8 / 2."""
    other = tiny_wan()
    add_adapter(other.transformer, 1)
    weights = peft.get_peft_model_state_dict(other.transformer, adapter_name="default")
    add_adapter(pipe.transformer)
    call(pipe, steps=2)
    where = [module for module in pipe.transformer.modules() if hasattr(module, "lora_A")]
    pipe.transformer.load_lora_adapter(
        {f"transformer.{name}": x for name, x in weights.items()}, prefix="transformer", adapter_name="default",
        hotswap=True,
    )  # fmt: skip
    assert where == [module for module in pipe.transformer.modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize(
    ("change", "adapters"),
    [
        (two_adapters, [(0, 1.0), (1, 0.5)]),
        (a_scaled_adapter, [(1, 0.25)]),
        (a_fused_adapter, [(0, 0.5)]),
        (a_disabled_adapter, []),
        (an_unloaded_adapter, []),
        (a_hotswapped_adapter, [(1, 0.25)]),
    ],
)
def test_adapters_count_as_they_weigh(change, adapters):
    pipe = tiny_wan()
    change(pipe)
    alike(pipe, weighed(*adapters))
    assert torch.equal(call(pipe, lock="cfg", steps=3).latents, stock(pipe, steps=3))


def test_an_adapter_of_a_model_that_is_offloaded_in_groups():
    pipe, cpu = tiny_wan(), torch.device("cpu")
    add_adapter(pipe.transformer)
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    alike(pipe, merged())


def test_an_adapter_of_a_model_whose_layers_are_cast():
    """Its own weights stay as they are."""
    pipe, plain = tiny_wan(), tiny_wan()
    add_adapter(pipe.transformer)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    cast = [
        name
        for name, module in pipe.transformer.named_modules()
        if "layerwise_casting" in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    ]
    assert any("attn1.to_v.base_layer" in name for name in cast) and not any("lora_" in name for name in cast)
    for name in cast:
        plain.transformer.get_submodule(name.replace(".base_layer", "")).to(torch.float8_e4m3fn).to(torch.float32)
    add_adapter(plain.transformer)
    alike(pipe, plain)


def test_an_adapter_between_two_edits_of_one_pipeline():
    """It is loaded after the first edit's lock and before the second's: every edit locks what is there."""
    pipe = tiny_wan()
    ours = kvf.KVLockPipeline.from_pipe(pipe)

    def edit(some):
        arguments = {"source_prompt": "a cat", "prompt": "a dog", "num_inference_steps": 3, "output": "latent"}
        return some(a_video(), a_mask(), generator=torch.Generator().manual_seed(0), **arguments).latents

    before = edit(ours)
    add_adapter(pipe.transformer)
    torch.testing.assert_close(edit(ours), edit(kvf.KVLockPipeline.from_pipe(merged())), rtol=1e-4, atol=1e-4)
    pipe.transformer.unload_lora()
    assert torch.equal(edit(ours), before)


def test_an_adapter_in_the_middle_of_an_edit_is_refused():
    pipe, done = tiny_wan(), []

    def load(stage, count, total):
        if stage == "denoise":
            done.append(count)
            if count == 1:
                add_adapter(pipe.transformer)

    with pytest.raises(RuntimeError, match=r"replaced after the lock was attached.*load adapters first"):
        call(pipe, progress=load)
    assert done == [0, 1] and untouched(pipe.transformer)


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
    from kvlock_fast.loop.graph import launch_facts

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
