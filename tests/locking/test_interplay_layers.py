"""What changes how a model's layers run: caches are refused however they came, other settings work."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import hooks
from torch import nn

import kvlock_fast as kvf
from kvlock_fast.locking.lock import Mode, TransformerLock
from kvlock_fast.models.wan import WAN
from tests.locking.test_interplay import EDITS
from tests.pipeline.test_pipeline import call, stock
from tests.support.tiny import tiny_cogvideox, tiny_wan, untouched


def timestep():
    return 500


CACHES = {
    "FirstBlockCache": (hooks.apply_first_block_cache, lambda: hooks.FirstBlockCacheConfig(threshold=0.1)),
    "FasterCache": (
        hooks.apply_faster_cache,
        lambda: hooks.FasterCacheConfig(
            current_timestep_callback=timestep, attention_weight_callback=lambda _: 0.5, is_guidance_distilled=True
        ),
    ),
    "PyramidAttentionBroadcast": (
        hooks.apply_pyramid_attention_broadcast,
        lambda: hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=timestep
        ),
    ),
    "MagCache": (
        hooks.apply_mag_cache,
        lambda: hooks.MagCacheConfig(num_inference_steps=5, mag_ratios=torch.ones(5)),
    ),
    "TaylorSeerCache": (
        hooks.apply_taylorseer_cache,
        lambda: hooks.TaylorSeerCacheConfig(cache_interval=2, cache_identifiers=[r"blocks\.\d+\.attn1"]),
    ),
    "SeaCache": (hooks.apply_sea_cache, hooks.SeaCacheConfig),
    "TextKVCache": (hooks.apply_text_kv_cache, hooks.TextKVCacheConfig),
    "LayerSkip": (hooks.apply_layer_skip, lambda: hooks.LayerSkipConfig(indices=[1], fqn="blocks")),
}
"""By name: what applies it, and how it is configured."""
ENABLED = [name for name in CACHES if name != "LayerSkip"]


def test_every_cache_of_diffusers_is_known():
    """What `enable_cache` takes, and what else of diffusers' hooks skips layers."""
    applied = {apply.__name__ for apply, _ in CACHES.values()}
    others = {"apply_context_parallel", "apply_group_offloading", "apply_layerwise_casting", "apply_tensor_parallel",
              "apply_layerwise_casting_hook"}  # fmt: skip
    assert applied == {name for name in vars(hooks) if name.startswith("apply_")} - others


@pytest.mark.parametrize("lock", ["paper", "cfg"])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_was_applied_is_refused_by_name(name, lock):
    """Also by edits that lock nothing: diffusers' pipelines tell caches of their branches, our loop does not."""
    apply, config = CACHES[name]
    pipe, done = tiny_wan(), []
    apply(pipe.transformer, config())
    with pytest.raises(kvf.InputError, match=rf"^diffusers' {name} is on"):
        call(pipe, lock=lock, progress=lambda *args: done.append(args))
    assert not done and untouched(pipe.transformer)


@pytest.mark.parametrize("name", ENABLED)
def test_a_cache_that_was_enabled_is_refused_until_it_is_off(name):
    pipe = tiny_wan()
    expected = call(pipe, steps=2).latents
    pipe.transformer.enable_cache(CACHES[name][1]())
    with pytest.raises(kvf.InputError, match=rf"{name}.* disable_cache\(\)"):
        call(pipe, steps=2)
    pipe.transformer.disable_cache()
    assert torch.equal(call(pipe, steps=2).latents, expected)


def test_a_cache_whose_hooks_are_not_known_is_refused_by_its_config():
    pipe = tiny_wan()
    pipe.transformer._cache_config = hooks.FirstBlockCacheConfig()
    with pytest.raises(kvf.InputError, match=r"the transformer's cache is on \(FirstBlockCacheConfig\)"):
        call(pipe)


@pytest.mark.parametrize("edit", ["lockstep", "resident"])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_is_applied_meanwhile_is_refused_at_once(name, edit):
    apply, config = CACHES[name]
    pipe, steps = tiny_wan(), []

    def switch_on(stage, done, total):
        if stage == "denoise":
            steps.append(done)
            if done == 2:
                apply(pipe.transformer, config())

    with pytest.raises(kvf.InputError, match=rf"^diffusers' {name} is on"):
        call(pipe, progress=switch_on, **EDITS[edit])
    assert steps == [0, 1, 2] and untouched(pipe.transformer)


def test_what_skips_layers_unknown_to_us_is_counted():
    """As a cache of somebody else's, which puts itself in the place of a block's forward while the edit runs."""
    pipe = tiny_wan()

    def switch_on(stage, done, total):
        if stage == "denoise" and done == 1:
            pipe.transformer.blocks[2].forward = lambda hidden_states, *args: hidden_states

    with pytest.raises(RuntimeError, match="4 of 6 locked projections ran"):
        call(pipe, progress=switch_on)
    assert untouched(pipe.transformer)


