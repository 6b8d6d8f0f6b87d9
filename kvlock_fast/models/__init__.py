"""Model families: facts as data, and what the loop needs of each. The only room that imports diffusers' models."""

from typing import Any

from kvlock_fast.errors import InputError

FAMILIES = ("wan", "cogvideox")


def load_diffusers(path: Any, torch_dtype: Any) -> Any:
    """A diffusers pipeline from a folder or hub id; see models/loading.py."""
    from kvlock_fast.models.loading import load_diffusers as load

    return load(path, torch_dtype)


def family_models() -> tuple[type, ...]:
    """The families' models, in the order of FAMILIES."""
    from kvlock_fast.models.cogvideox import CogVideoXModel
    from kvlock_fast.models.wan import WanModel

    return WanModel, CogVideoXModel


def wrap_pipeline(pipe: Any) -> Any:
    """The family's model around a loaded diffusers pipeline. Raises InputError for a family that is not known."""
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        transformer = getattr(pipe, "transformer_2", None)
    name = type(getattr(transformer, "_orig_mod", transformer)).__name__
    for model in family_models():
        if name in model.arch.transformers:
            return model(pipe)
    known = ", ".join(FAMILIES)
    raise InputError(f"unknown model family: {type(pipe).__name__} with transformer {name}; known: {known}")
