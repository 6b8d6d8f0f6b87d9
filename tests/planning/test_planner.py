"""The planner: model facts against diffusers, formulas against published tables, bytes against what is allocated."""

import inspect
import json
import re
from dataclasses import replace
from functools import cache
from math import prod

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlock_fast.cache.layout import KVShape, StepLayout
from kvlock_fast.cache.store import HostStore, ResidentStore
from kvlock_fast.cli import main
from kvlock_fast.errors import InputError
from kvlock_fast.kernels.quantize import FORMATS
from kvlock_fast.ops import quantize_kv
from kvlock_fast.planning import costs, machine, planner
from kvlock_fast.planning.any_family import on_meta, transformer_size
from kvlock_fast.planning.find_model import find_model, from_config, from_pipeline
from kvlock_fast.planning.job import DEVICE_SLOTS, Job
from kvlock_fast.planning.known_models import CONFIGS, MODELS
from kvlock_fast.planning.machine import Machine
from kvlock_fast.planning.model_size import ModelSize
from kvlock_fast.planning.planner import ladder, plan
from kvlock_fast.planning.render import as_json, foreground_gains, render
from kvlock_fast.units import parse_bytes, text_bytes, text_seconds
from tests.support.tiny import tiny_vae, tiny_wan

GB, TB = 10**9, 10**12
BIG = Machine(1000 * TB, 1000 * TB, 1000 * TB)
TINY = replace(MODELS["demo"], name="tiny", layers=2, heads=2, head_dim=16, feed_forward=64)

# The class, what differs from its defaults, and its video self-attention modules.
CLASSES = {
    "wan-1.3b": (
        "WanTransformer3DModel",
        dict(num_attention_heads=12, num_layers=30, ffn_dim=8960),
        r"blocks\.\d+\.attn1",
    ),
    "wan-14b": ("WanTransformer3DModel", {}, r"blocks\.\d+\.attn1"),
    "cogvideox-2b": ("CogVideoXTransformer3DModel", {}, r"transformer_blocks\.\d+\.attn1"),
    "cogvideox-5b": (
        "CogVideoXTransformer3DModel",
        dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True),
        r"transformer_blocks\.\d+\.attn1",
    ),
    "ltx": ("LTXVideoTransformer3DModel", {}, r"transformer_blocks\.\d+\.attn1"),
    "hunyuan-video": ("HunyuanVideoTransformer3DModel", {}, r"(single_)?transformer_blocks\.\d+\.attn"),
}  # fmt: skip
PIPELINES = {
    "wan-1.3b": "WanPipeline", "wan-14b": "WanPipeline", "cogvideox-2b": "CogVideoXPipeline",
    "cogvideox-5b": "CogVideoXPipeline", "ltx": "LTXPipeline", "hunyuan-video": "HunyuanVideoPipeline",
}  # fmt: skip
COGVIDEOX_VAE = dict(
    latent_channels=16, block_out_channels=(128, 256, 256, 512), layers_per_block=3,
    down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
)  # fmt: skip
VAES = {"wan": ("AutoencoderKLWan", {}), "cogvideox": ("AutoencoderKLCogVideoX", COGVIDEOX_VAE),
        "ltx": ("AutoencoderKLLTXVideo", {}), "hunyuan-video": ("AutoencoderKLHunyuanVideo", {})}  # fmt: skip


def a_pipeline(kind: str, **parts):
    """A pipeline of diffusers with these parts alone."""
    wanted = inspect.signature(getattr(diffusers, kind).__init__).parameters
    empty = {name: None for name, value in wanted.items() if name != "self" and value.default is inspect._empty}
    return getattr(diffusers, kind)(**{**empty, **parts})


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


@cache
def family_vae(family: str):
    name, changes = VAES[family]
    return on_meta(name, changes)


# Facts of models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_known_models_are_what_diffusers_builds(name):
    kind, changes, pattern = CLASSES[name]
    model, size = on_meta(kind, changes), MODELS[name]
    attentions = [m for n, m in model.named_modules() if re.fullmatch(pattern, n)]
    assert len(attentions) == size.layers
    assert {a.to_v.out_features for a in attentions} == {size.dim} and attentions[0].heads == size.heads
    assert size.parameters == parameters(model)
    vae = family_vae(size.family)
    assert size.vae_parameters == parameters(vae)
    same = {"name": name, "text_encoder_parameters": size.text_encoder_parameters, "dtype": size.dtype}
    assert replace(from_pipeline(a_pipeline(PIPELINES[name], transformer=model, vae=vae)), **same) == size
    alone = transformer_size({**changes, **dict(model.config), "_class_name": kind}, name)
    assert replace(alone, **same, vae_parameters=size.vae_parameters) == size
    known = dict(on_meta(kind, CONFIGS[name]).config)
    assert known.pop("_class_name") == kind and known == dict(model.config)
    assert size.text_tokens == {"cogvideox": 226, "hunyuan-video": 256}.get(size.family, 0)


@pytest.mark.parametrize("name", CLASSES)
def test_default_shapes_are_the_pipelines(name):
    size, call = MODELS[name], inspect.signature(getattr(diffusers, PIPELINES[name]).__call__).parameters
    shape = [call[key].default for key in ("num_frames", "height", "width")]
    if size.family == "cogvideox":  # which leaves it to the transformer's config
        shape = [49, 60 * 8, 90 * 8]
    assert [size.frames, size.height, size.width] == shape
    lengths = (call["max_sequence_length"].default, size.cross_tokens or size.text_tokens)
    assert lengths[0] == lengths[1]


