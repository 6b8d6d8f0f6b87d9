"""Model families: facts as data, and what the loop needs of each. The only room that imports diffusers' models."""

from typing import Any

from kvlock_fast.models.registry import FAMILIES as FAMILIES
from kvlock_fast.models.registry import family_of_pipeline


def load_diffusers(path: Any, torch_dtype: Any) -> Any:
    """A diffusers pipeline from a folder or hub id; see models/loading.py."""
    from kvlock_fast.models.loading import load_diffusers as load

    return load(path, torch_dtype)


def wrap_pipeline(pipe: Any) -> Any:
    """The family's model around a loaded diffusers pipeline. Raises InputError for a family that is not known."""
    return family_of_pipeline(pipe).load()(pipe)
