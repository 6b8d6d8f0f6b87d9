"""Sizes of a model of any family, read from its modules: loaded ones, or ones on the meta device made of its configs.

Sizes of the families in PEAKS are exact. For other families they are on the safe side: the feed-forward's width is that
of the widest input of a block's layers, and text is as long as pipelines let it be, and among the tokens.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypedDict

import diffusers
import torch
from torch import nn

from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.locking.lock import kv_sizes
from kvlock_fast.masks import Geometry
from kvlock_fast.models import wrap_pipeline
from kvlock_fast.models.base import PipelineModel
from kvlock_fast.models.protocols import Config, Transformer
from kvlock_fast.models.registry import PIPELINES, arch_of
from kvlock_fast.parameters import is_whole
from kvlock_fast.planning.model_size import PEAKS, ModelSize

GUIDED = 2.0
"""A guidance scale that is one."""
IMAGE_SIZE, FRAMES = 1024, 81
"""Pixels of a side, and frames of a video, where neither the pipeline's call nor its configs tell."""
HUNYUAN_TEXT = 256
"""Tokens that HunyuanVideoPipeline pads a prompt to."""


def family_size(model: PipelineModel, name: str) -> ModelSize:
    """Read the size of a model. Raises InputError where layers or transformers are of several sizes."""
    transformers = [getattr(transformer, "_orig_mod", transformer) for transformer in model.transformers]
    sizes = {kv_sizes(transformer, model.arch) for transformer in transformers}
    if len(sizes) > 1:
        raise InputError(f"the model's transformers have self-attentions of different sizes: {sorted(sizes)}")
    first, family, traced = transformers[0], model.arch.family, model.arch.family in PEAKS
    frames, height, width = _usual_extent(model)
    return ModelSize(
        name=name,
        family=family,
        **_layer_sizes(first, model.arch, traced),
        text_tokens=_text_tokens(family, model.config) if traced else model.most_text,
        channels=model.latent_channels,
        geometry=model.geometry,
        frames=frames,
        height=height,
        width=width,
        transformers=len(model.transformers),
        dtype=first.dtype,
        # Exact families are planned for two branches, even where the scale may be an input.
        two_branches=traced or (model.guided(GUIDED) and not model.guided_if_asked),
    )


class _LayerSizes(TypedDict):
    layers: int
    heads: int
    head_dim: int
    feed_forward: int
    parameters: int


def _layer_sizes(transformer: Transformer, arch: ArchSpec, exact: bool) -> _LayerSizes:
    """The part of a `ModelSize` that the transformer alone tells; exact: the first block stands for all of them."""
    heads, head_dim = kv_sizes(transformer, arch)
    names = [name for name, _ in arch.attentions(transformer)]
    return {
        "layers": len(names),
        "heads": heads,
        "head_dim": head_dim,
        "feed_forward": _widest_input(transformer, names[:1] if exact else names),
        "parameters": sum(p.numel() for p in transformer.parameters()),
    }


def _text_tokens(family: str, config: Config) -> int:
    """Tokens of text in the self-attentions of a family in PEAKS."""
    return {"cogvideox": config.get("max_text_seq_length", 0), "hunyuan-video": HUNYUAN_TEXT}.get(family, 0)


_WAN = "wan", (4, 8), (81, 480, 832)
FILES = {
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "CogVideoXTransformer3DModel": ("cogvideox", (4, 8), (49, 480, 720)),
    "LTXVideoTransformer3DModel": ("ltx", (8, 32), (161, 512, 704)),
    "HunyuanVideoTransformer3DModel": ("hunyuan-video", (4, 8), (129, 720, 1280)),
}
"""Transformers whose config alone is enough, with what it does not tell: the family, its autoencoder's strides in time
and space, and the pipeline's usual frames, height and width.
"""
NEEDED = ("num_attention_heads", "attention_head_dim", "num_layers", "in_channels")


def transformer_size(config: Mapping[str, Any], name: str = "model") -> ModelSize:
    """Read the size of a diffusers transformer from its config, with the usual autoencoder of its family.

    Raises InputError naming the model for a class that is not known, or a value that is missing or makes no sense.
    """
    kind = config.get("_class_name", "")
    if kind not in FILES:
        raise InputError(f"{name} is a {config.get('_class_name')}, of no known family; known: {', '.join(FILES)}")
    for key in NEEDED:
        if key not in config:
            raise InputError(f"{name} has a config without {key!r}")
        if not is_whole(config[key], 1):
            raise InputError(f"{name} has a config that makes no sense: {key} is {config[key]!r}")
    try:
        return _size_of_file(on_meta(kind, config), name)
    except InputError:
        raise
    except Exception as error:  # whatever a config that makes no sense causes in diffusers
        raise InputError(f"{name} has a config that makes no sense: {_in_a_line(error)}") from error


