"""Model families: facts as data, and what the loop needs of each. The only room that imports diffusers' models."""

from typing import TYPE_CHECKING

from kvlock_fast.models.loading import load_diffusers as load_diffusers
from kvlock_fast.models.protocols import Pipeline
from kvlock_fast.models.registry import FAMILIES as FAMILIES
from kvlock_fast.models.registry import family_of_pipeline

if TYPE_CHECKING:
    from kvlock_fast.models.base import PipelineModel


def wrap_pipeline(pipe: Pipeline) -> "PipelineModel":
    """The family's model around a loaded diffusers pipeline. Raises InputError for a family that is not known."""
    return family_of_pipeline(pipe).load()(pipe)
