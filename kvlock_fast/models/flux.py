"""The FLUX.1 family: text-to-image, guided by a scale that the transformer is told (dev), or not at all (schnell).

Facts of diffusers' `FluxPipeline`, beside those of images.py: the text is T5's, without a mask and without positions,
and a vector of CLIP's; guidance by a negative prompt is run where one is given.
"""

import torch

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.base import TEXT
from kvlock_fast.models.images import ATTENTION, PackedModel, padded_length

FLUX = ArchSpec(family="flux", transformers=("FluxTransformer2DModel",), attention=ATTENTION, text="prefix")


class FluxModel(PackedModel):
    """A diffusers `FluxPipeline`."""

    arch = FLUX
    guided_if_asked = True
    told_names = TEXT | {"pooled_projections": "pooled", "guidance": "guidance"}

    @property
    def told_scale(self) -> bool:
        return self.config.guidance_embeds

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] of T5, pooled [n, C] of CLIP, in the transformer's dtype; guidance [n] fp32, if it is told."""
        length = padded_length(self.most_words, self.pipe.tokenizer_2)
        text, pooled, _ = self.pipe.encode_prompt(prompts, device=self.device, max_sequence_length=length)
        told = {"text": text.to(self.dtype), "pooled": pooled.to(self.dtype)}
        if self.told_scale:
            told["guidance"] = torch.full((len(prompts),), given.guidance_scale, device=self.device)
        return Conditioning(**told)
