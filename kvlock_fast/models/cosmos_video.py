"""Cosmos 2 from a picture: an edit is given the first frame of its source, and so is the source.

Facts of diffusers' `Cosmos2VideoToWorldPipeline`, beside those of Cosmos 2's text-to-image one: the transformer sees
the picture's latents in the place of the first latent frame's, nearly without noise, with a time of its own, and a mask
of that as a channel; what it says of the first frame is the picture, in both branches, so that an edit leaves that
frame as it is. The picture's latents are the posterior's mode, where the pipeline draws a sample.
"""

import inspect
from dataclasses import replace

import torch
from diffusers import Cosmos2VideoToWorldPipeline
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.models.cosmos import COSMOS, Cosmos2Model

DEFAULTS = inspect.signature(Cosmos2VideoToWorldPipeline.__call__).parameters
FRAME_RATE, PICTURE_SIGMA = DEFAULTS["fps"].default, DEFAULTS["sigma_conditioning"].default


class Cosmos2VideoModel(Cosmos2Model):
    """What the loop needs of a diffusers `Cosmos2VideoToWorldPipeline`, of a first frame."""

    arch = replace(COSMOS, family="cosmos2-video")
    told_of_frames = True
    makes_images = False
    _mask_channels = 1

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C], and the first frame's latents [n, C, 1, h, w] fp32."""
        image = self.encode_video(given.frames[:1])
        return super().condition(prompts, given).replace(image=image.expand(len(prompts), -1, -1, -1, -1))

    def may_change(self, pixels: Tensor) -> Tensor:
        """A mask bool [F, H, W] without the first frame, which the model holds."""
        if not pixels[1:].any():
            raise InputError("mask marks the first frame only, which this video model takes as it is")
        return torch.cat([torch.zeros_like(pixels[:1]), pixels[1:]])

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """Clean latents [B, C, T, h, w] fp32, at latents [B, ...] of sigma `timestep` [], the first frame as given."""
        dtype, image = self.transformers[which].dtype, told["image"]
        time = timestep / (timestep + 1)  # of the flow that x / (1 + sigma) goes along
        kept = 1 - time
        picture_time = torch.full_like(time, PICTURE_SIGMA)
        picture_time = picture_time / (picture_time + 1)
        first = torch.zeros_like(latents[:, :1])
        first[:, :, 0] = 1
        held = first[:, :, :, :1, :1]
        output = self.ask(
            which,
            torch.cat([image, (latents * kept)[:, :, 1:]], dim=2),
            (held * picture_time + (1 - held) * time).to(dtype),
            told,
            fps=FRAME_RATE,
            condition_mask=first.to(dtype),
        )
        clean = (kept * latents + -time * output.float()).to(dtype)
        return torch.cat([image, clean[:, :, 1:].float()], dim=2)
