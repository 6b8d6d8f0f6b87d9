"""The Mochi family, text-to-video.

Facts of diffusers' `MochiPipeline`: sigma counts from noise to data, so that the velocity points at the data, and the
sigmas are its own, linear at first and quadratic afterwards; text and video have projections of their own, so that the
lock sees the video alone; a text's mask takes its filling out of the attention; both branches of guidance are one
forward, unconditional rows first; predictions are taken in fp32, latents and timesteps are kept in the model's dtype.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.mochi.pipeline_mochi import MochiPipeline, linear_quadratic_schedule
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.base import MASKED_TEXT, ChannelNormModel, by_channel

MOCHI = ArchSpec(
    family="mochi",
    transformers=("MochiTransformer3DModel",),
    attention=r"transformer_blocks\.\d+\.attn1",
    flow="reversed",
    one_call=True,
    blocks=("MochiTransformerBlock",),
)
THRESHOLD_NOISE = 0.025
"""How far the linear part of the sigmas goes, by MochiPipeline."""
DEFAULTS = inspect.signature(MochiPipeline.__call__).parameters


class MochiModel(ChannelNormModel):
    """A diffusers `MochiPipeline`."""

    arch = MOCHI
    why_not_captured = "its attention counts the text's tokens on the host"
    in_model_dtype = True
    time_in_model_dtype = True
    told_names = MASKED_TEXT

    @property
    def usual_extent(self) -> tuple[None, int, int]:
        """Frames, height and width, as far as MochiPipeline's call does not say."""
        return None, self.pipe.default_height, self.pipe.default_width

    def facts(self, given: Given) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.pipe.config.force_zeros_for_empty_prompt}

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Its own sigmas. Raises InputError for a single step, for which there are none."""
        if num_steps < 2:
            raise InputError(f"num_inference_steps must be at least 2 for the family mochi, got {num_steps}")
        return {"sigmas": np.array(linear_quadratic_schedule(num_steps, THRESHOLD_NOISE))}

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        most = min(DEFAULTS["max_sequence_length"].default, self.pipe.tokenizer_max_length)
        return self.masked_text(prompts, most)

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Noise [1, C, T, h, w], drawn in fp32."""
        return self._drawn(shape, generator, device, torch.float32)

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's latents, which are 0 and 1 where it does not say."""
        config = self.pipe.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            mean, std = (0.0,) * config.latent_channels, (1.0,) * config.latent_channels
        return by_channel(mean, latents), by_channel(std, latents) / config.scaling_factor

    def leaving(self, prediction: Tensor, latents: Tensor) -> Tensor:
        return prediction.float()