def _size_of_file(transformer: Transformer, name: str) -> ModelSize:
    config, kind = transformer.config, type(transformer).__name__
    family, (time, space), (frames, height, width) = FILES[kind]
    patch, limits = config["patch_size"], config.get("rope_max_seq_len")
    more: dict[str, Any] = {"least_frames": 5} if kind == "ChronoEditTransformer3DModel" else {}
    if family == "cogvideox":
        more = {"lead_in": True, "latents_together": 2}
        frames, height, width = config["sample_frames"], config["sample_height"] * space, config["sample_width"] * space
        if config["patch_size_t"] is not None and config["use_rotary_positional_embeddings"]:
            limits = None, config["sample_height"] // patch, config["sample_width"] // patch
    sizes = tuple(patch) if family == "wan" else (config["patch_size_t"] or 1, patch, patch)
    return ModelSize(
        name=name,
        family=family,
        **_layer_sizes(transformer, arch_of(transformer), True),
        text_tokens=_text_tokens(family, config),
        channels=config.get("out_channels") or config["in_channels"],
        geometry=Geometry(time, space, sizes, most_tokens=limits, **more),
        frames=frames,
        height=height,
        width=width,
    )


def on_meta(kind: str, config: Mapping[str, Any]) -> Any:
    """Build what a config of diffusers describes, a network on the meta device."""
    made: Any = getattr(diffusers, kind)
    with torch.device("meta") if issubclass(getattr(diffusers, kind), nn.Module) else nullcontext():
        return made.from_config(config)


def model_of_folder(folder: Path, index: Mapping[str, Any]) -> PipelineModel:
    """Build a folder's model of its configs, with weights on the meta device; index: its model_index.json.

    Raises InputError naming the folder where there is no known family, or its configs make no model.
    """
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise InputError(f"'{folder}' is a {kind}, of no known family; known: {', '.join(PIPELINES)}")
    try:
        with _no_notes():
            pipeline = getattr(diffusers, kind)
            wanted = [name for name in inspect.signature(pipeline.__init__).parameters if name != "self"]
            return wrap_pipeline(pipeline(**{name: _part(folder, name, index.get(name)) for name in wanted}))
    except InputError:
        raise
    except Exception as error:  # whatever a config that makes no sense causes in diffusers
        raise InputError(f"'{folder}' has a config that makes no sense: {_in_a_line(error)}") from error


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _no_notes() -> Iterator[None]:
    """Silence transformers' notes about libraries that only its image encoders would need."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _part(folder: Path, name: str, entry: Any) -> Any:
    """A component of a pipeline, or a value of its config: networks without weights, no tokenizers.

    Parts for images are stand-ins, since only their presence counts; a judge of outputs is left out, and so is a
    scheduler without a config, as where only configs that tell sizes were fetched.
    """
    if name == "safety_checker":
        return nn.Identity()
    if not isinstance(entry, list):
        return entry
    library, kind = entry
    if name == "scheduler" and not (folder / name).exists():
        return None
    if library == "diffusers":
        return on_meta(kind, getattr(diffusers, kind).load_config(str(folder / name), local_files_only=True))
    return nn.Identity() if kind is not None and name.startswith("image_") else None


def _widest_input(transformer: nn.Module, attentions: list[str]) -> int:
    """The widest input of all linear layers in the attentions' blocks: what a feed-forward is at its widest."""
    blocks = {name.rpartition(".")[0] for name in attentions}
    widths = [
        module.in_features
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(f"{block}.") for block in blocks)
    ]
    return max(widths, default=1)


def _usual_extent(model: PipelineModel) -> tuple[int, int, int]:
    """Frames, height and width of a call that gives none."""
    call, config, geometry = inspect.signature(type(model.pipe).__call__).parameters, model.config, model.geometry
    side = getattr(model.pipe, "default_sample_size", None)
    side = side * model.pipe.vae_scale_factor if isinstance(side, int) else IMAGE_SIZE

    def usual(own: int | None, name: str, sample: str, stride: int, other: int) -> int:
        """The call's default, or else what the family says, or the transformer's sample in latents."""
        value, latents = call[name].default if name in call else None, config.get(sample)
        if is_whole(value):
            return value
        if own is not None:
            return own
        return latents * stride if isinstance(latents, int) else other

    (frames, *sides), space = model.usual_extent, geometry.spatial_stride
    height, width = (
        usual(own, name, f"sample_{name}", space, side) for own, name in zip(sides, ("height", "width"), strict=True)
    )
    if geometry.one_frame:
        return 1, height, width
    frames = usual(frames, "num_frames", "sample_frames", geometry.temporal_stride, FRAMES)
    return geometry.whole_frames(frames), height, width
