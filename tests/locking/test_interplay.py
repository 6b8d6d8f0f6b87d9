"""What diffusers, accelerate and peft do to a model, and the lock on it: each works, or is refused before it runs.

docs/interplay.md says it all in one place.
"""

import pytest
import torch

import kvlock_fast as kvf
from kvlock_fast.cache.fingerprint import fingerprint
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.locking.lock import Mode, TransformerLock
from kvlock_fast.models.wan import WAN
from tests.pipeline.test_pipeline import a_mask, a_video, call, stock
from tests.support.rounding import allowed, in_double
from tests.support.tiny import tiny_wan, untouched

pytestmark = pytest.mark.numeric

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

CPU = torch.device("cpu")
SPARSE = LockConfig.preset("fixed-alpha", alpha=1.0, compute="foreground")
RESIDENT = CacheConfig(tier="resident", format="native")
EDITS = {
    "lockstep": {"lock": "paper", "steps": 3},
    "separate": {"lock": LockConfig.preset("kvlock", guidance_batching="separate"), "steps": 3},
    "resident": {"lock": "kvlock", "cache": RESIDENT, "steps": 3},
    "foreground": {"lock": SPARSE, "steps": 3},
    "foreground, resident": {"lock": SPARSE, "cache": RESIDENT, "steps": 3},
}


def group_offload(kind: str, disk: bool = False, **settings):
    def prepare(pipe, folder):
        pipe.transformer.enable_group_offload(
            onload_device=CPU, offload_device=CPU, offload_type=kind,
            offload_to_disk_path=str(folder) if disk else None, **settings,
        )  # fmt: skip

    return prepare


def offload_pipeline_in_groups(pipe, folder):
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def offload_models(pipe, folder):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_sequentially(pipe, folder):
    # What `enable_sequential_cpu_offload` does, but for the device's number: accelerate knows no "cpu:0".
    for model in (pipe.transformer, pipe.vae, pipe.text_encoder):
        accelerate.cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)


def offload_to_files(pipe, folder):
    accelerate.disk_offload(pipe.transformer, str(folder), CPU)


def map_devices(pipe, folder):
    accelerate.dispatch_model(pipe.transformer, {"": "cpu"}, main_device="cpu", force_hooks=True)


OFFLOADED = {
    "group offload, blocks": group_offload("block_level", num_blocks_per_group=2),
    "group offload, leaves": group_offload("leaf_level"),
    "group offload, blocks, to disk": group_offload("block_level", num_blocks_per_group=2, disk=True),
    "group offload, leaves, to disk": group_offload("leaf_level", disk=True),
    "group offload of the pipeline": offload_pipeline_in_groups,
    "model CPU offload": offload_models,
    "sequential CPU offload": offload_sequentially,
    "disk offload by accelerate": offload_to_files,
    "device_map": map_devices,
}
"""By name, what is done to a pipeline; the second argument is a folder. All keep its weights as they are."""


@pytest.fixture(scope="module")
def plain():
    """Edits of a model that nothing was done to, by name."""
    return {name: call(tiny_wan(), **arguments).latents for name, arguments in EDITS.items()}


@pytest.fixture(scope="module")
def rounding(plain):
    """The difference that rounding alone may make to one of them."""
    return max(
        allowed(plain[name], call(in_double(tiny_wan()), **EDITS[name]).latents)
        for name in ("lockstep", "separate", "resident")
    )


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("way", OFFLOADED)
def test_offloaded_models_edit_as_others(plain, rounding, tmp_path, way, edit):
    pipe = tiny_wan()
    OFFLOADED[way](pipe, tmp_path)
    # Weights that come out of a file may be aligned otherwise, and are then summed in another order.
    torch.testing.assert_close(call(pipe, **EDITS[edit]).latents, plain[edit], rtol=0, atol=rounding)
    assert untouched(pipe.transformer)


