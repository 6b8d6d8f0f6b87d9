"""The size of a model: a known one by name, any other from its config files or a loaded pipeline."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from kvlock_fast.errors import InputError
from kvlock_fast.files import refuse_special
from kvlock_fast.planning.any_family import family_size, model_of_folder
from kvlock_fast.planning.known_models import MODELS, Config, size_of
from kvlock_fast.planning.model_size import ModelSize

ENCODERS = ("text_encoder", "image_encoder")


COUNTED = ("WanPipeline", "CogVideoXPipeline", "LTXPipeline", "HunyuanVideoPipeline")
"""Pipelines whose models are counted from their configs here; the rest by any_family.py."""


def find_model(name: str | Path) -> ModelSize:
    """A known model by name, or from a config file or folder. Raises InputError naming what there is."""
    if str(name) in MODELS:
        return MODELS[str(name)]
    if not Path(name).exists():
        raise InputError(f"'{name}' is no config file, no model folder and none of {', '.join(MODELS)}")
    return from_config(name)


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
                header = json.loads(file.read(length)) if length <= path.stat().st_size else None
                total += sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise InputError(f"'{path}' is no safetensors file: {error}") from error
    return total
