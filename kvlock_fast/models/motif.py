"""The Motif-Video family, text-to-video.

Facts of diffusers' `MotifVideoPipeline`: latents are normalised as Wan's, and kept in the transformer's dtype; sigmas
are evenly spaced, then shifted by the number of tokens; a "guider" guides; the transformer sees an image's latents and
a mask of it as channels, which are zeros without one. Single blocks have the text behind the video. The last of them
may be decoders: behind their own tokens of the video they see those of the blocks before, which keep their new keys and
values as a text does: they come out of locked blocks.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from diffusers.pipelines.motif_video.pipeline_motif_video import MotifVideoPipeline
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.masks import Geometry
from kvlock_fast.models.base import MASKED_TEXT, PipelineModel, check_guider

MOTIF = ArchSpec(
    family="motif",
    transformers=("MotifVideoTransformer3DModel",),
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    text="suffix",
    blocks=("MotifVideoTransformerBlock", "MotifVideoSingleTransformerBlock"),
)


class MotifModel(PipelineModel):
    """A diffusers `MotifVideoPipeline`."""

    arch = MOTIF
    shifts_by_size = True
    in_model_dtype = True
    has_guider = True
    told_names = MASKED_TEXT

    def check(self) -> None:
        check_guider(self.pipe.guider)
        if self.config.patch_size_t != 1:
            raise InputError(f"a model whose tokens hold {self.config.patch_size_t} latent frames is not supported")

    @property
    def geometry(self) -> Geometry:
        vae, patch = self.pipe.vae.config, self.config.patch_size
        return Geometry(vae.scale_factor_temporal, vae.scale_factor_spatial, (1, patch, patch))

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        return self.shifted_sigmas(num_steps, prod(self.geometry.token_grid(frames, height, width)))

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] in the text encoder's dtype, mask [n, L] of its tokens."""
        text, _, mask, _ = self.pipe.encode_prompt(prompts, device=self.device)
        return Conditioning(text=text, mask=mask)

    def _normalised(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return MotifVideoPipeline._normalize_latents(latents, config.latents_mean, config.latents_std)

    def _denormalised(self, latents: Tensor) -> Tensor:
        """Latents in the autoencoder's dtype."""
        vae = self.pipe.vae
        return MotifVideoPipeline._denormalize_latents(
            latents.to(vae.dtype), vae.config.latents_mean, vae.config.latents_std
        )

    def entering(self, latents: Tensor, told: Conditioning) -> Tensor:
        """The latents, with zeros for an image's and their mask."""
        no_image = latents.new_zeros(len(latents), latents.shape[1] + 1, *latents.shape[2:])
        return torch.cat([latents, no_image], dim=1)
