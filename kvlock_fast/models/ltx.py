"""The LTX-Video family, text-to-video.

Facts of diffusers' `LTXPipeline`: latents are normalised by statistics that the autoencoder keeps, and lie as a
sequence of tokens; the sigmas are evenly spaced, then shifted by the number of latents; a text's mask goes with it;
both branches of guidance are one forward, unconditional rows first; predictions are taken in fp32. Positions are in
seconds, by a frame rate, and in pixels.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from diffusers import LTXPipeline
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.masks import Geometry
from kvlock_fast.models.autoencoder import decode_each, encode_mode
from kvlock_fast.models.base import PipelineModel
from kvlock_fast.models.images import shift_of

LTX = ArchSpec(
    family="ltx",
    transformers=("LTXVideoTransformer3DModel",),
    attention=r"transformer_blocks\.\d+\.attn1",
    one_call=True,
)
DEFAULTS = inspect.signature(LTXPipeline.__call__).parameters


class LTXModel(PipelineModel):
    """What the loop needs of a diffusers `LTXPipeline`."""

    arch = LTX
    shifts_by_size = True

    @property
    def geometry(self) -> Geometry:
        vae, patch = self.pipe.vae, self.config.patch_size
        time, space = vae.temporal_compression_ratio, vae.spatial_compression_ratio
        return Geometry(time, space, (self.config.patch_size_t, patch, patch))

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Evenly spaced sigmas, and the shift for so many latents."""
        geometry = self.geometry
        latents = ((frames - 1) // geometry.temporal_stride + 1) * (height // geometry.spatial_stride)
        mu = shift_of(self.pipe.scheduler, latents * (width // geometry.spatial_stride))
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": mu}

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] in the transformer's dtype, mask [n, L] of its tokens."""
        length = min(DEFAULTS["max_sequence_length"].default, self.pipe.tokenizer_max_length)
        text, mask, _, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=self.device
        )
        return Conditioning(text=text.to(self.transformers[0].dtype), mask=mask)

    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [F, H, W, 3] to normalised latents [1, C, T, h, w] fp32, by the posterior's mode."""
        vae = self.pipe.vae
        latents = encode_mode(vae, frames, self.device)
        return LTXPipeline._normalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        """Normalised latents [B, C, T, h, w] of so many frames to uint8 [B, F, H, W, 3] on the CPU.

        An autoencoder that can take noise off while it decodes is told that there is none.
        """
        vae = self.pipe.vae
        latents = LTXPipeline._denormalize_latents(
            latents.float(), vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )
        told = {"temb": latents.new_zeros(1, dtype=vae.dtype)} if vae.config.timestep_conditioning else {}
        return decode_each(vae, latents, tiled, **told)

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, T, h, w] fp32, at latents [B, ...], timestep []."""
        transformer, vae = self.transformers[which], self.pipe.vae
        frames, height, width = latents.shape[2:]
        patches = self.config.patch_size, self.config.patch_size_t
        rows = LTXPipeline._pack_latents(latents, *patches).to(transformer.dtype)
        if len(rows) > 1:  # as the pipeline's own, put together of both branches: other strides are other roundings
            rows = rows.contiguous()
        space = vae.spatial_compression_ratio
        prediction = transformer(
            hidden_states=rows,
            encoder_hidden_states=told["text"],
            timestep=timestep.expand(len(rows)),
            encoder_attention_mask=told["mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(vae.temporal_compression_ratio / DEFAULTS["frame_rate"].default, space, space),
            return_dict=False,
        )[0]
        grid = (size // patch for size, patch in zip(latents.shape[2:], self.geometry.patch_size, strict=True))
        return LTXPipeline._unpack_latents(prediction.float(), *grid, *patches)
