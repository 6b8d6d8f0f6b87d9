"""Lucy Edit: a Wan 2.2 that is shown a video and told what to change in it.

Facts of diffusers' `LucyEditPipeline`: as `WanPipeline` (wan.py), and the latents of the shown video lie behind the
latents that are denoised, as more channels. The video is the source, for its own pass and the edit alike.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.models.autoencoder import picture
from kvlock_fast.models.wan import WAN, WanModel

LUCY = replace(WAN, family="lucy-edit")


class LucyModel(WanModel):
    """A diffusers `LucyEditPipeline`."""

    arch = LUCY
    told_of_frames = True

    def check(self) -> None:
        channels, wanted = self.config.in_channels, 2 * self.latent_channels
        if channels != wanted:
            raise InputError(f"the transformer takes {channels} channels, and a video beside the latents is {wanted}")

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C]; shown [n, C, T, h, w] fp32."""
        return self.text_and(prompts, shown=self._made((given.frames,), "shown", lambda: self._show(given.frames)))

    def _show(self, frames: Tensor) -> Tensor:
        """The source's latents, as the pipeline makes them of pictures."""
        pictures = [picture(frame) for frame in frames]
        height, width = frames.shape[1:3]
        video = self.pipe.video_processor.preprocess_video(pictures, height=height, width=width)
        video = video.to(self.device, torch.float32)
        stride = self.geometry.spatial_stride
        size = (len(frames) - 1) // self.geometry.temporal_stride + 1, height // stride, width // stride
        channels = self.latent_channels
        noise = torch.empty(1, channels, *size, device=self.device)  # given, so that none is drawn
        return self.pipe.prepare_latents(video, 1, channels, height, width, torch.float32, self.device, None, noise)[1]

    def entering(self, latents: Tensor, told: Conditioning) -> Tensor:
        """The latents [B, ...] with those that are shown behind them."""
        return torch.cat([latents, told["shown"]], dim=1)
