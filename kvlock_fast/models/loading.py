"""Loading a diffusers pipeline: whatever is wrong with its files ends in one sentence."""

import json
from pathlib import Path
from typing import cast

import torch

from kvlock_fast.errors import InputError, warn
from kvlock_fast.files import refuse_special
from kvlock_fast.models.protocols import Pipeline
from kvlock_fast.models.registry import PIPELINES, REFUSED
from kvlock_fast.models.schedulers import WITHOUT_NOISE


def load_diffusers(path: str | Path, torch_dtype: torch.dtype | dict | None) -> Pipeline:
    """A diffusers pipeline from a folder or hub id, safetensors only.

    Raises InputError saying what is wrong with it; for a local folder of another family, before any weight is read.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    if torch_dtype is not None and not isinstance(torch_dtype, dict):
        torch_dtype = {"default": torch_dtype, "vae": torch.float32}
    _check_index(Path(path))
    try:
        loaded = DiffusionPipeline.from_pretrained(str(path), dtype=torch_dtype, use_safetensors=True)
    except Exception as error:  # diffusers lets whatever a bad file causes through, from TypeError to SafetensorError
        raise InputError(f"model {str(path)!r} cannot be loaded: {_one_line(error)}") from error
    pipe = cast(Pipeline, loaded)  # its parts are attributes that from_pretrained adds
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and any(p.is_meta for p in part.parameters()):
            raise InputError(f"model {str(path)!r} cannot be loaded: weights of its {name} are missing")
    _without_noise(pipe)
    return pipe


def _without_noise(pipe: Pipeline) -> None:
    """Put DDIM in the place of a scheduler that adds noise at every step, as some models ship one."""
    name = type(pipe.scheduler).__name__
    if name not in WITHOUT_NOISE:
        return
    import diffusers

    other, changes = WITHOUT_NOISE[name]
    warn(f"scheduler {name} adds noise at every step: taking {other} of its config")
    pipe.scheduler = getattr(diffusers, other).from_config(pipe.scheduler.config, **changes)


def _check_index(folder: Path) -> None:
    """Raise InputError for a local folder that is no pipeline, or one of no known family."""
    if not folder.is_dir():
        return
    refuse_special(folder / "model_index.json")
    try:
        index = json.loads((folder / "model_index.json").read_text())
        name = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"model {str(folder)!r} has no valid model_index.json: {_one_line(error)}") from error
    if name in REFUSED:
        raise InputError(f"model {str(folder)!r} is a {name}, which is not supported: {REFUSED[name]}")
    if name not in PIPELINES:
        raise InputError(f"model {str(folder)!r} is a {name}, of no known family; known: {', '.join(PIPELINES)}")


def _one_line(error: BaseException) -> str:
    """The error as one sentence."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