def test_text_encoders_have_the_parameters_of_their_classes():
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        LlamaConfig,
        LlamaModel,
        T5Config,
        T5EncoderModel,
        UMT5Config,
        UMT5EncoderModel,
    )

    xxl = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    llama = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                 num_key_value_heads=8, vocab_size=128320)  # fmt: skip
    clip = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        umt5 = parameters(UMT5EncoderModel(UMT5Config(vocab_size=256384, **xxl)))
        t5 = parameters(T5EncoderModel(T5Config(vocab_size=32128, **xxl)))
        two = parameters(LlamaModel(LlamaConfig(**llama))) + parameters(CLIPTextModel(CLIPTextConfig(**clip)))
    found = {size.family: size.text_encoder_parameters for size in MODELS.values() if size.name != "demo"}
    assert found == {"wan": umt5, "cogvideox": t5, "ltx": t5, "hunyuan-video": two}


def test_the_demo_is_the_bundled_model():
    from kvlock_fast.demo import demo_case
    from kvlock_fast.models.bundled import model_path

    shape = demo_case().source.video.shape[:3]
    demo = MODELS["demo"]
    read = replace(from_config(model_path()), name="demo", frames=17, height=64, width=64, dtype=torch.float32)
    assert read == demo and shape == (demo.frames, demo.height, demo.width)


