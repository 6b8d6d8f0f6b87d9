"""The FLUX.2 family: text-to-image, guided by a scale that the transformer is told (dev), or by two branches (Klein).

Facts of diffusers' `Flux2Pipeline` and `Flux2KleinPipeline`: latents are the autoencoder's, 2 x 2 of them folded into
channels and then normalised by the running statistics of its batch norm, so that a token is one of them; they are drawn
and kept in the text's dtype; the sigmas are evenly spaced, then shifted by the number of tokens and of steps; timesteps
are given divided by 1000. Blocks with one stream have a single projection for queries, keys, values and feed-forward,
the text first. Klein runs each branch of guidance in a forward of its own, unless its config says it was distilled.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.masks import Geometry
from kvlock_fast.models.base import TEXT
from kvlock_fast.models.images import PackedModel, padded_length

FLUX2 = ArchSpec(
    family="flux2",
    transformers=("Flux2Transformer2DModel",),
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    value=("to_v", "to_qkv_mlp_proj"),
    text="prefix",
    fused=("to_qkv_mlp_proj",),
)
FOLD = 2
"""Latents of the autoencoder that become channels of one, down and across."""


class Flux2Model(PackedModel):
    """A diffusers `Flux2Pipeline`."""

    arch = FLUX2
    told_scale = True
    told_names = TEXT | {"guidance": "guidance"}

    def check(self) -> None:
        """Any transformer of the class will do."""

    @property
    def geometry(self) -> Geometry:
        return Geometry(1, self.pipe.vae_scale_factor * FOLD, (1, 1, 1), one_frame=True)

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Evenly spaced sigmas, and the shift for so many tokens and steps."""
        mu = compute_empirical_mu(image_seq_len=self.tokens(height, width), num_steps=num_steps)
        return {**super().timesteps_settings(num_steps, frames, height, width), "mu": mu}

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] in the transformer's dtype, and guidance [n] fp32, if it is told."""
        told = super().condition(prompts, given)
        scales = torch.full((len(prompts),), given.guidance_scale, device=self.device)
        return told.replace(guidance=scales) if self.told_scale else told

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        length = padded_length(self.most_words, self.pipe.tokenizer)
        text, _ = self.pipe.encode_prompt(prompts, device=self.device, max_sequence_length=length)
        return text.to(self.dtype)

    def _normalised(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents [1, C, 1, h, w], folded to [1, 4 C, 1, h / 2, w / 2]."""
        mean, std = self._mean_and_std()
        return ((self.pipe._patchify_latents(latents[:, :, 0]) - mean) / std)[:, :, None].contiguous()

    def _denormalised(self, latents: Tensor) -> Tensor:
        mean, std = self._mean_and_std()
        return self.pipe._unpatchify_latents(latents[:, :, 0].float() * std + mean)[:, :, None]

    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Statistics of the folded latents, each [1, 4 C, 1, 1] fp32."""
        norm = self.pipe.vae.bn
        mean, variance = (x.float().view(1, -1, 1, 1).to(self.device) for x in (norm.running_mean, norm.running_var))
        return mean, torch.sqrt(variance + self.pipe.vae.config.batch_norm_eps)

    def text_positions(self, length: int) -> Tensor:
        """Positions [L, 4] of so many text tokens."""
        return self.pipe._prepare_text_ids(torch.empty(1, length, 0))[0]

    def image_positions(self, height: int, width: int) -> Tensor:
        """Positions [S, 4] of an image of so many latents."""
        return self.pipe._prepare_latent_ids(torch.empty(1, 0, height, width))[0]

    def entering(self, latents: Tensor, told: Conditioning) -> Tensor:
        return self.pipe._pack_latents(latents[:, :, 0])

    def leaving(self, prediction: Tensor, latents: Tensor) -> Tensor:
        return prediction.transpose(1, 2).unflatten(2, (1, *latents.shape[3:]))


class Flux2KleinModel(Flux2Model):
    """A diffusers `Flux2KleinPipeline`, which is guided by two branches or not at all."""

    arch = replace(FLUX2, family="flux2-klein")
    told_scale = False

    def guided(self, guidance_scale: float) -> bool:
        """Not where the pipeline says that its model was distilled."""
        return super().guided(guidance_scale) and not self.pipe.config.is_distilled