@pytest.mark.parametrize("make", [tiny_wan, tiny_cogvideox], ids=["wan", "cogvideox"])
def test_fused_projections_are_refused_until_they_are_apart(make):
    pipe, done = make(), []
    expected = call(pipe, steps=2).latents
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(kvf.InputError, match=r"attn1 has fused projections.* unfuse_qkv_projections\(\)"):
        call(pipe, progress=lambda *args: done.append(args))
    assert not done
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(call(pipe, steps=2).latents, expected)


def test_fused_projections_serve_unlocked_edits():
    pipe = tiny_wan()
    pipe.transformer.fuse_qkv_projections()
    assert torch.equal(call(pipe, lock="cfg").latents, stock(pipe))


@pytest.fixture
def attention_settings():
    """diffusers' choice of a backend is the whole process's."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry._active_backend
    yield
    registry._active_backend = before


def by_plain_attention(pipe):
    pipe.transformer.set_attention_backend("_native_math")


def by_slices(pipe):
    pipe.enable_attention_slicing()


def with_checkpoints(pipe):
    pipe.transformer.enable_gradient_checkpointing()


def channels_last(pipe):
    pipe.transformer.to(memory_format=torch.channels_last_3d)


class HalfLinear(nn.Linear):
    """A quantised layer as libraries make them: another class, whose weights are of a dtype of their own."""

    def __init__(self, like):
        super().__init__(like.in_features, like.out_features)
        self.weight, self.bias = nn.Parameter(like.weight.half()), nn.Parameter(like.bias.half())

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def with_half_linears(pipe):
    for block in pipe.transformer.blocks:
        for name in ("to_q", "to_k", "to_v"):
            setattr(block.attn1, name, HalfLinear(getattr(block.attn1, name)))


def with_halved_weights(pipe):
    for block in pipe.transformer.blocks:
        for name in ("to_q", "to_k", "to_v"):
            getattr(block.attn1, name).half().float()


def as_it_is(pipe):
    pass


SETTINGS = {
    "attention backend": (by_plain_attention, as_it_is),
    "attention slicing": (by_slices, as_it_is),
    "gradient checkpointing": (with_checkpoints, as_it_is),
    "channels last": (channels_last, as_it_is),
    "quantised linears": (with_half_linears, with_halved_weights),
}
"""By name: what is done to a pipeline, and what makes a plain one that edits alike."""


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_change_no_result(attention_settings, name, edit):
    change, alike = SETTINGS[name]
    plain, pipe = tiny_wan(), tiny_wan()
    alike(plain)
    expected = call(plain, **EDITS[edit]).latents
    change(pipe)
    torch.testing.assert_close(call(pipe, **EDITS[edit]).latents, expected, rtol=0, atol=5e-6)
    assert untouched(pipe.transformer)
    assert torch.equal(call(pipe, lock="cfg").latents, stock(pipe))


def test_a_transformer_that_was_compiled_in_place():
    pipe = tiny_wan()
    expected = call(pipe, steps=3).latents
    pipe.transformer.compile(backend="eager")
    torch.testing.assert_close(call(pipe, steps=3).latents, expected, rtol=0, atol=5e-6)
    assert untouched(pipe.transformer)


def test_a_wrapper_of_torch_compile_is_refused():
    pipe, done = tiny_wan(), []
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(kvf.InputError, match=r"wrapped by torch.compile\(\)"):
        call(pipe, progress=lambda *args: done.append(args))
    assert not done


def test_tensor_parallelism_is_refused():
    pipe = tiny_wan()
    pipe.transformer._parallel_config = SimpleNamespace(tensor_parallel_config=object(), context_parallel_config=None)
    with pytest.raises(kvf.InputError, match="runs in tensor parallelism"):
        call(pipe)


@pytest.mark.parametrize("mode", [Mode.CAPTURE, Mode.IN_BATCH])
def test_gradients_are_refused(mode):
    """They would be wrong: with checkpoints, a layer is run again when the lock's forward is over."""
    pipe = tiny_wan()
    with_checkpoints(pipe)
    lock, inputs = TransformerLock(pipe.transformer, WAN), (torch.randn(2, 4, 1, 4, 6), torch.tensor([5.0, 5.0]))
    inputs += (torch.zeros(2, 2, 16),)
    with lock.forward(Mode.OFF):
        assert pipe.transformer(*inputs, return_dict=False)[0].requires_grad
    late = pytest.raises(RuntimeError, match=r"locked without a gradient.*no_grad\(\)")
    with late, lock.forward(mode, torch.ones(1, 6), {}, tokens=6):
        pipe.transformer(*inputs, return_dict=False)
    lock.detach()


def test_a_copy_of_a_locked_model_is_plain_and_can_be_locked():
    transformer = tiny_wan().transformer
    lock = TransformerLock(transformer, WAN)
    twin = copy.deepcopy(transformer)
    assert untouched(twin)
    TransformerLock(twin, WAN).detach()
    lock.detach()
    assert untouched(transformer) and untouched(twin)
