"""Sizes of the known models by name, and of the families whose configs are counted by formulas."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvlock_fast.errors import InputError
from kvlock_fast.masks import Geometry
from kvlock_fast.planning import parameters
from kvlock_fast.planning.model_size import ModelSize

Config = Mapping[str, Any]


@dataclass(frozen=True)
class _Family:
    """How the configs of a family are read. patch: (t, h, w) of a transformer's config; strides: temporal and spatial,
    of an autoencoder's; default: strides, frames, height, width where the configs do not tell; most_tokens and more:
    of `Geometry`.
    """

    name: str
    count: Callable[[Config], int]
    patch: Callable[[Config], tuple[int, int, int]]
    strides: Callable[[Config], tuple[int, int]]
    default: tuple[int, int, int, int, int]
    layers: Callable[[Config], int] = lambda c: c["num_layers"]
    feed_forward: Callable[[Config], int] = lambda c: 4 * c["num_attention_heads"] * c["attention_head_dim"]
    text_tokens: Callable[[Config], int] = lambda c: 0
    frame_size: Callable[[Config, int], tuple[int, int, int]] | None = None
    most_tokens: Callable[[Config], Any] = lambda c: c.get("rope_max_seq_len")
    more: Mapping[str, Any] = field(default_factory=dict)


def _flat_patch(c: Config) -> tuple[int, int, int]:
    return c["patch_size_t"] or 1, c["patch_size"], c["patch_size"]


def _ltx_strides(vae: Config) -> tuple[int, int]:
    """As AutoencoderKLLTXVideo has them where its config leaves them out."""
    halvings = 2 ** sum(vae["spatio_temporal_scaling"])
    time, space = vae.get("temporal_compression_ratio"), vae.get("spatial_compression_ratio")
    return time or vae["patch_size_t"] * halvings, space or vae["patch_size"] * halvings


def _cogvideox_limits(c: Config) -> tuple[int | None, int, int] | None:
    """Only 1.5's rotary codes are cut from a table, as large as its sample."""
    if c["patch_size_t"] is None or not c.get("use_rotary_positional_embeddings"):
        return None
    return None, c["sample_height"] // c["patch_size"], c["sample_width"] // c["patch_size"]


WAN = _Family(
    "wan",
    parameters.wan,
    patch=lambda c: tuple(c["patch_size"]),
    strides=lambda vae: (vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)),
    default=(4, 8, 81, 480, 832),
    layers=lambda c: c["num_layers"] + len(c.get("vace_layers") or ()),
    feed_forward=lambda c: c["ffn_dim"],
)


FAMILIES = {
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": WAN,
    "SkyReelsV2Transformer3DModel": WAN,
    "ChronoEditTransformer3DModel": replace(WAN, more={"least_frames": 5}),
    "CogVideoXTransformer3DModel": _Family(
        "cogvideox",
        parameters.cogvideox,
        patch=_flat_patch,
        strides=lambda vae: (vae["temporal_compression_ratio"], 2 ** (len(vae["block_out_channels"]) - 1)),
        default=(4, 8, 49, 480, 720),
        text_tokens=lambda c: c["max_text_seq_length"],
        frame_size=lambda c, stride: (c["sample_frames"], c["sample_height"] * stride, c["sample_width"] * stride),
        most_tokens=_cogvideox_limits,
        more={"lead_in": True, "latents_together": 2},
    ),
    "LTXVideoTransformer3DModel": _Family(
        "ltx",
        parameters.ltx,
        patch=_flat_patch,
        strides=_ltx_strides,
        default=(8, 32, 161, 512, 704),
    ),
    "HunyuanVideoTransformer3DModel": _Family(
        "hunyuan-video",
        parameters.hunyuan_video,
        patch=_flat_patch,
        strides=lambda vae: (vae["temporal_compression_ratio"], vae["spatial_compression_ratio"]),
        default=(4, 8, 129, 720, 1280),
        layers=lambda c: c["num_layers"] + c["num_single_layers"],
        feed_forward=lambda c: int(c["mlp_ratio"] * c["num_attention_heads"] * c["attention_head_dim"]),
        text_tokens=lambda c: 256,
    ),
}


def size_of(transformer: Config, vae: Config | None = None, name: str = "model") -> ModelSize:
    """From the configs of a diffusers transformer and its autoencoder (None: the family's usual strides).

    Raises InputError naming the model for a class that is not known, or a value that is missing or no such number.
    """
    family = FAMILIES.get(transformer.get("_class_name", ""))
    if family is None:
        known = ", ".join(FAMILIES)
        raise InputError(f"{name} is a {transformer.get('_class_name')}, of no known family; known: {known}")
    try:
        return _size_of(family, transformer, vae, name)
    except KeyError as error:
        raise InputError(f"{name} has a config without {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{name} has a config that makes no sense: {error}") from error