@pytest.mark.parametrize("way", OFFLOADED)
def test_offloaded_models_are_left_as_they_were(tmp_path, way):
    """Off means diffusers' own bits, before an edit and after it; and the hooks go on bringing and taking weights."""
    pipe = tiny_wan()
    OFFLOADED[way](pipe, tmp_path)
    expected, state = stock(pipe), offloading_state(pipe.transformer)
    assert torch.equal(call(pipe, lock="cfg").latents, expected)
    call(pipe, steps=2)
    assert torch.equal(stock(pipe), expected)
    assert offloading_state(pipe.transformer) == state


def offloading_state(transformer):
    """Which hooks there are, and where every weight is."""
    around = {
        name: (type(getattr(module, "_hf_hook", None)).__name__, sorted(hooks_on(module)), "forward" in vars(module))
        for name, module in transformer.named_modules()
    }
    return around, {name: (x.device, x.dtype, x.shape) for name, x in transformer.state_dict().items()}


def hooks_on(module):
    return getattr(getattr(module, "_diffusers_hook", None), "hooks", {})


@pytest.mark.parametrize("way", ["group offload, leaves", "model CPU offload", "sequential CPU offload"])
def test_offloading_after_the_pipeline_is_made(plain, tmp_path, way, rounding):
    pipe = tiny_wan()
    ours = kvf.KVLockPipeline.from_pipe(pipe)
    OFFLOADED[way](pipe, tmp_path)
    out = ours(
        a_video(), a_mask(), source_prompt="a red circle", prompt="a blue circle", num_inference_steps=3,
        generator=torch.Generator().manual_seed(1), lock=LockConfig.preset("paper"), output="latent",
    )  # fmt: skip
    torch.testing.assert_close(out.latents, plain["lockstep"], rtol=0, atol=rounding)


@pytest.mark.parametrize("way", OFFLOADED)
def test_caches_know_offloaded_models(tmp_path, way):
    """What is offloaded is the same model to a cache on disk, and one with other weights is another."""
    pipe, other = tiny_wan(), tiny_wan()
    alike = fingerprint([pipe.transformer])
    other.transformer.blocks[1].attn1.to_v.weight.data[0, 0] += 1e-3
    different = fingerprint([other.transformer])
    assert alike != different
    for some, expected in ((pipe, alike), (other, different)):
        folder = tmp_path / expected
        folder.mkdir()
        OFFLOADED[way](some, folder)
        assert fingerprint([some.transformer]) == expected
        call(some, steps=2)
        assert fingerprint([some.transformer]) == expected


def test_weights_that_are_nowhere_are_named():
    pipe = tiny_wan()
    pipe.transformer.proj_out.to("meta")
    with pytest.raises(kvf.InputError, match=r"the weights of proj_out.weight are not in memory"):
        fingerprint([pipe.transformer])


@pytest.mark.parametrize("way", ["group offload, blocks, to disk", "sequential CPU offload"])
def test_a_cache_on_disk_serves_an_offloaded_model(tmp_path, way, rounding):
    cache, folder = CacheConfig(tier="disk", format="native", root=tmp_path / "cache"), tmp_path / "weights"
    expected = call(tiny_wan(), lock="kvlock", cache=cache)
    pipe = tiny_wan()
    OFFLOADED[way](pipe, folder)
    out = call(pipe, lock="kvlock", cache=cache)
    torch.testing.assert_close(out.latents, expected.latents, rtol=0, atol=rounding)
    assert out.trace.forwards == expected.trace.forwards - 5  # none of the source


def attached(transformer):
    """What a loop of one's own predicts: of an edit that is locked to its source."""
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 1, 4, 6, generator=generator), torch.randn(2, 5, 16, generator=generator)
    foreground, when = torch.tensor([True, False, False, True, False, True]), torch.tensor([500.0])
    with torch.no_grad(), kvf.attach(transformer, foreground) as kv:
        with kv.source():
            transformer(latents[:1], when, text[:1])
        with kv.edit(0.7):
            return transformer(latents[1:], when, text[1:], return_dict=False)[0]


