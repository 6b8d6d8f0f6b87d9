"""What the models of all families have of their diffusers pipelines; one transformer serves all steps by default."""

from typing import Any

import torch
from torch import nn


class PipelineModel:
    """What the loop needs of a diffusers pipeline, as far as families agree."""

    pipe: Any
    transformers: list[nn.Module]
    two_stages = False

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    @property
    def modules(self) -> list[nn.Module]:
        """All whose weights a source's keys and values come from."""
        named = (getattr(self.pipe, name, None) for name in ("vae", "text_encoder"))
        return [*self.transformers, *(part for part in named if isinstance(part, nn.Module))]

    def facts(self) -> dict[str, Any]:
        """What decides, beside the weights, which forward serves a step."""
        return {}

    def stage_at(self, timestep: float, num_train_timesteps: int) -> int:
        """0, or 1 where low noise has a stage of its own."""
        return 0

    def transformer_of(self, stage: int) -> int:
        """Which of the transformers serves a stage."""
        return 0
