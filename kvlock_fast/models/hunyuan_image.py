"""The HunyuanImage family, text-to-image: HunyuanImage 2.1.

Facts of diffusers' `HunyuanImagePipeline`: latents are the autoencoder's times its `scaling_factor`, drawn and kept in
the transformer's dtype, a token each; sigmas are evenly spaced from 1; the transformer is told words, and quoted ones
by their letters, each with a mask. Blocks with two streams project image and text apart, blocks with one stream
together, the text last. A "guider" guides, each branch in a forward of its own; an edit takes classifier-free guidance
in the place of the adaptive projected guidance that its checkpoints ship. Without a guider, or where the transformer is
told the scale, there is one branch.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError, warn
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.masks import Geometry
from kvlock_fast.models.base import check_guider, is_on
from kvlock_fast.models.images import ATTENTION, ImageModel

HUNYUAN_IMAGE = ArchSpec(
    family="hunyuan-image", transformers=("HunyuanImageTransformer2DModel",), attention=ATTENTION, text="suffix"
)
SHIPPED = "AdaptiveProjectedMixGuidance"
TOLD = 1000.0
"""What the scale is multiplied by where the transformer is told it."""


class HunyuanImageModel(ImageModel):
    """What the loop needs of a diffusers `HunyuanImagePipeline`."""

    arch = HUNYUAN_IMAGE
    why_not_captured = "a forward of HunyuanImage waits for values that decide what it computes"
    most_text = 1128

    def __init__(self, pipe: Any):
        """Raises InputError for a pipeline of another kind, or with a guider that an edit has nothing for."""
        super().__init__(pipe)
        if self.config.use_meanflow:
            raise InputError("a model that is told where a step ends (use_meanflow=True) is not supported")
        if type(pipe.guider).__name__ == SHIPPED:
            message = f"the pipeline's guider {SHIPPED} is left out: an edit takes classifier-free guidance"
            warn(message)
        elif pipe.guider is not None:
            check_guider(pipe.guider)

    @property
    def geometry(self) -> Geometry:
        return Geometry(1, self.pipe.vae_scale_factor, (1, *self.config.patch_size), one_frame=True)

    def facts(self, given: Given) -> dict[str, Any]:
        """The scale, where the transformer is told it."""
        return {"guidance_scale": given.guidance_scale} if self.config.guidance_embeds else {}

    def guided(self, guidance_scale: float) -> bool:
        """Where there is a guider that is on, and the transformer is not told the scale."""
        return is_on(self.pipe.guider) and guidance_scale > 1 and not self.config.guidance_embeds

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Evenly spaced sigmas."""
        return {"sigmas": np.linspace(1.0, 0.0, num_steps + 1)[:-1]}

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """Words [n, L, C] and letters [n, M, D] in the transformer's dtype, with masks; guidance [n], if it is told."""
        dtype = self.latents_dtype
        text, mask, letters, letters_mask = self.pipe.encode_prompt(
            prompts, device=self.device, batch_size=len(prompts)
        )
        told = {"text": text.to(dtype), "mask": mask, "letters": letters.to(dtype), "letters_mask": letters_mask}
        if self.config.guidance_embeds:
            told["guidance"] = torch.full((len(prompts),), given.guidance_scale, dtype=dtype, device=self.device) * TOLD
        return Conditioning(**told)

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, 1, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        dtype = self.latents_dtype
        prediction = self.transformers[which](
            hidden_states=latents[:, :, 0].to(dtype),
            timestep=timestep.expand(len(latents)).to(dtype),
            guidance=told.get("guidance"),
            encoder_hidden_states=told["text"],
            encoder_attention_mask=told["mask"],
            encoder_hidden_states_2=told["letters"],
            encoder_attention_mask_2=told["letters_mask"],
            return_dict=False,
        )[0]
        return prediction[:, :, None]
