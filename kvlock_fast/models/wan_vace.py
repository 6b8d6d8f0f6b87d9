"""Wan VACE: 2.1, and 2.2 with two transformers.

Facts of diffusers' `WanVACEPipeline`: as `WanPipeline` (wan.py), and further blocks, with self-attention of their own,
see what is given and hand hints to some of the others: latents of the video where it is kept, latents of it where it
is to be made anew, and the mask, of which each latent has a pixel a channel.

The edit is shown the source outside the mask, and nothing (grey) inside. The source's own pass is shown the whole
source and an empty mask: its keys and values are the same whatever the mask. There are no reference pictures. Layers
count through the model's own blocks first, then those of VACE.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.models.base import TEXT
from kvlock_fast.models.wan import WAN, WanModel

WAN_VACE = replace(
    WAN, family="wan-vace", transformers=("WanVACETransformer3DModel",), attention=r"(vace_)?blocks\.\d+\.attn1"
)


class WanVACEModel(WanModel):
    """A diffusers `WanVACEPipeline`."""

    arch = WAN_VACE
    told_of_frames = True
    told_names = TEXT | {"control_hidden_states": "shown"}

    def check(self) -> None:
        config = self.pipe.vae.config
        channels, wanted = self.config.vace_in_channels, 2 * config.z_dim + config.scale_factor_spatial**2
        if channels != wanted:
            raise InputError(f"the transformer is shown {channels} channels, and with this autoencoder it is {wanted}")

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C]; shown [n, c, T, h, w], both in the transformer's dtype."""
        pixels = torch.ones(given.frames.shape[:3], dtype=torch.bool) if given.pixels is None else given.pixels
        return self._told(prompts, given, pixels, "edit")

    def condition_source(self, prompts: list[str], given: Given) -> Conditioning:
        """Conditioning with the whole source kept."""
        return self._told(prompts, given, torch.zeros(given.frames.shape[:3], dtype=torch.bool), "source")

    def _told(self, prompts: list[str], given: Given, pixels: Tensor, name: str) -> Conditioning:
        clip = (given.frames,) if given.pixels is None else (given.frames, given.pixels)
        return self.text_and(prompts, shown=self._made(clip, name, lambda: self._show(given.frames, pixels)))

    def _show(self, frames: Tensor, pixels: Tensor) -> Tensor:
        """[1, c, T, h, w]: latents of what is kept, of what is not (grey), and the mask."""
        video = 2.0 * (frames.to(self.device, torch.float32).permute(3, 0, 1, 2)[None] / 255.0) - 1.0
        mask = pixels.to(self.device, torch.float32).expand(1, 3, -1, -1, -1)
        latents = self.pipe.prepare_video_latents(video * (1 - mask), mask, [[]], None, self.device)
        shown = torch.cat([latents, self.pipe.prepare_masks(mask, [[]])], dim=1)
        return shown.to(self.dtype)
