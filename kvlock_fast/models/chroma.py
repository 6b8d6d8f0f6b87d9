"""The Chroma family, text-to-image: FLUX.1's blocks, guided by two branches.

Facts of diffusers' `ChromaPipeline`, beside those of images.py: the text is T5's alone; all of its filling but the
first token has 0 in a mask over text and image, which diffusers adds to attention's scores as it is.
"""

from typing import Any

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.images import ATTENTION, PackedModel, padded_length

CHROMA = ArchSpec(
    family="chroma",
    transformers=("ChromaTransformer2DModel",),
    attention=ATTENTION,
    text="prefix",
    blocks=("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
)


class ChromaModel(PackedModel):
    """A diffusers `ChromaPipeline`."""

    arch = CHROMA

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] and its mask [n, L] in the transformer's dtype."""
        length = padded_length(self.most_words, self.pipe.tokenizer)
        text, _, mask, *_ = self.words(prompts, max_sequence_length=length)
        return Conditioning(text=text.to(self.dtype), mask=mask.to(self.dtype))

    def beside(self, told: Conditioning, latents: Tensor) -> dict[str, Any]:
        """The mask is over text and image."""
        named, mask = super().beside(told, latents), told["mask"]
        ones = mask.new_ones(len(mask), len(named["img_ids"]))
        return {**named, "attention_mask": torch.cat([mask, ones], dim=1)}
