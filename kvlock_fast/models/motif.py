"""The Motif-Video family, text-to-video.

Facts of diffusers' `MotifVideoPipeline`: latents are normalised as Wan's, and kept in the transformer's dtype; sigmas
are evenly spaced, then shifted by the number of tokens; a "guider" guides; the transformer sees an image's latents and
a mask of it as channels, which are zeros without one. Single blocks have the text behind the video. The last of them
may be decoders: behind their own tokens of the video they see those of the blocks before, which keep their new keys and
values as a text does: they come out of locked blocks.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import MotifVideoPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.masks import Geometry
from kvlock_fast.models.autoencoder import decode_each, encode_mode
from kvlock_fast.models.base import PipelineModel, check_guider, is_on
from kvlock_fast.models.images import shift_of

MOTIF = ArchSpec(
    family="motif",
    transformers=("MotifVideoTransformer3DModel",),
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    text="suffix",
    blocks=("MotifVideoTransformerBlock", "MotifVideoSingleTransformerBlock"),
)


class MotifModel(PipelineModel):
    """What the loop needs of a diffusers `MotifVideoPipeline`."""

    arch = MOTIF
    shifts_by_size = True

    def __init__(self, pipe: Any):
        """Raises InputError for a pipeline of another kind, or a guider that is not classifier-free guidance."""
        super().__init__(pipe)
        check_guider(pipe.guider)
        if self.config.patch_size_t != 1:
            raise InputError(f"a model whose tokens hold {self.config.patch_size_t} latent frames is not supported")

    @property
    def latents_dtype(self) -> torch.dtype:
        """Of the latents between steps, in the pipeline."""
        return self.transformers[0].dtype

    @property
    def geometry(self) -> Geometry:
        vae, patch = self.pipe.vae.config, self.config.patch_size
        return Geometry(vae.scale_factor_temporal, vae.scale_factor_spatial, (1, patch, patch))

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Evenly spaced sigmas, and the shift for so many tokens."""
        t, h, w = self.geometry.token_grid(frames, height, width)
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": shift_of(self.pipe.scheduler, t * h * w)}

    def guided(self, guidance_scale: float) -> bool:
        """Whether a negative branch is run: where the guider is on."""
        return is_on(self.pipe.guider) and guidance_scale > 1

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] in the text encoder's dtype, mask [n, L] of its tokens."""
        text, _, mask, _ = self.pipe.encode_prompt(prompts, device=self.device)
        return Conditioning(text=text, mask=mask)

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """[1, C, T, h, w] fp32, as the pipeline draws it: in the model's dtype."""
        return randn_tensor(shape, generator=generator, device=device, dtype=self.latents_dtype).float()

    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [F, H, W, 3] to normalised latents [1, C, T, h, w] fp32, by the posterior's mode."""
        config = self.pipe.vae.config
        latents = encode_mode(self.pipe.vae, frames, self.device)
        return MotifVideoPipeline._normalize_latents(latents, config.latents_mean, config.latents_std)

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        """Normalised latents [B, C, T, h, w] of so many frames to uint8 [B, F, H, W, 3] on the CPU."""
        vae = self.pipe.vae
        latents = MotifVideoPipeline._denormalize_latents(
            latents.to(vae.dtype), vae.config.latents_mean, vae.config.latents_std
        )
        return decode_each(vae, latents, tiled)

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, T, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        transformer = self.transformers[which]
        rows = latents.to(transformer.dtype)
        no_image = rows.new_zeros(len(rows), rows.shape[1] + 1, *rows.shape[2:])
        return transformer(
            hidden_states=torch.cat([rows, no_image], dim=1),
            timestep=timestep.expand(len(rows)),
            encoder_hidden_states=told["text"],
            encoder_attention_mask=told["mask"],
            return_dict=False,
        )[0]
