"""Model families: facts as data, and what the loop needs of each. The only room that imports diffusers' models."""

from typing import Any

from kvlock_fast.errors import InputError

FAMILIES = ("wan",)


def load_diffusers(path: Any, torch_dtype: Any) -> Any:
    """A diffusers pipeline from a folder or hub id; see models/loading.py."""
    from kvlock_fast.models.loading import load_diffusers as load

    return load(path, torch_dtype)


def wrap_pipeline(pipe: Any) -> Any:
    """The family's model around a loaded diffusers pipeline. Raises InputError for a family that is not known."""
    from kvlock_fast.models.wan import WAN, WanModel

    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        transformer = getattr(pipe, "transformer_2", None)
    name = type(getattr(transformer, "_orig_mod", transformer)).__name__
    if name in WAN.transformers:
        return WanModel(pipe)
    known = ", ".join(FAMILIES)
    raise InputError(f"unknown model family: {type(pipe).__name__} with transformer {name}; known: {known}")
