"""The Qwen-Image family, text-to-image.

Facts of diffusers' `QwenImagePipeline`: the autoencoder is one of videos, given one frame, and its latents are
normalised by `latents_mean` and `latents_std`; they are drawn and kept in the text's dtype, and packed 2 x 2 to a
token; the sigmas are evenly spaced, then shifted by the number of tokens; timesteps are given divided by 1000. Texts
are as long as they are, with a mask only where one is filled up beside a longer one. Each branch of guidance is a
forward of its own, and what they make together is scaled back, token by token, to the length of the conditional
prediction: that holds for the preset `cfg`, while the lock's own guidance is by its formula.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.autoencoder import decode_each, encode_mode
from kvlock_fast.models.images import ImageModel, even_sigmas

QWEN_IMAGE = ArchSpec(
    family="qwen-image",
    transformers=("QwenImageTransformer2DModel",),
    attention=r"transformer_blocks\.\d+\.attn",
    text="prefix",
)


class QwenImageModel(ImageModel):
    """What the loop needs of a diffusers `QwenImagePipeline`."""

    arch = QWEN_IMAGE
    shifts_by_size = True

    def __init__(self, pipe: Any):
        """Raises InputError for a pipeline of another kind."""
        super().__init__(pipe)
        config = self.config
        if config.guidance_embeds or config.zero_cond_t or config.use_layer3d_rope or config.use_additional_t_cond:
            raise InputError("the model is a Qwen-Image of another kind (for edits or layers), which is not supported")

    @property
    def most_tokens(self) -> tuple[None, int, int]:
        """Positions are cut from a table, half of them on either side of the middle."""
        most = 2 * len(self.transformers[0].pos_embed.pos_freqs)
        return None, most, most

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Evenly spaced sigmas, and the shift for so many tokens."""
        return even_sigmas(self.pipe.scheduler, num_steps, self.tokens(height, width))

    def combine(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Guided, each token as long as the conditional prediction has it."""
        height, width = cond.shape[3:]
        cond, uncond = self._packed(cond), self._packed(uncond)
        guided = uncond + scale * (cond - uncond)
        lengths = (torch.norm(x, dim=-1, keepdim=True) for x in (cond, guided))
        return self._unpacked(guided * torch.div(*lengths), height, width)

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] in the transformer's dtype; mask [n, L] of its tokens, where some are filled up."""
        text, mask = self.pipe.encode_prompt(prompts, device=self.device)
        return Conditioning("text", text=text.to(self.latents_dtype), **({} if mask is None else {"mask": mask.bool()}))

    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [1, H, W, 3] to normalised latents [1, C, 1, h, w] fp32, by the posterior's mode."""
        mean, std = self._latent_mean_and_std()
        return ((encode_mode(self.pipe.vae, frames, self.device) - mean) / std).contiguous()

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        """Normalised latents [B, C, 1, h, w] to uint8 [B, 1, H, W, 3] on the CPU."""
        mean, std = self._latent_mean_and_std()
        return decode_each(self.pipe.vae, latents.float() * std + mean, tiled)

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, 1, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        rows, dtype, (height, width) = len(latents), self.latents_dtype, latents.shape[3:]
        prediction = self.transformers[which](
            hidden_states=self._packed(latents.to(dtype)),
            timestep=timestep.expand(rows).to(dtype) / 1000,
            encoder_hidden_states=told["text"],
            encoder_hidden_states_mask=told.get("mask"),
            img_shapes=[[(1, height // 2, width // 2)]] * rows,
            return_dict=False,
        )[0]
        return self._unpacked(prediction, height, width)

    def _packed(self, latents: Tensor) -> Tensor:
        rows, channels, _, height, width = latents.shape
        return self.pipe._pack_latents(latents.contiguous(), rows, channels, height, width)

    def _unpacked(self, rows: Tensor, height: int, width: int) -> Tensor:
        stride = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(rows, height * stride, width * stride, stride)

    def _latent_mean_and_std(self) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        return tuple(
            torch.tensor(values, dtype=torch.float32, device=self.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
