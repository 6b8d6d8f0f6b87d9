"""The Ovis-Image family, text-to-image: blocks like FLUX.1's, guided by two branches.

Facts of diffusers' `OvisImagePipeline`, beside those of images.py: the text is a Qwen3's, its filling set to zero and
not masked; its tokens have positions on the diagonal.
"""

import torch
from torch import Tensor

from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.images import ATTENTION, PackedModel, padded_length

OVIS_IMAGE = ArchSpec(
    family="ovis-image", transformers=("OvisImageTransformer2DModel",), attention=ATTENTION, text="prefix"
)


class OvisImageModel(PackedModel):
    """A diffusers `OvisImagePipeline`."""

    arch = OVIS_IMAGE
    most_words = 256

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        length = padded_length(self.most_words, self.pipe.tokenizer)
        text, *_ = self.words(prompts, max_sequence_length=length)
        return text.to(self.dtype)

    def text_positions(self, length: int) -> Tensor:
        """Positions [L, 3] of so many text tokens: 0, n, n."""
        along = torch.arange(length)
        return torch.stack([torch.zeros_like(along), along, along], dim=1).to(self.dtype)
