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
from diffusers import CogView4Pipeline
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
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
    """What the loop needs of a diffusers `CogView4Pipeline`."""

    arch = COGVIEW4
    shifts_by_size = True
    shifted = False
    latents_dtype = torch.float32
    most_text = inspect.signature(CogView4Pipeline.encode_prompt).parameters["max_sequence_length"].default

    def __init__(self, pipe: Any):
        """Raises InputError for a pipeline of another kind."""
        super().__init__(pipe)
        self._sizes: dict[tuple, Tensor] = {}

    @property
    def patch(self) -> int:
        """Latents a token, down and across."""
        return self.config.patch_size

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

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] in the transformer's dtype."""
        text, _ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=self.device)
        return Conditioning(text=text.to(self.transformers[0].dtype))

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, 1, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        transformer, rows = self.transformers[which], len(latents)
        height, width = (side * self.pipe.vae_scale_factor for side in latents.shape[3:])
        size = self._size(height, width).expand(rows, 2)
        prediction = transformer(
            hidden_states=latents[:, :, 0].to(transformer.dtype),
            encoder_hidden_states=told["text"],
            timestep=timestep.expand(rows),
            original_size=size,
            target_size=size,
            crop_coords=self._size(0, 0).expand(rows, 2),
            return_dict=False,
        )[0]
        return prediction[:, :, None]

    def _size(self, height: int, width: int) -> Tensor:
        """[1, 2] on the device. Kept: captured steps read it where it is."""
        key = height, width, self.device, self.transformers[0].dtype
        if key not in self._sizes:
            self._sizes[key] = torch.tensor([[height, width]], dtype=key[3], device=self.device)
        return self._sizes[key]
