"""The Chroma family, text-to-image: FLUX.1's blocks, guided by two branches.

Facts of diffusers' `ChromaPipeline`, beside those of images.py: the text is T5's alone; all of its filling but the
first token has 0 in a mask over text and image, which diffusers adds to attention's scores as it is.
"""

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.images import ATTENTION, PackedModel

CHROMA = ArchSpec(
    family="chroma",
    transformers=("ChromaTransformer2DModel",),
    attention=ATTENTION,
    text="prefix",
    blocks=("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
)


class ChromaModel(PackedModel):
    """What the loop needs of a diffusers `ChromaPipeline`."""

    arch = CHROMA

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] and its mask [n, L] in the transformer's dtype."""
        length = self.words(self.pipe.tokenizer)
        text, _, mask, *_ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=length
        )
        return Conditioning(text=text.to(self.latents_dtype), mask=mask.to(self.latents_dtype))

    def told_beside(self, told: Conditioning, tokens: int) -> dict[str, Tensor]:
        """The mask over text and image."""
        mask = told["mask"]
        return {"attention_mask": torch.cat([mask, mask.new_ones(len(mask), tokens)], dim=1)}
