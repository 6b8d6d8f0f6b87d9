"""The FLUX.1 family: text-to-image, guided by a scale that the transformer is told (dev), or not at all (schnell).

Facts of diffusers' `FluxPipeline`: latents are drawn and kept in the text's dtype, and packed 2 x 2 to a token; the
sigmas are evenly spaced, then shifted by the number of tokens where the scheduler asks for it; timesteps are given
divided by 1000. The text's tokens have no mask and no positions. Blocks with two streams project text and image apart,
blocks with one stream together, the text first. Guidance by a negative prompt is run where one is given, in a forward
of its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.models.arch import ArchSpec
from kvlock_fast.models.image import ImageModel, even_sigmas

FLUX = ArchSpec(
    family="flux",
    transformers=("FluxTransformer2DModel",),
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    text="prefix",
)
TEXT_TOKENS = 512
"""What FluxPipeline pads a prompt to."""


class FluxModel(ImageModel):
    """What the loop needs of a diffusers `FluxPipeline`."""

    arch = FLUX
    shifts_by_size = True
    guided_if_asked = True

    def __init__(self, pipe: Any):
        """Raises InputError for a pipeline of another kind."""
        super().__init__(pipe)
        if self.config.in_channels != 4 * pipe.vae.config.latent_channels:
            raise InputError("the model takes an image beside the text (as FLUX.1 Fill), which is not supported")
        if getattr(self.transformers[0], "encoder_hid_proj", None) is not None:
            raise InputError("the model has an IP-Adapter loaded: unload_ip_adapter() first")
        self._positions: dict[tuple, tuple[Tensor, Tensor]] = {}

    def facts(self, given: Given) -> dict[str, Any]:
        """The scale, where the transformer is told it."""
        return {"guidance_scale": given.guidance_scale} if self.config.guidance_embeds else {}

    def guided(self, guidance_scale: float) -> bool:
        """Not where the transformer is told the scale."""
        return not self.config.guidance_embeds and guidance_scale > 1

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Evenly spaced sigmas, and the shift for so many tokens."""
        return even_sigmas(self.pipe.scheduler, num_steps, self.tokens(height, width))

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] of T5, pooled [n, C] of CLIP, in the transformer's dtype; guidance [n] fp32, if it is told."""
        length = min(TEXT_TOKENS, int(self.pipe.tokenizer_2.model_max_length))
        text, pooled, _ = self.pipe.encode_prompt(prompts, device=self.device, max_sequence_length=length)
        told = {"text": text.to(self.latents_dtype), "pooled": pooled.to(self.latents_dtype)}
        if self.config.guidance_embeds:
            told["guidance"] = torch.full((len(prompts),), given.guidance_scale, device=self.device)
        return Conditioning(**told)

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, 1, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        rows, dtype, (height, width) = len(latents), self.latents_dtype, latents.shape[3:]
        text_ids, image_ids = self._ids(told["text"].shape[1], height, width)
        prediction = self.transformers[which](
            hidden_states=self.pipe._pack_latents(
                latents[:, :, 0].to(dtype).contiguous(), rows, latents.shape[1], height, width
            ),
            timestep=timestep.expand(rows).to(dtype) / 1000,
            guidance=told.get("guidance"),
            pooled_projections=told["pooled"],
            encoder_hidden_states=told["text"],
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        stride = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(prediction, height * stride, width * stride, stride)[:, :, None]

    def _ids(self, text: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Positions of so many text tokens and of an image of so many latents. Kept: captured steps read them."""
        key = text, height, width, self.device, self.latents_dtype
        if key not in self._positions:
            image = self.pipe._prepare_latent_image_ids(1, height // 2, width // 2, self.device, self.latents_dtype)
            self._positions[key] = torch.zeros(text, 3, device=self.device, dtype=self.latents_dtype), image
        return self._positions[key]
