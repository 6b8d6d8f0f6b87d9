"""What planning must know of a model: the known ones by name, others from their config files or a loaded pipeline."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from kvlock_fast.cache import parameters
from kvlock_fast.errors import InputError
from kvlock_fast.masks import Geometry

Config = Mapping[str, Any]
CROSS_TOKENS = {"wan": 512, "ltx": 128}
"""Tokens that the family's pipeline pads a prompt to, where text is attended to by cross-attention."""
PEAKS = {
    "wan": ((4, 3.5, 0), (4, 0, 2)),
    "cogvideox": ((4, 0.5, 2),),
    "ltx": ((4, 2, 2),),
    "hunyuan-video": ((2, 2, 3),),
}
"""What is alive of a token at a block's peak, in the phases that can be it (self-attention, feed-forward): vectors of
the hidden size in the model's dtype, vectors of it in fp32 (rotary tables and products), vectors of the feed-forward
size. Counted by tracing diffusers' blocks; attention itself takes no S x S matrix.
"""


ANY_PEAK = ((6, 4, 3),)
"""Of a family that nobody traced: more than any that was."""
ENCODERS = ("text_encoder", "image_encoder")
COUNTED = ("WanPipeline", "CogVideoXPipeline", "LTXPipeline", "HunyuanVideoPipeline")
"""Pipelines whose models are counted from their configs here; the rest by family_sizes.py."""


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model.

    layers: video self-attention layers; text_tokens: in self-attention; cross_tokens: text of cross-attention;
    channels: of the latents; frames, height, width: the pipeline's defaults, in pixels; parameters: of one of the
    `transformers`; dtype: what the weights are made for; two_branches: whether guidance runs one without the prompt, of
    itself.
    """

    name: str
    family: str
    layers: int
    heads: int
    head_dim: int
    feed_forward: int
    text_tokens: int
    channels: int
    geometry: Geometry
    frames: int
    height: int
    width: int
    parameters: int
    transformers: int = 1
    text_encoder_parameters: int = 0
    vae_parameters: int = 0
    dtype: torch.dtype = torch.bfloat16
    two_branches: bool = True

    @property
    def dim(self) -> int:
        """The hidden size, that of all heads together."""
        return self.heads * self.head_dim

    @property
    def cross_tokens(self) -> int:
        return CROSS_TOKENS.get(self.family, 0)

    @property
    def matrix_weights(self) -> int:
        """Weights of one layer that every token is multiplied by: 4 d^2 of self-attention, 2 d^2 of cross-attention
        (query and output), 2 d ffn. Keys and values of text are few tokens and left out, as in the formulas' source.
        """
        return (6 if self.cross_tokens else 4) * self.dim**2 + 2 * self.dim * self.feed_forward

    def activation_bytes(self, dtype: torch.dtype) -> int:
        """Of a token, at the peak inside a block; see PEAKS."""
        dim, ffn = self.dim, self.feed_forward
        phases = PEAKS.get(self.family, ANY_PEAK)
        return max(int(dtype.itemsize * (own * dim + wide * ffn) + 4 * fp32 * dim) for own, fp32, wide in phases)

    def weight_bytes(self, dtype: torch.dtype, encoders: bool = True) -> int:
        """Of the transformers in `dtype`; with `encoders` also the text encoders, and the autoencoder in fp32."""
        transformers = self.transformers * self.parameters * dtype.itemsize
        return transformers + (self.text_encoder_parameters * dtype.itemsize + self.vae_parameters * 4) * encoders


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
    "ChronoEditTransformer3DModel": WAN,
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


def from_config(path: str | Path) -> ModelSize:
    """From a transformer's config.json, or from a model's folder (model_index.json, transformer/, vae/).

    In a folder the parameters of autoencoder and text encoders are counted from their safetensors headers. Raises
    InputError naming the file that is missing or makes no sense.
    """
    path = Path(path)
    if not path.is_dir():
        return size_of(_read_json(path), name=f"'{path}'")
    index = _read_json(path / "model_index.json")
    parts = {name: part for name, part in index.items() if isinstance(part, list) and part[:1] not in ([], [None])}
    transformers = [name for name in ("transformer", "transformer_2") if name in parts]
    if not transformers:
        raise InputError(f"'{path}' has no transformer in its model_index.json")
    if index.get("_class_name") in COUNTED:
        vae = _read_json(path / "vae" / "config.json") if "vae" in parts else None
        size = size_of(_read_json(path / transformers[0] / "config.json"), vae, f"'{path}'")
    else:
        from kvlock_fast.cache.family_sizes import family_size, model_of_folder

        size = replace(family_size(model_of_folder(path, index), f"'{path}'"), dtype=torch.bfloat16)
    encoders = [name for name in parts if name.startswith(ENCODERS)]
    return replace(
        size,
        transformers=len(transformers),
        text_encoder_parameters=sum(_stored_parameters(path / name) for name in encoders),
        vae_parameters=_stored_parameters(path / "vae"),
    )


def from_pipeline(pipe: Any) -> ModelSize:
    """From a loaded diffusers pipeline; parameters are counted, not computed. Raises InputError as `size_of`, and for a
    family's model whose layers are of several sizes.
    """
    models = [t for t in (getattr(pipe, n, None) for n in ("transformer", "transformer_2")) if t is not None]
    if not models:
        raise InputError(f"{type(pipe).__name__} has no transformer")
    first, vae = getattr(models[0], "_orig_mod", models[0]), getattr(pipe, "vae", None)
    name, kind = type(first).__name__, type(pipe).__name__
    if any(known.__name__ in COUNTED for known in type(pipe).__mro__):
        size = size_of({**first.config, "_class_name": name}, None if vae is None else vae.config, kind)
    else:
        from kvlock_fast.cache.family_sizes import family_size
        from kvlock_fast.models import wrap_pipeline

        size = family_size(wrap_pipeline(pipe), kind)
    encoders = [part for name, part in pipe.components.items() if name.startswith(ENCODERS) and part is not None]
    return replace(
        size,
        parameters=_count(first),
        transformers=len(models),
        text_encoder_parameters=sum(map(_count, encoders)),
        vae_parameters=0 if vae is None else _count(vae),
        dtype=first.dtype,
    )


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def _read_json(path: Path) -> Config:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' cannot be read as a model's config: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"'{path}' is no model's config: it holds a {type(data).__name__}")
    return data


def _stored_parameters(folder: Path) -> int:
    """Elements in the folder's safetensors files, from their headers; 0 where there are none."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(length)) if length <= path.stat().st_size else None
                total += sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise InputError(f"'{path}' is no safetensors file: {error}") from error
    return total


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


def find_model(name: str | Path) -> ModelSize:
    """A known model by name, or from a config file or folder. Raises InputError naming what there is."""
    if str(name) in MODELS:
        return MODELS[str(name)]
    if not Path(name).exists():
        raise InputError(f"'{name}' is no config file, no model folder and none of {', '.join(MODELS)}")
    return from_config(name)
