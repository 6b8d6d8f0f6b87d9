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
from kvlock_fast.models.autoencoder import decode_images, encode_image
from kvlock_fast.models.images import ImageModel, even_sigmas

FLUX2 = ArchSpec(
    family="flux2",
    transformers=("Flux2Transformer2DModel",),
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    value=("to_v", "to_qkv_mlp_proj"),
    text="prefix",
    fused=("to_qkv_mlp_proj",),
)
TEXT_TOKENS = 512
"""What the pipelines pad a prompt to."""
FOLD = 2
"""Latents of the autoencoder that become channels of one, down and across."""


class Flux2Model(ImageModel):
    """What the loop needs of a diffusers `Flux2Pipeline`."""

    arch = FLUX2
    shifts_by_size = True

    def __init__(self, pipe: Any):
        """Raises InputError for a pipeline of another kind."""
        super().__init__(pipe)
        self._positions: dict[tuple, tuple[Tensor, Tensor]] = {}

    @property
    def geometry(self) -> Geometry:
        return Geometry(1, self.pipe.vae_scale_factor * FOLD, (1, 1, 1), one_frame=True)

    def facts(self, given: Given) -> dict[str, Any]:
        """The scale, which the transformer is told."""
        return {"guidance_scale": given.guidance_scale}

    def guided(self, guidance_scale: float) -> bool:
        """Not where the transformer is told the scale."""
        return False

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Evenly spaced sigmas, and the shift for so many tokens and steps."""
        tokens = self.tokens(height, width)
        mu = compute_empirical_mu(image_seq_len=tokens, num_steps=num_steps)
        return {**even_sigmas(self.pipe.scheduler, num_steps, tokens), "mu": mu}

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] in the transformer's dtype, guidance [n] fp32."""
        scales = torch.full((len(prompts),), given.guidance_scale, device=self.device)
        return Conditioning(text=self.encode_prompts(prompts), guidance=scales)

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """[len(prompts), L, C] in the transformer's dtype."""
        length = min(TEXT_TOKENS, int(getattr(self.pipe.tokenizer, "model_max_length", TEXT_TOKENS)))
        text, _ = self.pipe.encode_prompt(prompts, device=self.device, max_sequence_length=length)
        return text.to(self.latents_dtype)

    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [1, H, W, 3] to normalised latents [1, 4 C, 1, h, w] fp32, by the posterior's mode."""
        mean, std = self._latent_mean_and_std()
        latents = encode_image(self.pipe.vae, frames, self.device).contiguous()
        return ((self.pipe._patchify_latents(latents) - mean) / std)[:, :, None].contiguous()

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        """Normalised latents [B, 4 C, 1, h, w] to uint8 [B, 1, H, W, 3] on the CPU."""
        mean, std = self._latent_mean_and_std()
        latents = self.pipe._unpatchify_latents(latents[:, :, 0].float() * std + mean)
        return decode_images(self.pipe.vae, latents, tiled)[:, None]

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, 4 C, 1, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        dtype, (height, width) = self.latents_dtype, latents.shape[3:]
        text_ids, image_ids = self._ids(told["text"].shape[1], height, width)
        prediction = self.transformers[which](
            hidden_states=self.pipe._pack_latents(latents[:, :, 0].to(dtype)),
            timestep=timestep.expand(len(latents)).to(dtype) / 1000,
            guidance=told.get("guidance"),
            encoder_hidden_states=told["text"],
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2).unflatten(2, (1, height, width))

    def _ids(self, text: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Positions [L, 4] of so many text tokens and [S, 4] of an image's. Kept: captured steps read them."""
        key = text, height, width, self.device
        if key not in self._positions:
            ids = (
                self.pipe._prepare_text_ids(torch.empty(1, text, 0)),
                self.pipe._prepare_latent_ids(torch.empty(1, 0, height, width)),
            )
            self._positions[key] = tuple(x[0].to(self.device) for x in ids)
        return self._positions[key]

    def _latent_mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Of the folded latents, [1, 4 C, 1, 1] fp32."""
        norm = self.pipe.vae.bn
        mean, variance = (x.float().view(1, -1, 1, 1).to(self.device) for x in (norm.running_mean, norm.running_var))
        return mean, torch.sqrt(variance + self.pipe.vae.config.batch_norm_eps)


class Flux2KleinModel(Flux2Model):
    """What the loop needs of a diffusers `Flux2KleinPipeline`, which is guided by two branches or not at all."""

    arch = replace(FLUX2, family="flux2-klein")

    def facts(self, given: Given) -> dict[str, Any]:
        """None: the transformer is told no scale."""
        return {}

    def guided(self, guidance_scale: float) -> bool:
        """Not where the pipeline says that its model was distilled."""
        return guidance_scale > 1 and not self.pipe.config.is_distilled

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] in the transformer's dtype."""
        return Conditioning(text=self.encode_prompts(prompts))
