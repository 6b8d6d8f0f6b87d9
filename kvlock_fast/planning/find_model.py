"""The size of a model: a known one by name, any other from its config files or a loaded pipeline."""

import json
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvlock_fast.errors import InputError
from kvlock_fast.files import refuse_special
from kvlock_fast.models import wrap_pipeline
from kvlock_fast.models.base import PipelineModel
from kvlock_fast.planning.known_models import MODELS
from kvlock_fast.planning.model_size import ModelSize

ENCODERS = ("text_encoder", "image_encoder")


def find_model(name: str | Path) -> ModelSize:
    """A known model by name, or from a config file or folder. Raises InputError naming what there is."""
    if str(name) in MODELS:
        return MODELS[str(name)]
    if not Path(name).exists():
        raise InputError(f"'{name}' is no config file, no model folder and none of {', '.join(MODELS)}")
    return from_config(name)


def from_config(path: str | Path) -> ModelSize:
    """Size of a model by a transformer's config.json, or by the configs of a model's folder.

    In a folder the parameters of autoencoder and text encoders are counted from their safetensors headers. Raises
    InputError naming the file that is missing or makes no sense.
    """
    from kvlock_fast.planning.any_family import family_size, model_of_folder, transformer_size

    path = Path(path)
    if not path.is_dir():
        return transformer_size(_read_json(path), f"'{path}'")
    index = _read_json(path / "model_index.json")
    parts = {name: part for name, part in index.items() if isinstance(part, list) and part[:1] not in ([], [None])}
    transformers = [name for name in ("transformer", "transformer_2") if name in parts]
    if not transformers:
        raise InputError(f"'{path}' has no transformer in its model_index.json")
    encoders = [name for name in parts if name.startswith(ENCODERS)]
    return replace(
        family_size(model_of_folder(path, index), f"'{path}'"),
        dtype=torch.bfloat16,
        transformers=len(transformers),
        text_encoder_parameters=sum(_stored_parameters(path / name) for name in encoders),
        vae_parameters=_stored_parameters(path / "vae"),
    )


def from_pipeline(pipe: Any) -> ModelSize:
    """Size of a loaded diffusers pipeline. Raises InputError for an unknown family, and for layers of several sizes."""
    if getattr(pipe, "transformer", None) is None and getattr(pipe, "transformer_2", None) is None:
        raise InputError(f"{type(pipe).__name__} has no transformer")
    return from_model(wrap_pipeline(pipe))


def from_model(model: PipelineModel) -> ModelSize:
    """Size of a loaded family's model. Raises InputError for layers of several sizes."""
    from kvlock_fast.planning.any_family import family_size

    parts = model.pipe.components.items()
    return replace(
        family_size(model, type(model.pipe).__name__),
        text_encoder_parameters=_count(part for name, part in parts if name.startswith(ENCODERS)),
        vae_parameters=_count(part for name, part in parts if name == "vae"),
    )


def _count(modules: Iterable[nn.Module | None]) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


def _read_json(path: Path) -> dict[str, Any]:
    refuse_special(path)
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
        refuse_special(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                if length > path.stat().st_size:
                    raise ValueError("its header is longer than the file")
                header = json.loads(file.read(length))
                total += sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise InputError(f"'{path}' is no safetensors file: {error}") from error
    return total
