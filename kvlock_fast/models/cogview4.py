"""The CogView4 family, text-to-image.

Facts of diffusers' `CogView4Pipeline`: text and image share the self-attention, the text first, of as many tokens as it
needs by sixteens, without a mask; the transformer is told the picture's size, and that nothing was cut off it; each
branch of guidance is a forward of its own; timesteps are evenly spaced whole numbers, the sigmas shifted by the number
of tokens.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.models.arch import ArchSpec
from kvlock_fast.models.image import ImageModel

COGVIEW4 = ArchSpec(
    family="cogview4",
    transformers=("CogView4Transformer2DModel",),
    attention=r"transformer_blocks\.\d+\.attn1",
    token_dim=2,
    text="prefix",
    blocks=("CogView4TransformerBlock",),
)
SHIFT = {"base_image_seq_len": 256, "base_shift": 0.25, "max_shift": 0.75}
"""What CogView4Pipeline takes where the scheduler's config has none."""


class CogView4Model(ImageModel):
    """What the loop needs of a diffusers `CogView4Pipeline`."""

    arch = COGVIEW4
    shifts_by_size = True
    latents_dtype = torch.float32

    def __init__(self, pipe: Any):
        """Raises InputError for a pipeline of another kind."""
        super().__init__(pipe)
        self._rotary: dict[tuple, tuple[Tensor, Tensor]] = {}

    @property
    def patch(self) -> int:
        """Latents a token, down and across."""
        return self.config.patch_size

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Timesteps, the same as sigmas, and the shift for so many tokens."""
        config = self.pipe.scheduler.config
        timesteps = np.linspace(config.num_train_timesteps, 1.0, num_steps).astype(np.int64).astype(np.float32)
        shift = (config.get(name, value) for name, value in SHIFT.items())
        mu = calculate_shift(self.tokens(height, width), *shift)
        return {"timesteps": timesteps, "sigmas": timesteps / config.num_train_timesteps, "mu": mu}

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C], size [n, 2] in pixels and cut [n, 2], in the transformer's dtype."""
        text, _ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=self.device)
        text = text.to(self.transformers[0].dtype)
        size = text.new_tensor(given.frames.shape[1:3]).expand(len(text), 2)
        return Conditioning(text=text, size=size, cut=torch.zeros_like(size))

    def _latent_statistics(self) -> tuple[float, float]:
        return 0.0, self.pipe.vae.config.scaling_factor

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, 1, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        transformer = self.transformers[which]
        image = latents[:, :, 0].to(transformer.dtype)
        prediction = transformer(
            hidden_states=image,
            encoder_hidden_states=told["text"],
            timestep=timestep.expand(len(latents)),
            original_size=told["size"],
            target_size=told["size"],
            crop_coords=told["cut"],
            image_rotary_emb=self.rotary(image),
            return_dict=False,
        )[0]
        return prediction[:, :, None]

    def rotary(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [S, D] of the tokens' positions; kept for good: captured steps read them where they are."""
        key = *image.shape[2:], image.device
        if key not in self._rotary:
            self._rotary[key] = tuple(x.to(image.device) for x in self.transformers[0].rope(image))
        return self._rotary[key]