@pytest.mark.parametrize("way", OFFLOADED)
def test_a_loop_of_ones_own_with_an_offloaded_model(tmp_path, way, rounding):
    pipe = tiny_wan()
    expected = attached(tiny_wan().transformer)
    OFFLOADED[way](pipe, tmp_path)
    torch.testing.assert_close(attached(pipe.transformer), expected, rtol=0, atol=rounding)
    assert untouched(pipe.transformer)


@pytest.mark.parametrize("way", OFFLOADED)
def test_fast_processors_of_an_offloaded_model(tmp_path, way, rounding):
    """They read the norms' weights by themselves: where these come with their module's forward, they are refused."""
    expected, pipe = call(tiny_wan(), **EDITS["resident"], processors="fast").latents, tiny_wan()
    OFFLOADED[way](pipe, tmp_path)
    if any("forward" in vars(block.attn1.norm_k) for block in pipe.transformer.blocks):
        with pytest.raises(kvf.InputError, match=r"processors is 'fast', but .* hooks on its norms"):
            call(pipe, **EDITS["resident"], processors="fast")
    else:
        out = call(pipe, **EDITS["resident"], processors="fast").latents
        torch.testing.assert_close(out, expected, rtol=0, atol=rounding)
    assert untouched(pipe.transformer)


def cast_layers(pipe, compute=torch.float32):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)


def rounded(compute=torch.float32):
    """A pipeline whose weights are those that layerwise casting stores."""
    cast, pipe = tiny_wan(), tiny_wan()
    cast_layers(cast, compute)
    pipe.transformer.to(compute)
    names = [name for name, module in cast.transformer.named_modules() if "layerwise_casting" in hooks_on(module)]
    assert any(name.endswith("attn1.to_k") for name in names)
    for name in names:
        pipe.transformer.get_submodule(name).to(torch.float8_e4m3fn).to(compute)
    return pipe


@pytest.mark.parametrize("edit", EDITS)
def test_layerwise_casting_edits_as_what_it_stores(edit):
    pipe = tiny_wan()
    cast_layers(pipe)
    state = offloading_state(pipe.transformer)
    out = call(pipe, **EDITS[edit]).latents
    assert torch.equal(out, call(rounded(), **EDITS[edit]).latents)
    assert offloading_state(pipe.transformer) == state and untouched(pipe.transformer)
    assert torch.equal(call(pipe, lock="cfg").latents, stock(pipe))


def test_caches_know_a_model_whose_layers_are_cast(tmp_path):
    cache, pipe = CacheConfig(tier="disk", format="native", root=tmp_path), tiny_wan()
    cast_layers(pipe)
    first, again = (call(pipe, lock="kvlock", cache=cache, steps=3) for _ in range(2))
    assert torch.equal(first.latents, again.latents) and again.trace.forwards < first.trace.forwards
    assert fingerprint([pipe.transformer]) != fingerprint([rounded().transformer])  # of other bytes


def test_layerwise_casting_computes_in_its_own_dtype():
    """Keys are kept, texts are encoded and caches are known by the dtype of computing, not by that of the weights."""
    pipe = tiny_wan()
    pipe.transformer.to(torch.bfloat16)
    cast_layers(pipe, torch.bfloat16)
    assert call(pipe, **EDITS["resident"]).latents.isfinite().all()
    kept, lock = {}, TransformerLock(pipe.transformer, WAN)
    with torch.no_grad(), lock.forward(Mode.CAPTURE, kept=kept):
        pipe.transformer(torch.randn(1, 4, 1, 4, 6).bfloat16(), torch.tensor([5.0]), torch.zeros(1, 2, 16).bfloat16())
    lock.detach()
    assert {x.dtype for x in kept.values()} == {torch.bfloat16}
    wider = tiny_wan()
    cast_layers(wider)
    assert fingerprint([pipe.transformer]) != fingerprint([wider.transformer])
