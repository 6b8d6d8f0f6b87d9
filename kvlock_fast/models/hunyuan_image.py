"""The HunyuanImage family, text-to-image: HunyuanImage 2.1.

Facts of diffusers' `HunyuanImagePipeline`: latents are the autoencoder's times its `scaling_factor`, drawn and kept in
the transformer's dtype, a token each; sigmas are evenly spaced from 1; the transformer is told words, and quoted ones
by their letters, each with a mask. Blocks with two streams project image and text apart, blocks with one stream
together, the text last. A "guider" guides, each branch in a forward of its own; an edit takes classifier-free guidance
in the place of the adaptive projected guidance that its checkpoints ship. Without a guider, or where the transformer is
told the scale, there is one branch.
"""

import torch

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError, warn
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.masks import Geometry
from kvlock_fast.models.base import WORDS_AND_LETTERS, check_guider
from kvlock_fast.models.images import ATTENTION, ImageModel

HUNYUAN_IMAGE = ArchSpec(
    family="hunyuan-image", transformers=("HunyuanImageTransformer2DModel",), attention=ATTENTION, text="suffix"
)
SHIPPED = "AdaptiveProjectedMixGuidance"
TOLD = 1000.0
"""Factor of the scale where the transformer is told it."""


class HunyuanImageModel(ImageModel):
    """A diffusers `HunyuanImagePipeline`."""

    arch = HUNYUAN_IMAGE
    why_not_captured = "a forward of HunyuanImage waits for values that decide what it computes"
    most_text = 1128
    evenly_spaced = True
    time_in_model_dtype = True
    has_guider = True
    told_names = WORDS_AND_LETTERS | {"guidance": "guidance"}

    def check(self) -> None:
        guider = self.pipe.guider
        if self.config.use_meanflow:
            raise InputError("a model that is told where a step ends (use_meanflow=True) is not supported")
        if type(guider).__name__ == SHIPPED:
            warn(f"the pipeline's guider {SHIPPED} is left out: an edit takes classifier-free guidance")
        elif guider is not None:
            check_guider(guider)

    @property
    def geometry(self) -> Geometry:
        return Geometry(1, self.pipe.vae_scale_factor, (1, *self.config.patch_size), one_frame=True)

    @property
    def told_scale(self) -> bool:
        return self.config.guidance_embeds

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """Words [n, L, C] and letters [n, M, D] in the transformer's dtype, with masks; guidance [n], if it is told."""
        text, mask, letters, letters_mask = self.pipe.encode_prompt(
            prompts, device=self.device, batch_size=len(prompts)
        )
        dtype = self.dtype
        told = {"text": text.to(dtype), "mask": mask, "letters": letters.to(dtype), "letters_mask": letters_mask}
        if self.told_scale:
            scales = torch.full((len(prompts),), given.guidance_scale, dtype=dtype, device=self.device)
            told["guidance"] = scales * TOLD
        return Conditioning(**told)
