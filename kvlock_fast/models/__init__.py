"""Model families: facts as data, and what the loop needs of each. The only room that imports diffusers' models."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvlock_fast.models.protocols import Pipeline
from kvlock_fast.models.registry import FAMILIES as FAMILIES
from kvlock_fast.models.registry import family_of_pipeline

if TYPE_CHECKING:
    from kvlock_fast.models.base import PipelineModel


def load_diffusers(path: str | Path, torch_dtype: torch.dtype | dict | None) -> Pipeline:
    """A diffusers pipeline from a folder or hub id; see models/loading.py."""
    from kvlock_fast.models.loading import load_diffusers as load

    return load(path, torch_dtype)


def wrap_pipeline(pipe: Pipeline) -> "PipelineModel":
    """The family's model around a loaded diffusers pipeline. Raises InputError for a family that is not known."""
    return family_of_pipeline(pipe).load()(pipe)
