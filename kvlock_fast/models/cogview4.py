"""The CogView4 family, text-to-image.

Facts of diffusers' `CogView4Pipeline`: latents are the autoencoder's times its `scaling_factor`, drawn and kept in
fp32; the timesteps are evenly spaced whole numbers, shifted by the number of tokens; the transformer is told the
image's size; each branch of guidance is a forward of its own. Text and image share the self-attention, the text first.
Texts are filled up in front to a multiple of 16 tokens, without a mask: those of different lengths go through the model
one after the other.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.cogview4.pipeline_cogview4 import CogView4Pipeline, calculate_shift
from torch import Tensor

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.images import ImageModel

COGVIEW4 = ArchSpec(
    family="cogview4",
    transformers=("CogView4Transformer2DModel",),
    attention=r"transformer_blocks\.\d+\.attn1",
    token_dim=2,
    text="prefix",
    blocks=("CogView4TransformerBlock",),
)


class CogView4Model(ImageModel):
    """A diffusers `CogView4Pipeline`."""

    arch = COGVIEW4
    shifts_by_size = True
    shifted = False
    in_model_dtype = False
    most_text = inspect.signature(CogView4Pipeline.encode_prompt).parameters["max_sequence_length"].default

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Evenly spaced timesteps as whole numbers, their sigmas, and the shift for so many tokens."""
        config = self.pipe.scheduler.config
        count = config.num_train_timesteps
        timesteps = np.linspace(count, 1.0, num_steps).astype(np.int64).astype(np.float32)
        mu = calculate_shift(
            self.tokens(height, width),
            config.get("base_image_seq_len", 256),
            config.get("base_shift", 0.25),
            config.get("max_shift", 0.75),
        )
        return {"timesteps": timesteps, "sigmas": timesteps / count, "mu": mu}

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        return self.words(prompts)[0].to(self.dtype)

    def beside(self, told: Conditioning, latents: Tensor) -> dict[str, Any]:
        """The image's size in pixels goes along."""
        rows, (height, width) = len(latents), (side * self.pipe.vae_scale_factor for side in latents.shape[3:])
        size, corner = (self._pair(*pair).expand(rows, 2) for pair in ((height, width), (0, 0)))
        return {**super().beside(told, latents), "original_size": size, "target_size": size, "crop_coords": corner}

    def _pair(self, *numbers: int) -> Tensor:
        key = *numbers, self.device, self.dtype
        return self.kept(key, lambda: torch.tensor([numbers], dtype=self.dtype, device=self.device))
