"""The FLUX.1 family: text-to-image, guided by a scale that the transformer is told (dev), or not at all (schnell).

Facts of diffusers' `FluxPipeline`, beside those of images.py: the text is T5's, without a mask and without positions,
and a vector of CLIP's; guidance by a negative prompt is run where one is given.
"""

from typing import Any

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.images import ATTENTION, PackedModel

FLUX = ArchSpec(family="flux", transformers=("FluxTransformer2DModel",), attention=ATTENTION, text="prefix")


class FluxModel(PackedModel):
    """What the loop needs of a diffusers `FluxPipeline`."""

    arch = FLUX
    guided_if_asked = True

    def facts(self, given: Given) -> dict[str, Any]:
        """The scale, where the transformer is told it."""
        return {"guidance_scale": given.guidance_scale} if self.config.guidance_embeds else {}

    def guided(self, guidance_scale: float) -> bool:
        """Not where the transformer is told the scale."""
        return not self.config.guidance_embeds and guidance_scale > 1

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] of T5, pooled [n, C] of CLIP, in the transformer's dtype; guidance [n] fp32, if it is told."""
        length = self.words(self.pipe.tokenizer_2)
        text, pooled, _ = self.pipe.encode_prompt(prompts, device=self.device, max_sequence_length=length)
        told = {"text": text.to(self.latents_dtype), "pooled": pooled.to(self.latents_dtype)}
        if self.config.guidance_embeds:
            told["guidance"] = torch.full((len(prompts),), given.guidance_scale, device=self.device)
        return Conditioning(**told)

    def told_beside(self, told: Conditioning, tokens: int) -> dict[str, Tensor]:
        """CLIP's vector, and the scale."""
        return {"pooled_projections": told["pooled"], "guidance": told.get("guidance")}
