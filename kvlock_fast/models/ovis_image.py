"""The Ovis-Image family, text-to-image: blocks like FLUX.1's, guided by two branches.

Facts of diffusers' `OvisImagePipeline`, beside those of images.py: the text is a Qwen3's, its filling set to zero and
not masked; its tokens have positions on the diagonal.
"""

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.images import ATTENTION, PackedModel

OVIS_IMAGE = ArchSpec(
    family="ovis-image", transformers=("OvisImageTransformer2DModel",), attention=ATTENTION, text="prefix"
)


class OvisImageModel(PackedModel):
    """What the loop needs of a diffusers `OvisImagePipeline`."""

    arch = OVIS_IMAGE
    most_words = 256

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] in the transformer's dtype."""
        text, *_ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.words(self.pipe.tokenizer),
        )
        return Conditioning(text=text.to(self.latents_dtype))

    def text_positions(self, length: int) -> Tensor:
        """[L, 3] of so many text tokens: 0, n, n."""
        along = torch.arange(length)
        return torch.stack([torch.zeros_like(along), along, along], dim=1).to(self.latents_dtype)