TINY_CONFIGS = {
    "WanTransformer3DModel": dict(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=6, text_dim=16, freq_dim=18,
        ffn_dim=34, num_layers=3, patch_size=(1, 2, 2), cross_attn_norm=False,
    ),
    "CogVideoXTransformer3DModel": dict(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=6, text_embed_dim=10,
        time_embed_dim=14, num_layers=2, patch_size=2, patch_size_t=2, use_rotary_positional_embeddings=True,
        sample_width=8, sample_height=6, sample_frames=9, max_text_seq_length=5,
    ),
    "LTXVideoTransformer3DModel": dict(
        num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, in_channels=6, out_channels=4,
        caption_channels=10, num_layers=3,
    ),
    "HunyuanVideoTransformer3DModel": dict(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=6, num_layers=2, num_single_layers=3,
        num_refiner_layers=1, mlp_ratio=3.0, text_embed_dim=10, pooled_projection_dim=14, guidance_embeds=False,
        rope_axes_dim=(4, 4, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_any_config_file_gives_its_parameters_and_tokens(kind, tmp_path):
    """Small odd sizes, so that no two terms of a formula can stand for each other; tokens by the model itself."""
    model = getattr(diffusers, kind)(**TINY_CONFIGS[kind])
    model.save_config(tmp_path)
    size = from_config(tmp_path / "config.json")
    assert size.parameters == parameters(model)
    strides = size.geometry.temporal_stride, size.geometry.spatial_stride
    latents = torch.zeros(1, model.config.in_channels, 4, 6, 8)
    pixels = 1 + 3 * strides[0], 6 * strides[1], 8 * strides[1]
    assert prod(size.geometry.token_grid(*pixels)) == patchified(model, latents)
    job = Job(size, *pixels, 0, 0, 1)
    # What a model is shown beside its latents is among its channels in, and not among those out.
    assert job.video_latent_bytes == 4 * latents[:, :1].numel() * model.config.out_channels


def patchified(model, latents) -> int:
    """How many video tokens the model makes of latents [1, C, T, h, w]."""
    name = type(model).__name__
    if name.startswith("Wan"):
        return model.patch_embedding(latents).flatten(2).shape[2]
    if name.startswith("Hunyuan"):
        return model.x_embedder(latents).shape[1]
    if name.startswith("LTX"):
        c = model.config
        return diffusers.LTXPipeline._pack_latents(latents, c.patch_size, c.patch_size_t).shape[1]
    text = torch.zeros(1, 5, model.config.text_embed_dim)
    return model.patch_embed(text, latents.transpose(1, 2)).shape[1] - 5


@pytest.mark.parametrize("second", [False, True], ids=["one transformer", "two"])
def test_a_folder_and_a_loaded_pipeline_say_the_same(second, tmp_path):
    pipe = tiny_wan(second=second)
    pipe.save_pretrained(tmp_path)
    loaded, read = from_pipeline(pipe), from_config(tmp_path)
    assert loaded.transformers == 1 + second and loaded.parameters == parameters(pipe.transformer)
    assert loaded.text_encoder_parameters == parameters(pipe.text_encoder)
    assert loaded.vae_parameters == parameters(tiny_vae())
    assert loaded.dtype == torch.float32
    # The text encoder's file holds its shared embedding once or twice, as the library likes.
    same = {"name": "", "dtype": torch.float32, "text_encoder_parameters": 0}
    assert replace(loaded, **same) == replace(read, **same)
    assert loaded.weight_bytes(torch.float32) == sum(
        p.nbytes for m in pipe.components.values() if isinstance(m, torch.nn.Module) for p in m.parameters()
    )


BAD_CONFIGS = {
    "no json": ("{", "cannot be read as a model's config"),
    "a list": ("[]", "it holds a list"),
    "another class": ('{"_class_name": "UNet2DModel"}', "is a UNet2DModel, of no known family"),
    "no class": ("{}", "is a None, of no known family"),
    "too little": ('{"_class_name": "WanTransformer3DModel"}', "has a config without 'num_attention_heads'"),
    "no numbers": (json.dumps({**TINY_CONFIGS["WanTransformer3DModel"], "_class_name": "WanTransformer3DModel",
                               "num_layers": "3"}), "makes no sense"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_config_that_cannot_be_used_is_named(name, tmp_path):
    text, message = BAD_CONFIGS[name]
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        find_model(tmp_path / "config.json")
    assert "config.json" in str(caught.value)


# Formulas ----------------------------------------------------------------------------------------------------------

# model, frames: tokens, attention ms and other matrix ms a layer, seconds of a step of two forwards, attention's share
# in %, ms that locking adds a layer, GB a step naive and as fp8 of 80 %, GB of 20 steps in fp8. As published in the
# project's table of floors, which counts no scales.
FLOORS = [
    ("wan-1.3b", 81, 32760, 8.8, 3.6, 0.75, 71, 0.019, 6.04, 2.42, 48),
    ("wan-1.3b", 33, 14040, 1.61, 1.56, 0.19, 51, 0.008, 2.59, 1.04, 21),
    ("wan-14b", 81, 32760, 29.3, 26.1, 4.43, 53, 0.062, 26.8, 10.7, 215),
    ("cogvideox-2b", 49, 17550, 5.0, 2.1, 0.42, 70, 0.013, 4.0, 1.62, 32),
    ("cogvideox-5b", 49, 17550, 7.9, 5.4, 1.12, 60, 0.020, 9.1, 3.62, 72),
]


def rounds_to(value: float, published: float) -> bool:
    """Whether `value` is `published` but for a rounding in its last digit (half of one, and a hair)."""
    digits = len(str(published).partition(".")[2])
    return abs(value - published) <= 0.51 * 10**-digits


@pytest.mark.parametrize("row", FLOORS, ids=[f"{row[0]} {row[1]}f" for row in FLOORS])
def test_formulas_give_the_table_of_floors(row):
    name, frames, tokens, attention, matrices, step, share, lock, naive, packed, twenty = row
    model = MODELS[name]
    job = Job(model, frames, model.height, model.width, round(0.8 * tokens), 20, 50)
    assert job.tokens == tokens
    layer = costs.attention_seconds(job.all_tokens, job.all_tokens, model.heads, model.head_dim)
    others = costs.matrix_seconds(job.all_tokens, model)
    assert rounds_to(1e3 * layer, attention) and rounds_to(1e3 * others, matrices)
    assert rounds_to(2 * job.forward_seconds, step) and rounds_to(100 * layer / (layer + others), share)
    assert rounds_to(job.naive_bytes_per_step / GB, naive)
    payload = job.layout("fp8_e4m3").payload_bytes
    assert rounds_to(payload / GB, packed) and rounds_to(20 * payload / GB, twenty)
    assert rounds_to(1e3 * costs.lock_seconds(payload, 1) / model.layers, lock)


def test_attention_is_bound_by_whatever_is_slowest():
    """With one query the keys and values must still be read; with heads of 16 the exponentials are the most."""
    read = 2 * (2 * 1 + 2 * 4096) * 1536 / costs.COPY_BANDWIDTH
    assert costs.attention_seconds(1, 4096, 12, 128) == pytest.approx(read)
    exponentials = 4096 * 4096 * 12 / (132 * 16 * costs.CLOCK)
    assert costs.attention_seconds(4096, 4096, 12, 16) == pytest.approx(exponentials)


@pytest.mark.parametrize(("share", "stored", "lockstep"), [(0.2, 5.0, 2.1), (0.3, 3.3, 1.9)])
def test_foreground_only_gains_are_those_published(share, stored, lockstep):
    model = MODELS["wan-1.3b"]
    gains = foreground_gains(Job(model, 81, 480, 832, round((1 - share) * 32760), 50, 50))
    assert rounds_to(gains["stored"], stored) and rounds_to(gains["lockstep"], lockstep)


def test_ratios_reach_the_targets():
    """fp8 2.4x at equal steps and 6x with 20 of 50, int4 4.2x and 10.5x; two slots on the GPU 60x below naive."""
    made = plan(Job(MODELS["wan-1.3b"], 81, 480, 832, 26208, 20, 50), BIG)
    figures = as_json(made)["formats"]
    for format, step, whole in (("fp8_e4m3", 2.4, 6), ("int4", 4.2, 10.5)):
        assert figures[format]["ratio_to_naive_per_step"] >= step and figures[format]["ratio_to_naive"] >= whole
    slots = made.row("host", "fp8_e4m3").needed.gpu - made.row("host", "native").needed.gpu
    slots += DEVICE_SLOTS * figures["native"]["bytes_per_step"]
    assert as_json(made)["naive_bytes"] / slots >= 60


# Bytes -------------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    layers = tuple(sorted(draw(st.sets(st.integers(0, 9), min_size=1, max_size=3))))
    shape = KVShape(layers, draw(st.integers(0, 150)), draw(st.integers(1, 3)), draw(st.integers(1, 70)))
    return shape, draw(st.sampled_from(FORMATS)), draw(st.sampled_from([torch.float32, torch.bfloat16]))


def test_long_sequences_of_narrow_heads_share_scales():
    shares = {
        (tokens, dim, format): StepLayout.usual(KVShape((0,), tokens, 2, dim), format, torch.bfloat16).tokens_per_scale
        for tokens in (256, 4095, 4096, 14040)
        for dim in (32, 64, 128)
        for format in FORMATS
    }
    assert {case for case, n in shares.items() if n != 1} == {
        (tokens, dim, "fp8_e4m3") for tokens in (4096, 14040) for dim in (32, 64)
    }
    assert set(shares.values()) == {1, 128}


@given(cases(), st.sampled_from([1, 128]))
@settings(max_examples=30)
def test_predicted_bytes_are_the_bytes_allocated(case, per_scale):
    shape, format, dtype = case
    layout = StepLayout(shape, format, dtype, per_scale if format == "fp8_e4m3" else 1)
    arena = layout.new_arena("cpu")
    assert arena.nbytes == layout.nbytes
    shares = {"tokens_per_scale": layout.tokens_per_scale}
    packed = [quantize_kv(torch.randn(shape.tensor).to(dtype), format, kind, **shares) for kind in ("k", "v")]
    assert layout.payload_bytes == len(shape.layers) * sum(p.codes.nbytes for p in packed)
    assert layout.payload_bytes + layout.scale_bytes == len(shape.layers) * sum(p.nbytes for p in packed)
    parts = [t for q in layout.packed(arena).values() for t in (q.codes, *q.scales)]
    made = [t for p in packed for t in (p.codes, *p.scales)] * len(shape.layers)
    assert [(t.shape, t.dtype) for t in parts] == [(t.shape, t.dtype) for t in made]


@st.composite
def jobs(draw):
    geometry = replace(MODELS["demo"].geometry, most_tokens=None)
    size = replace(
        TINY, geometry=geometry, layers=draw(st.integers(1, 4)), heads=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 40)),
    )  # fmt: skip
    frames, height, width = draw(st.integers(1, 30)), 8 * draw(st.integers(1, 4)), 8 * draw(st.integers(1, 4))
    tokens = prod(geometry.token_grid(frames, height, width))
    num_steps = draw(st.integers(1, 6))
    stored = draw(st.integers(0, num_steps))
    return Job(size, frames, height, width, draw(st.integers(0, tokens)), stored, num_steps, dtype=torch.float32)


@given(jobs())
@settings(max_examples=20)
def test_a_coupled_edit_needs_the_sources_prediction_at_every_step(job):
    coupled = replace(job, steps_predicted=job.num_steps)
    assert coupled.source_forwards == job.num_steps >= job.source_forwards == job.steps_stored
    tiers, before = planner.TIERS[1:], [job.needed(t, "native", 1, True).gpu for t in planner.TIERS[1:]]
    more = [coupled.needed(t, "native", 1, True).gpu - was for t, was in zip(tiers, before, strict=True)]
    assert more == [job.num_steps * job.video_latent_bytes] * 3  # fp32, as the job's weights
    assert coupled.needed("lockstep", None, 1, True) == job.needed("lockstep", None, 1, True)


@given(jobs(), st.sampled_from(FORMATS))
@settings(max_examples=30)
def test_what_the_stores_allocate_is_what_was_planned(job, format):
    """On the CPU, where all memory is the host's: beside weights, activations and latents it is the cache alone."""
    bare = job.needed("disk", format, 1, gpu=False).host - DEVICE_SLOTS * job.layout(format).nbytes
    for tier, store in (("resident", ResidentStore), ("host", HostStore)):
        made = store(job.layout(format), tuple(range(job.steps_stored)), torch.device("cpu"))
        assert job.needed(tier, format, 1, gpu=False).host - bare == made.nbytes
        made.close()
    latents = job.num_steps + job.steps_stored  # the path, and the prediction of each stored step
    disk = job.steps_stored * job.layout(format).nbytes + latents * job.video_latent_bytes
    assert job.needed("disk", format, 1, gpu=False).disk == disk
    assert bare == job.weight_bytes + job.rows(1, False) * job.activation_bytes + job.latent_bytes(1)


@given(jobs(), st.sampled_from(FORMATS), st.integers(1, 3))
@settings(max_examples=30)
def test_memory_is_the_hosts_without_a_gpu(job, format, prompts):
    for tier in planner.TIERS:
        kept = None if tier == "lockstep" else format
        with_gpu, without = (job.needed(tier, kept, prompts, gpu) for gpu in (True, False))
        staging = with_gpu.host if tier == "disk" else 0
        assert without.gpu == 0 and without.host == with_gpu.gpu + with_gpu.host - staging
        assert without.disk == with_gpu.disk


@given(
    st.sampled_from([m for m in MODELS if m != "demo"]), st.integers(1, 200), st.integers(0, 60), st.floats(0.05, 0.9)
)
@settings(max_examples=30)
def test_more_frames_never_need_less(name, frames, more, share):
    model = MODELS[name]
    before, after = (planned(model, f, share) for f in (frames, frames + more))
    for a, b in zip(before.rows, after.rows, strict=True):
        assert a.needed.gpu <= b.needed.gpu and a.needed.host <= b.needed.host and a.needed.disk <= b.needed.disk
        assert a.compute_seconds <= b.compute_seconds and a.transfer_seconds <= b.transfer_seconds
        assert a.seconds <= b.seconds


@given(st.sampled_from([m for m in MODELS if m != "demo"]), st.floats(0.01, 0.98), st.floats(0, 0.02))
@settings(max_examples=30)
def test_a_larger_mask_never_needs_more(name, share, more):
    before, after = (planned(MODELS[name], MODELS[name].frames, s) for s in (share, share + more))
    for a, b in zip(before.rows, after.rows, strict=True):
        assert a.needed.gpu >= b.needed.gpu and a.needed.host >= b.needed.host and a.needed.disk >= b.needed.disk
        assert a.transfer_seconds >= b.transfer_seconds and a.seconds >= b.seconds
    assert foreground_gains(before.job)["stored"] >= foreground_gains(after.job)["stored"]


def planned(model: ModelSize, frames: int, share: float, on: Machine = BIG, steps: int = 50, ways=None, **more):
    tokens = prod(model.geometry.token_grid(frames, model.height, model.width))
    background = tokens - max(1, round(share * tokens))
    job = Job(model, frames, model.height, model.width, background, steps, 50, **{"dtype": model.dtype, **more})
    return plan(job, on, **(ways or {}))


@pytest.mark.parametrize("name", MODELS)
def test_forwards_rows_and_tiers_of_every_known_model(name):
    made = planned(MODELS[name], MODELS[name].frames, 0.2)
    assert [row.tier for row in made.rows] == ["lockstep"] + [t for t in planner.TIERS[1:] for _ in FORMATS]
    assert {(row.tier == "lockstep", row.rows) for row in made.rows} == {(True, 3), (False, 2)}
    lockstep, resident = made.row("lockstep"), made.row("resident", "native")
    assert (
        lockstep.needed.gpu - made.job.activation_bytes == resident.needed.gpu - 50 * made.job.layout("native").nbytes
    )
    assert all(row.needed.host == 0 for row in made.rows if row.tier in ("lockstep", "resident"))


def forward_arguments(model, size, dtype, rows=2):
    """Empty inputs of a forward at the model's own size, and the bytes of activations that are planned for it."""
    job = Job(size, size.frames, size.height, size.width, 0, 0, 1, dtype=dtype)
    t, h, w = size.geometry.token_grid(size.frames, size.height, size.width)
    pt, ph, pw = size.geometry.patch_size
    latents = torch.empty(rows, size.channels, t * pt, h * ph, w * pw, dtype=dtype)
    time, text = torch.ones(rows), torch.empty(rows, size.cross_tokens or size.text_tokens, 4096, dtype=dtype)
    given = dict(hidden_states=latents, timestep=time, encoder_hidden_states=text, return_dict=False)
    if size.family == "cogvideox":
        given["hidden_states"] = latents.transpose(1, 2).contiguous()
        if model.config.use_rotary_positional_embeddings:
            given["image_rotary_emb"] = (torch.empty(job.tokens, 64), torch.empty(job.tokens, 64))
    if size.family == "ltx":
        given |= dict(hidden_states=latents.flatten(2).transpose(1, 2).contiguous(), num_frames=t, height=h, width=w)
    if size.family in ("ltx", "hunyuan-video"):
        given["encoder_attention_mask"] = torch.ones(text.shape[:2], dtype=torch.bool)
    if size.family == "hunyuan-video":
        given |= dict(pooled_projections=torch.empty(rows, 768, dtype=dtype), guidance=time)
    return given, rows * job.activation_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_activations_are_what_diffusers_allocates(name, dtype):
    """Traced with fake tensors: every allocation of a forward of two blocks at full width, without its memory.

    Within 3 %, but for CogVideoX-2B: it is planned like 5B, which has rotary embeddings beside.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    tools = pytest.importorskip("torch.distributed._tools.mem_tracker")
    kind, changes, _ = CLASSES[name]
    short = {"num_layers": 1, "num_single_layers": 1} if name == "hunyuan-video" else {"num_layers": 2}
    before = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        torch.set_default_dtype(dtype)
        try:
            model = getattr(diffusers, kind)(**{**changes, **short}).eval()
        finally:
            torch.set_default_dtype(before)
        given, predicted = forward_arguments(model, MODELS[name], dtype)
        tracker = tools.MemTracker()
        tracker.track_external(model)
        with tracker:
            model(**given)
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert predicted == pytest.approx(peak["Total"] - weights, rel=0.08)


# The choice --------------------------------------------------------------------------------------------------------


def test_one_edit_once_stores_nothing():
    choice = planned(MODELS["wan-1.3b"], 81, 0.2).choice
    assert (choice.tier, choice.format) == ("lockstep", None) and "would save no forward" in choice.reason


def test_several_prompts_in_one_batch_store_nothing():
    assert planned(MODELS["wan-1.3b"], 81, 0.2, prompts=4).choice.tier == "lockstep"


def test_several_edits_are_stored_in_the_fastest_tier_that_fits():
    places = [
        (BIG, ("resident", "fp8_e4m3")),
        (Machine(80 * GB, 256 * GB, 4 * TB), ("host", "fp8_e4m3")),
        # Transfers from disk take 83 ms more a step than they can hide, and the source's forward 373 ms.
        (Machine(80 * GB, 64 * GB, 4 * TB), ("disk", "fp8_e4m3")),
        (Machine(80 * GB, 80 * GB, 80 * GB), ("host", "int4")),
        (Machine(100 * GB, 64 * GB, 60 * GB), ("resident", "int4")),
        (Machine(80 * GB, 64 * GB, 60 * GB), ("lockstep", None)),
    ]
    for there, (tier, format) in places:
        choice = planned(MODELS["wan-1.3b"], 81, 0.2, on=there, edits=5).choice
        assert (choice.tier, choice.format) == (tier, format), (there, choice)
        assert choice.reason and choice.reason[-1] != "." and "\n" not in choice.reason


def test_a_disk_slower_than_the_source_itself_is_not_used():
    """A short clip: 0.8 GB a step take longer from disk than the forward that would make it again."""
    there = Machine(40 * GB, 16 * GB, 4 * TB)
    made = planned(MODELS["wan-1.3b"], 17, 0.2, on=there, edits=5)
    disk = made.row("disk", "fp8_e4m3")
    assert disk.fits and disk.exposed_seconds > made.job.forward_seconds
    assert disk.source_seconds == pytest.approx(50 * disk.transfer_seconds)  # the write is the longer, too
    assert made.choice.tier == "lockstep" and "running the source along takes" in made.choice.reason


def test_the_reason_counts_the_forwards_saved():
    """Ten edits of 50 steps: 10 x 150 forwards in lockstep, 50 + 10 x 100 stored."""
    made = planned(MODELS["wan-14b"], 81, 0.2, edits=10)
    assert made.row("lockstep").seconds == pytest.approx(1500 * made.job.forward_seconds)
    assert made.row("resident", "fp8_e4m3").seconds == pytest.approx(1050 * made.job.forward_seconds, rel=2e-3)
    assert "1.43x less time" in made.choice.reason


def test_prompts_that_do_not_fit_one_batch_share_a_stored_source():
    there = Machine(24 * GB, 256 * GB, 4 * TB)
    made = planned(MODELS["wan-1.3b"], 81, 0.2, on=there, prompts=9)
    assert made.row("lockstep").prompts == 2 and made.row("host", "fp8_e4m3").prompts == 1
    assert (made.choice.tier, made.choice.prompts) == ("host", 1)


def test_nothing_fits_and_nothing_is_locked():
    none = planned(MODELS["wan-14b"], 81, 0.2, on=Machine(1 * GB, 1 * GB, 0)).choice
    assert (none.tier, none.format) == (None, None) and "where 1.00 GB are free" in none.reason
    assert "nothing to store" in planned(MODELS["wan-14b"], 81, 0.2, steps=0, edits=9).choice.reason
    assert "no token is background" in planned(MODELS["wan-14b"], 81, 1.0, edits=9).choice.reason


def test_lockstep_that_lacks_the_memory_of_one_row_more():
    model = MODELS["wan-14b"]
    big = planned(model, 81, 0.9)
    there = Machine(big.row("lockstep").needed.gpu - 1, TB, TB)
    choice = planned(model, 81, 0.9, on=there).choice
    assert (choice.tier, choice.format) == ("host", "fp8_e4m3") and "does not fit" in choice.reason


def test_steps_that_share_an_arena_and_steps_that_are_not_stored():
    """20 of 50 stored by twos; the source runs along in the other 30 locked steps."""
    made = planned(MODELS["wan-1.3b"], 81, 0.2, steps=10, steps_locked=50, steps_along=30)
    row, forward = made.row("resident", "fp8_e4m3"), made.job.forward_seconds
    assert row.source_seconds == pytest.approx(10 * forward)
    assert row.seconds == pytest.approx((10 + 20 * 2 + 30 * 3) * forward, rel=2e-3)
    assert made.row("lockstep").seconds == pytest.approx(150 * forward)
    once = planned(MODELS["wan-1.3b"], 81, 0.2, steps=20)
    more = row.needed.gpu - once.row("resident", "fp8_e4m3").needed.gpu
    assert more == made.job.activation_bytes - 10 * made.job.layout("fp8_e4m3").nbytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": {"formats": ("fp7",)}}, "formats must be some of native, bf16, fp8_e4m3, int8, int4, got ('fp7',)"),
        ({"ways": {"tiers": ()}}, "tiers must be some of lockstep, resident, host, disk, got ()"),
        ({"prompts": 0}, "prompts must be a whole number of at least 1, got 0"),
        ({"edits": True}, "edits must be a whole number of at least 1, got True"),
        ({"steps": 51}, "steps_locked must be a whole number from 0 to 50, got 51"),
        ({"steps_locked": 50, "steps_along": 1}, "steps_stored must be a whole number from 0 to 49, got 50"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        planned(TINY, 17, 0.2, **changes)
    with pytest.raises(ValueError, match="background_tokens must be a whole number from 0 to 320, got 321"):
        Job(TINY, 17, 64, 64, 321, 1, 1)


# The ladder --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [1, 2, 7])
@pytest.mark.parametrize("there", [BIG, Machine(24 * GB, 1 * GB, 1 * GB), Machine(None, 200 * GB, TB)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tier", planner.TIERS)
def test_each_rung_needs_less_than_the_one_before(tier, format, there, prompts):
    format = None if tier == "lockstep" else format
    made = planned(MODELS["wan-1.3b"], 81, 0.2, on=there, prompts=prompts)
    rungs = ladder(made, tier, format, prompts)
    assert 1 <= len(rungs) <= 5 and rungs[-1].tiled_decoding and all(rung.reason for rung in rungs)
    assert not any(rung.tiled_decoding for rung in rungs[:-1])
    tried = [(tier, format, prompts), *((r.tier, r.format, r.prompts) for r in rungs[:-1])]
    assert len(set(tried)) == len(tried)
    gpu = there.gpu_bytes is not None
    needed = [made.job.needed(*way, gpu=gpu) for way in tried]
    sizes = [n.gpu if gpu else n.host for n in needed]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert all(n.disk <= there.disk_bytes and (not gpu or n.host <= there.host_bytes) for n in needed[1:])


def test_the_ladder_goes_format_tier_prompts_tiles():
    made = planned(MODELS["wan-1.3b"], 81, 0.2, prompts=2)
    ways = [(r.tier, r.format, r.prompts, r.tiled_decoding) for r in ladder(made, "resident", "fp8_e4m3", 2)]
    assert ways[:2] == [("resident", "int4", 2, False), ("host", "fp8_e4m3", 2, False)]
    assert ways[-2][2] == 1 and ways[-1] == (*ways[-2][:3], True)


# Machines and units ------------------------------------------------------------------------------------------------


def test_this_machine_has_memory(tmp_path):
    here = Machine.here("cpu", tmp_path / "not" / "yet" / "there")
    assert here.gpu_bytes is None and here.host_bytes > 2**26 and here.disk_bytes >= 0


def test_a_containers_limit_counts(tmp_path):
    for name, text in (
        ("memory.max", "1000\n"),
        ("memory.current", "700"),
        ("memory.stat", "anon 5\ninactive_file 50"),
    ):
        (tmp_path / name).write_text(text)
    assert machine._container_free(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._container_free(tmp_path) == machine._container_free(tmp_path / "none") == float("inf")


def test_amounts_are_read_and_written():
    amounts = {"24GB": 24 * GB, "24 GiB": 24 * 2**30, "1.5tb": 1.5 * TB, "512M": 512 * 10**6, "7": 7, "0": 0, "3b": 3}
    assert {text: parse_bytes(text, "--disk") for text in amounts} == amounts
    for text in ("", "GB", "-1GB", "1e9", "24XB", "nan", "1,5GB", "9" * 30):
        with pytest.raises(InputError, match=r"--disk must be an amount of memory like 24GB or 24GiB, got '"):
            parse_bytes(text, "--disk")
    assert [text_bytes(n) for n in (0, 999, 1000, 6.04e9, 24e9, 301.9e9, 999.9e9)] == [
        "0 B", "999 B", "1.00 kB", "6.04 GB", "24.0 GB", "302 GB", "1.00 TB"]  # fmt: skip
    assert [text_seconds(s) for s in (0, 2e-8, 1.23e-5, 0.0498, 0.9996, 12.3)] == [
        "0 s", "0.02 us", "12.3 us", "49.8 ms", "1.00 s", "12.3 s"]  # fmt: skip


# The command -------------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    status = main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


EXAMPLE = "--config wan-1.3b --frames 81 --size 480x832 --mask-share 0.2 --steps 50".split()


def test_the_figures_as_json(capsys):
    machine = "--gpu-memory 80GB --host-memory 64GB --disk 900GB".split()
    status, out, err = run(capsys, *EXAMPLE, *machine, "--skip-share", "0", "--json", "-")
    data = json.loads(out, parse_constant=pytest.fail)
    assert status == 0 and err == ""
    assert (data["tokens"], data["text_tokens"], data["background_tokens"]) == (32760, 0, 26208)
    assert data["naive_bytes"] == 301_916_160_000 and data["naive_bytes_per_step"] == 6_038_323_200
    assert data["steps_stored"] == 50 and list(data["formats"]) == list(FORMATS)
    fp8 = data["formats"]["fp8_e4m3"]
    assert (
        fp8["payload_bytes_per_step"] == 2 * 26208 * 1536 * 30
        and fp8["scale_bytes_per_step"] == 2 * 26208 * 12 * 30 * 4
    )
    assert (
        fp8["bytes"] == 50 * fp8["bytes_per_step"] >= 50 * (fp8["payload_bytes_per_step"] + fp8["scale_bytes_per_step"])
    )
    assert len(data["tiers"]) == 16 and data["choice"]["tier"] == "lockstep" and data["choice"]["reason"]
    assert data["foreground_only"]["gain"]["stored"] == pytest.approx(5, rel=1e-3) and data["foreground_only"]["pays"]
    for row in data["tiers"]:
        assert row["fits"] == (not row["short"]) and row["seconds"] > 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "more", [(), ("--prompts", "12", "--edits", "30", "--gpu-memory", "24GB"), ("--disk", "0")], ids=str
)
def test_the_table_is_whole_and_narrow(name, more, capsys):
    status, out, err = run(capsys, "--config", name, *more)
    assert status == 0 and err == "" and max(map(len, out.splitlines())) <= 80
    for word in (*FORMATS, *planner.TIERS, "H200", "not measured", "choice: ", "naive", "Foreground-only"):
        assert word in " ".join(out.split())
    assert out.count("<-") == ("choice: none" not in out)
    assert not re.search(r"\d ?[kMGT]?B!?[\d-]|\d ?[mu]?s\d|e4m3\d", out)  # no column runs into the next


def test_nothing_that_fits_is_an_answer_too(capsys):
    status, out, _ = run(capsys, *EXAMPLE, "--gpu-memory", "1GB", "--host-memory", "1GB", "--disk", "1GB")
    assert status == 0 and "choice: none: nothing fits" in out


def test_lock_parameters_decide_what_is_stored(capsys):
    def stored(*more):
        data = json.loads(run(capsys, *EXAMPLE, "--skip-share", "0", *more, "--json", "-")[1])
        return data["steps_locked"], data["steps_stored"]

    assert stored() == (50, 50) and stored("--skip-share", 0.1) == (45, 45) and stored("--preset", "cfg") == (0, 0)
    assert stored("--warmup-alpha", 0, "--kappa", 20) == (20, 20)
    assert stored("--warmup-alpha", 0, "--kappa", 60) == (47, 47)  # three predictions must exist
    assert stored("--cache-steps", "dynamic", "--kappa", 12) == (50, 12)
    assert stored("--step-stride", 3) == (50, 17)
    assert stored("--alpha", 0.5, "--kappa", 20, "--warmup-alpha", 0) == (50, 50)
    assert stored("--lock-interval", "0.1-0.55") == (23, 23)  # steps 5 to 27


def test_steps_without_guidance_run_one_branch_less(capsys):
    whole, part = (
        json.loads(run(capsys, *EXAMPLE, "--skip-share", "0", *more, "--json", "-")[1])
        for more in ([], ["--guidance-interval", "0-0.4"])
    )
    assert (whole["steps_guided"], part["steps_guided"]) == (50, 20)
    for before, after in zip(whole["tiers"], part["tiers"], strict=True):
        assert before["seconds"] - after["seconds"] == pytest.approx(30 * whole["forward_seconds"])
    assert "guided (two branches) in 18 of 45 steps" in run(capsys, *EXAMPLE, "--guidance-interval", "0-0.4")[1]


def test_what_is_asked_for_reaches_the_plan(capsys):
    more = (
        "--layers",
        "0-3,7",
        "--format",
        "int4",
        "--format",
        "int8",
        "--dtype",
        "fp32",
        "--guidance",
        1,
        "--prompts",
        3,
    )
    data = json.loads(run(capsys, *EXAMPLE, *more, "--gpu-memory", "2TB", "--json", "-")[1])
    assert data["locked_layers"] == 5 and list(data["formats"]) == ["int8", "int4"] and data["dtype"] == "fp32"
    assert {row["forwards_per_step"] for row in data["tiers"] if row["fits"]} <= {3, 4} and not data["guided"]
    assert data["machine"]["gpu_bytes"] == 2 * TB
    assert data["formats"]["int8"]["payload_bytes_per_step"] == 2 * 26208 * 1536 * 5


def test_a_mask_is_counted_in_tokens(capsys, tmp_path):
    """A box of 64x64 pixels in one frame of nine: 4x4 tokens of 16 pixels, of the latent frame that holds it."""
    mask = np.zeros((9, 128, 256), bool)
    mask[3, 64:128, 0:64] = True
    np.save(tmp_path / "m.npy", mask)
    arguments = ("--config", "wan-1.3b", "--mask", tmp_path / "m.npy", "--size", "128x256", "--json", "-")
    data = json.loads(run(capsys, *arguments)[1])
    assert data["frames"] == 9 and data["tokens"] == 3 * 8 * 16
    assert data["foreground_tokens"] == 16 and data["background_tokens"] == data["tokens"] - 16


def test_sizes_and_lengths_are_rounded_with_a_warning(capsys):
    status, out, err = run(capsys, "--config", "cogvideox-5b", "--size", "475x719", "--frames", 47, "--json", "-")
    data = json.loads(out)
    assert status == 0 and (data["frames"], data["height"], data["width"]) == (49, 480, 720)
    assert data["tokens"] == 17550 and data["text_tokens"] == 226
    assert "warning: size 475x719 is not a multiple of 16x16: planning for 480x720" in err
    assert "warning: 47 frames are not 8n+1: planning for 49" in err


BAD = {
    "share of nothing": ("--mask-share 0", "--mask-share must be more than 0 and at most 1, got 0.0"),
    "share beyond all": ("--mask-share 1.01", "--mask-share must be more than 0 and at most 1, got 1.01"),
    "share not a number": ("--mask-share nan", "--mask-share must be more than 0 and at most 1, got nan"),
    "no frames": ("--frames 0", "--frames must be a whole number from 1 to 100000, got 0"),
    "no steps": ("--steps 0", "--steps must be a whole number from 1 to 10000, got 0"),
    "no prompts": ("--prompts 0", "--prompts"),
    "no edits": ("--edits -3", "--edits"),
    "no stride": ("--step-stride 0", "--step-stride"),
    "size": ("--size 480", "--size must be HEIGHTxWIDTH in pixels, like 480x832, got '480'"),
    "unknown config": ("--config wan-9b", "'wan-9b' is no config file, no model folder and none of wan-1.3b, wan-14b"),
    "both": ("--model demo", "one of --config and --model must be given, not both"),
    "format": ("--format fp7", "--format must be one of native, bf16, fp8_e4m3, int8, int4, got 'fp7'"),
    "dtype": ("--dtype int3", "dtype 'int3' is not one of bf16, fp16, fp32, auto"),
    "memory": ("--gpu-memory much", "--gpu-memory must be an amount of memory like 24GB or 24GiB, got 'much'"),
    "layer": ("--layers 30", "layers names layer 30, but the model has layers 0 to 29"),
    "preset": ("--preset papr", "unknown preset 'papr'"),
    "kappa": ("--kappa -1", "kappa must be a whole number of at least 0, got -1"),
    "guidance": ("--guidance inf", "--guidance must be a number of at least 0, got inf"),
    "mask and share": ("--mask m.png --mask-share 0.2", "--mask-share and --mask say the same"),
    "no mask": ("--mask no.png", "no.png"),
    "cache steps": ("--cache-steps some", "--cache-steps must be all or dynamic, got 'some'"),
    "too long": ("--frames 5001", "too many for wan-1.3b: it takes at most 1024 tokens along each side"),
    "json": ("--json no/such/folder.json", "no/such"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_exit_2(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, message = BAD[name]
    status, out, err = run(capsys, "--config", "wan-1.3b", *flags.split())
    last = err.strip().splitlines()[-1]
    assert status == 2 and out == "" and message in last and last.startswith("error: ") and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_no_model_is_named(capsys):
    assert run(capsys)[2].strip() == "error: one of --config and --model must be given, not neither"


def test_a_mask_that_does_not_fit_is_named(capsys, tmp_path):
    np.save(tmp_path / "m.npy", np.ones((5, 64, 64), bool))
    status, _, err = run(capsys, "--config", "wan-1.3b", "--mask", tmp_path / "m.npy")
    assert status == 2 and "does not fit 5 frames of 480x832" in err and "m.npy" in err
    np.save(tmp_path / "e.npy", np.zeros((5, 64, 64), bool))
    assert run(capsys, "--config", "wan-1.3b", "--mask", tmp_path / "e.npy")[0] == 2


def test_the_table_says_when_there_is_no_gpu():
    made = planned(MODELS["wan-1.3b"], 81, 0.2, on=Machine(None, 64 * GB, TB))
    assert "all memory is the host's" in render(made) and "none" in render(made)