def _size_of(family: _Family, c: Config, vae: Config | None, name: str) -> ModelSize:
    time, space, *shape = family.default
    if vae is not None:
        time, space = family.strides(vae)
    if family.frame_size is not None:
        shape = family.frame_size(c, space)
    heads, head_dim, layers = c["num_attention_heads"], c["attention_head_dim"], family.layers(c)
    sizes = (layers, heads, head_dim, family.feed_forward(c), c["in_channels"], *shape)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"layers, heads, head size, feed-forward size, channels and frames are {sizes}")
    return ModelSize(
        name=name,
        family=family.name,
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        feed_forward=family.feed_forward(c),
        text_tokens=family.text_tokens(c),
        channels=c.get("out_channels") or c["in_channels"],
        geometry=Geometry(time, space, family.patch(c), causal=True, most_tokens=family.most_tokens(c), **family.more),
        frames=shape[0],
        height=shape[1],
        width=shape[2],
        parameters=family.count(c),
    )


def _wan(heads: int, head_dim: int, layers: int, ffn: int, channels: int = 16, **changes: Any) -> Config:
    return {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": heads, "attention_head_dim": head_dim,
        "num_layers": layers, "ffn_dim": ffn, "in_channels": channels, "out_channels": channels,
        "patch_size": (1, 2, 2), "text_dim": 4096, "freq_dim": 256, "cross_attn_norm": True, "rope_max_seq_len": 1024,
        **changes,
    }  # fmt: skip


def _cogvideox(heads: int, layers: int, rotary: bool) -> Config:
    return {
        "_class_name": "CogVideoXTransformer3DModel", "num_attention_heads": heads, "attention_head_dim": 64,
        "num_layers": layers, "in_channels": 16, "out_channels": 16, "patch_size": 2, "patch_size_t": None,
        "time_embed_dim": 512, "text_embed_dim": 4096, "max_text_seq_length": 226, "sample_frames": 49,
        "sample_height": 60, "sample_width": 90, "use_rotary_positional_embeddings": rotary,
    }  # fmt: skip


LTX = {
    "_class_name": "LTXVideoTransformer3DModel", "num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 28,
    "in_channels": 128, "out_channels": 128, "patch_size": 1, "patch_size_t": 1, "cross_attention_dim": 2048,
    "caption_channels": 4096,
}  # fmt: skip


HUNYUAN_VIDEO = {
    "_class_name": "HunyuanVideoTransformer3DModel", "num_attention_heads": 24, "attention_head_dim": 128,
    "num_layers": 20, "num_single_layers": 40, "num_refiner_layers": 2, "mlp_ratio": 4.0, "in_channels": 16,
    "out_channels": 16, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
}  # fmt: skip


CONFIGS: dict[str, Config] = {
    "wan-1.3b": _wan(12, 128, 30, 8960),
    "wan-14b": _wan(40, 128, 40, 13824),
    "cogvideox-2b": _cogvideox(30, 30, rotary=False),
    "cogvideox-5b": _cogvideox(48, 42, rotary=True),
    "ltx": LTX,
    "hunyuan-video": HUNYUAN_VIDEO,
    "demo": _wan(3, 64, 5, 512, 12, patch_size=(1, 1, 1), text_dim=96, freq_dim=64, rope_max_seq_len=64),
}
"""Of the known models' transformers."""


UMT5_XXL, T5_XXL, LLAMA_3_8B, CLIP_L = 5_680_910_336, 4_762_310_656, 7_505_186_816, 123_060_480
"""Parameters of the text encoders: encoders alone, HunyuanVideo's Llama without its output matrix."""


def _known(name: str, text_encoder: int, vae: int, **changes: Any) -> ModelSize:
    changes = {"text_encoder_parameters": text_encoder, "vae_parameters": vae, **changes}
    return replace(size_of(CONFIGS[name], name=name), **changes)


MODELS = {
    size.name: size
    for size in (
        _known("wan-1.3b", UMT5_XXL, 126_892_531),
        _known("wan-14b", UMT5_XXL, 126_892_531),
        _known("cogvideox-2b", T5_XXL, 215_583_907, dtype=torch.float16),
        _known("cogvideox-5b", T5_XXL, 215_583_907),
        _known("ltx", T5_XXL, 419_193_649),
        _known("hunyuan-video", LLAMA_3_8B + CLIP_L, 246_478_803),
        _known("demo", 226_048, 2_659_448, frames=17, height=64, width=64, dtype=torch.float32),
    )
}
