"""The LTX-Video family, text-to-video.

Facts of diffusers' `LTXPipeline`: latents are normalised by statistics that the autoencoder keeps, and lie as a
sequence of tokens; the sigmas are evenly spaced, then shifted by the number of latents; a text's mask goes with it;
both branches of guidance are one forward, unconditional rows first; predictions are taken in fp32. Positions are in
seconds, by a frame rate, and in pixels.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.autoencoder import decode_each
from kvlock_fast.models.base import MASKED_TEXT, PipelineModel

LTX = ArchSpec(
    family="ltx",
    transformers=("LTXVideoTransformer3DModel",),
    attention=r"transformer_blocks\.\d+\.attn1",
    one_call=True,
)
DEFAULTS = inspect.signature(LTXPipeline.__call__).parameters


class LTXModel(PipelineModel):
    """A diffusers `LTXPipeline`."""

    arch = LTX
    shifts_by_size = True
    told_names = MASKED_TEXT

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Evenly spaced sigmas, and the shift for so many latents."""
        geometry = self.geometry
        latents = ((frames - 1) // geometry.temporal_stride + 1) * (height // geometry.spatial_stride)
        return self.shifted_sigmas(num_steps, latents * (width // geometry.spatial_stride))

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        most = min(DEFAULTS["max_sequence_length"].default, self.pipe.tokenizer_max_length)
        return self.masked_text(prompts, most)

    def _normalised(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        return LTXPipeline._normalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        """Normalised latents [B, C, T, h, w] of so many frames to uint8 [B, F, H, W, 3] on the CPU.

        An autoencoder that can take noise off while it decodes is told that there is none.
        """
        vae = self.pipe.vae
        latents = LTXPipeline._denormalize_latents(
            latents.float(), vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )
        no_noise = {"temb": latents.new_zeros(1, dtype=vae.dtype)} if vae.config.timestep_conditioning else {}
        return decode_each(vae, latents, tiled, told=no_noise)

    def packed(self, latents: Tensor) -> Tensor:
        """Latents [B, C, T, h, w] as tokens [B, S, D]."""
        rows = LTXPipeline._pack_latents(latents, self.config.patch_size, self.config.patch_size_t)
        # As the pipeline's own, put together of both branches: other strides are other roundings.
        return rows.contiguous() if len(rows) > 1 else rows

    def unpacked(self, rows: Tensor, extent: Sequence[int]) -> Tensor:
        """Tokens [B, S, D] as latents [B, C, T, h, w] fp32 of this extent (T, h, w)."""
        t, h, w = (size // patch for size, patch in zip(extent, self.geometry.patch_size, strict=True))
        return LTXPipeline._unpack_latents(rows.float(), t, h, w, self.config.patch_size, self.config.patch_size_t)

    def entering(self, latents: Tensor, told: Conditioning) -> Tensor:
        return self.packed(latents)

    def beside(self, told: Conditioning, latents: Tensor) -> dict[str, Any]:
        frames, height, width = latents.shape[2:]
        vae, space = self.pipe.vae, self.pipe.vae.spatial_compression_ratio
        scale = vae.temporal_compression_ratio / DEFAULTS["frame_rate"].default, space, space
        extent = {"num_frames": frames, "height": height, "width": width}
        return {**super().beside(told, latents), **extent, "rope_interpolation_scale": scale}

    def leaving(self, prediction: Tensor, latents: Tensor) -> Tensor:
        return self.unpacked(prediction, latents.shape[2:])
