"""What planning must know of a model of any family: read from its modules, loaded or as configs alone describe them.

The known models' sizes are exact (known_models.py); what is read here is on the safe side: the feed-forward's width is
that of the widest input of a block's layers, and text is as long as pipelines let it be, and among the tokens.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from kvlock_fast.errors import InputError
from kvlock_fast.locking.lock import kv_sizes
from kvlock_fast.models import wrap_pipeline
from kvlock_fast.models.registry import PIPELINES
from kvlock_fast.planning.model_size import ModelSize

GUIDED = 2.0
"""A guidance scale that is one."""
IMAGE_SIZE, FRAMES = 1024, 81
"""Pixels of a side, and frames of a video, where neither the pipeline's call nor its configs tell."""


def family_size(model: Any, name: str) -> ModelSize:
    """Of a family's model (`PipelineModel`). Raises InputError where layers or transformers are of several sizes."""
    sizes = {kv_sizes(transformer, model.arch) for transformer in model.transformers}
    if len(sizes) > 1:
        raise InputError(f"the model's transformers have self-attentions of different sizes: {sorted(sizes)}")
    heads, head_dim = sizes.pop()
    first = model.transformers[0]
    attentions = model.arch.attentions(first)
    frames, height, width = _usual_extent(model)
    return ModelSize(
        name=name,
        family=model.arch.family,
        layers=len(attentions),
        heads=heads,
        head_dim=head_dim,
        feed_forward=_widest_input(first, [name for name, _ in attentions]),
        text_tokens=model.most_text,
        channels=model.latent_channels,
        geometry=model.geometry,
        frames=frames,
        height=height,
        width=width,
        parameters=sum(p.numel() for p in first.parameters()),
        transformers=len(model.transformers),
        dtype=first.dtype,
        two_branches=model.guided(GUIDED) and not model.guided_if_asked,
    )


def model_of_folder(folder: Path, index: dict[str, Any]) -> Any:
    """The family's model of a folder's configs, its weights on the meta device; index: its model_index.json.

    Raises InputError naming the folder where there is no known family, or its configs make no model.
    """
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise InputError(f"'{folder}' is a {kind}, of no known family; known: {', '.join(PIPELINES)}")
    try:
        with _no_notes():
            return _model(folder, kind, index)
    except InputError:
        raise
    except Exception as error:  # whatever a config that makes no sense causes in diffusers
        words = " ".join(str(error).split())[:300]
        raise InputError(f"'{folder}' has a config that makes no sense: {type(error).__name__}: {words}") from error


@contextmanager
def _no_notes() -> Iterator[None]:
    """Without what transformers has to say of libraries that only its pictures' encoders would need."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _model(folder: Path, kind: str, index: dict[str, Any]) -> Any:
    pipeline = getattr(diffusers, kind)
    wanted = [name for name in inspect.signature(pipeline.__init__).parameters if name != "self"]
    return wrap_pipeline(pipeline(**{name: _part(folder, name, index.get(name)) for name in wanted}))


def _part(folder: Path, name: str, entry: Any) -> Any:
    """A component of a pipeline, or a value of its config: networks without weights, no tokenizers.

    Of what is for images only that it is there counts; a judge of outputs is left out, as an edit asks none.
    """
    if name == "safety_checker":
        return nn.Identity()
    if not isinstance(entry, list):
        return entry
    library, kind = entry
    if library == "diffusers":
        made = getattr(diffusers, kind)
        config = made.load_config(str(folder / name), local_files_only=True)
        with torch.device("meta") if issubclass(made, nn.Module) else nullcontext():
            return made.from_config(config)
    return nn.Identity() if kind is not None and name.startswith("image_") else None


def _widest_input(transformer: nn.Module, attentions: list[str]) -> int:
    """Of all linear layers beside the attentions in their blocks: what a feed-forward is at its widest."""
    blocks = {name.rpartition(".")[0] for name in attentions}
    widths = [
        module.in_features
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(f"{block}.") for block in blocks)
    ]
    return max(widths, default=1)


def _usual_extent(model: Any) -> tuple[int, int, int]:
    """Frames, height and width of a call that gives none."""
    call, config, geometry = inspect.signature(type(model.pipe).__call__).parameters, model.config, model.geometry
    side = getattr(model.pipe, "default_sample_size", None)
    side = side * model.pipe.vae_scale_factor if isinstance(side, int) else IMAGE_SIZE

    def usual(own: int | None, name: str, sample: str, stride: int, other: int) -> int:
        """What the family says itself, or else the call, or the transformer's sample in latents."""
        value, latents = call[name].default if name in call else None, config.get(sample)
        if isinstance(value, int) and not isinstance(value, bool):
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
