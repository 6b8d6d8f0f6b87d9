"""The FramePack family, image-to-video in one section: an edit is given the first frame of its source.

Facts of diffusers' `HunyuanVideoFramepackPipeline`, beside those of HunyuanVideo's: a clip is the image and sections of
a few latent frames, of which one is denoised at a time; in front of its tokens the transformer has those of the image
and of history, clean, by their places in time; image features are among the words; the shift by the number of tokens
is limited; predictions are taken in fp32. An edit is of one section, which has no history: longer clips are refused, as
the second section would have to know the first one's edit. The first latent frame is the image and stays as it is; for
the lock the empty frame of history next to the section stands in its place, and what lies in front of that keeps its
new keys and values, as a text does. The image's latents are the posterior's mode, where the pipeline draws a sample.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_framepack import HunyuanVideoFramepackPipeline
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.masks import Geometry
from kvlock_fast.models.autoencoder import picture
from kvlock_fast.models.base import PipelineModel
from kvlock_fast.models.hunyuan_video import HUNYUAN_VIDEO, HunyuanVideoModel
from kvlock_fast.models.hunyuan_video_i2v import HunyuanVideoI2VModel
from kvlock_fast.models.schedulers import shift_of

FRAMEPACK = replace(
    HUNYUAN_VIDEO, family="framepack", transformers=("HunyuanVideoFramepackTransformer3DModel",), ahead=True
)
SECTION = inspect.signature(HunyuanVideoFramepackPipeline.__call__).parameters["latent_window_size"].default
HISTORY = 1, 2, 16
"""Latent frames of history behind a section: as they are, and in patches twice and four times as large each way."""
LARGEST_SHIFT = math.log(7.0)


class FramepackModel(HunyuanVideoI2VModel):
    """A diffusers `HunyuanVideoFramepackPipeline`, which samples backwards in time."""

    arch = FRAMEPACK
    shifts_by_size = True
    why_not_captured = "a forward of FramePack waits for the number of the text's tokens"

    @property
    def replaces(self) -> bool:
        return True

    def _check_image(self) -> None:
        config = self.config
        if config.in_channels != self.pipe.vae.config.latent_channels:
            raise InputError(f"a FramePack transformer of {config.in_channels} channels in is not supported")
        if not (config.has_image_proj and config.has_clean_x_embedder):
            raise InputError("the model's transformer has no part for the image, or none for history")

    @property
    def geometry(self) -> Geometry:
        return replace(super().geometry, most_tokens=(1 + SECTION, None, None))

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Evenly spaced sigmas, and the shift for a section's tokens. Raises InputError for a single frame."""
        t, h, w = self.geometry.token_grid(frames, height, width)
        if t < 2:
            raise InputError(f"FramePack makes what follows the first frame, and the video has {frames} frame")
        shift = min(shift_of(self.pipe.scheduler, (t - 1) * h * w), LARGEST_SHIFT)
        return {**super().timesteps_settings(num_steps, frames, height, width), "mu": shift}

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """HunyuanVideo's conditioning, and the image's latents [n, C, 1, h, w] fp32 and features [n, N, D]."""
        pipe, image = self.pipe, picture(given.frames[0])
        pixels = pipe.video_processor.preprocess(image, image.height, image.width)
        features = pipe.encode_image(pixels, device=self.device).to(self.dtype)
        latents = self._image_latents(given.frames)
        return HunyuanVideoModel.condition(self, prompts, given).replace(
            image=latents.expand(len(prompts), -1, -1, -1, -1), features=features.expand(len(prompts), -1, -1)
        )

    condition_negative = PipelineModel.condition_negative

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Noise [1, C, T, h, w] fp32, drawn for the section alone."""
        rows, channels, frames, *size = shape
        noise = self._drawn((rows, channels, frames - 1, *size), generator, device)
        return torch.cat([torch.zeros_like(noise[:, :, :1]), noise], dim=2)

    def first_latents(self, noise: Tensor, given: Given) -> Tensor:
        """The noise behind the image."""
        return torch.cat([self._image_latents(given.frames), noise[:, :, 1:]], dim=2)

    def tokens_ahead(self, latents: Tensor) -> int:
        """Number of tokens of the image, and of history but for the frame next to the section."""
        height, width = latents.shape[-2:]
        count = (height // self.config.patch_size) * (width // self.config.patch_size)
        for frames, patch in zip(HISTORY[1:], (2, 4), strict=True):
            count += -(-frames // patch) * -(-height // (2 * patch)) * -(-width // (2 * patch))
        return count

    def entering(self, latents: Tensor, told: Conditioning) -> Tensor:
        return latents[:, :, 1:]

    def beside(self, told: Conditioning, latents: Tensor) -> dict[str, Any]:
        """The image's features, and its latents with an empty history, each with numbers in time."""
        rows, size = latents.shape[:2], latents.shape[3:]
        near, far, farther = (latents.new_zeros(*rows, n, *size, dtype=self.dtype) for n in HISTORY)
        sizes, device = [1, latents.shape[2] - 1, *HISTORY], latents.device
        times = self.kept((*sizes, device), lambda: torch.arange(sum(sizes), device=device).split(sizes))
        at_image, section, at_near, at_far, at_farther = times
        return {
            **super().beside(told, latents),
            "image_embeds": told["features"],
            "indices_latents": section,
            "latents_clean": torch.cat([told["image"].to(self.dtype), near], dim=2),
            "indices_latents_clean": torch.cat([at_image, at_near]),
            "latents_history_2x": far,
            "indices_latents_history_2x": at_far,
            "latents_history_4x": farther,
            "indices_latents_history_4x": at_farther,
        }

    def leaving(self, prediction: Tensor, latents: Tensor) -> Tensor:
        """fp32, with 0 in the first frame."""
        velocity = prediction.float()
        return torch.cat([torch.zeros_like(velocity[:, :, :1]), velocity], dim=2)
