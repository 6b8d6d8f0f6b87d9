"""Base of the image families: an image is a video of one frame.

Their autoencoders know no time ([B, C, h, w]), or are those of videos, given one frame; their transformers mostly take
the latents as a sequence, a patch of 2 x 2 a token.
"""

import inspect
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.errors import InputError
from kvlock_fast.masks import Geometry
from kvlock_fast.models.autoencoder import decode_each, encode_pictures
from kvlock_fast.models.base import PipelineModel
from kvlock_fast.models.protocols import Scheduler, Tokenizer
from kvlock_fast.models.schedulers import shift_of


class ImageModel(PipelineModel):
    """A diffusers pipeline that makes images.

    Latents are the autoencoder's, shifted by its `shift_factor` and times its `scaling_factor`. The transformer takes
    and makes them as [B, C, h, w]. With `shifts_by_size`, the schedule is that of `even_sigmas`.
    """

    in_model_dtype = True
    shifted: bool = True
    """Whether the pipeline looks at the autoencoder's `shift_factor`."""
    patch: int | None = None
    """Latents a token, down and across; None: as the transformer's config says."""

    @property
    def geometry(self) -> Geometry:
        patch = self.patch or self.config.patch_size
        stride = self.pipe.vae_scale_factor
        return Geometry(1, stride, (1, patch, patch), most_tokens=self.most_tokens, one_frame=True)

    @property
    def most_tokens(self) -> tuple[None, int, int] | None:
        """The most tokens (in time, down, across) that the model knows positions of; None: any number."""
        return None

    def tokens(self, height: int, width: int) -> int:
        """Number of tokens of an image of so many pixels."""
        return prod(self.geometry.token_grid(1, height, width))

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        if self.shifts_by_size:
            return even_sigmas(self.pipe.scheduler, num_steps, self.tokens(height, width))
        return super().timesteps_settings(num_steps, frames, height, width)

    def encode_video(self, frames: Tensor) -> Tensor:
        return self._normalised(encode_pictures(self.pipe.vae, frames, self.device))

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        return decode_each(self.pipe.vae, self._denormalised(latents)[:, :, 0], tiled)[:, None]

    def _normalised(self, latents: Tensor) -> Tensor:
        shift, scale = self._shift_and_scale()
        return (latents - shift) * scale

    def _denormalised(self, latents: Tensor) -> Tensor:
        shift, scale = self._shift_and_scale()
        return latents.float() / scale + shift

    def _shift_and_scale(self) -> tuple[float, float]:
        config = self.pipe.vae.config
        return (config.get("shift_factor") or 0.0) if self.shifted else 0.0, config.scaling_factor

    def entering(self, latents: Tensor, told: Conditioning) -> Tensor:
        return latents[:, :, 0]

    def leaving(self, prediction: Tensor, latents: Tensor) -> Tensor:
        return prediction[:, :, None]


def even_sigmas(scheduler: Scheduler, num_steps: int, tokens: int) -> Mapping[str, Any]:
    """FLUX's arguments of `set_timesteps`, and those of pipelines that came after it: evenly spaced sigmas, and mu.

    Raises InputError for a scheduler that takes no sigmas.
    """
    settings: dict[str, Any] = {"mu": shift_of(scheduler, tokens)}
    known = inspect.signature(scheduler.set_timesteps).parameters
    for name in ("sigmas", "mu"):
        if name not in known:
            kind = type(scheduler).__name__
            raise InputError(f"scheduler {kind} takes no {name}, which the model's pipeline gives to it")
    if not scheduler.config.get("use_flow_sigmas"):
        settings["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
    return settings


def padded_length(most: int, tokenizer: Tokenizer | None) -> int:
    """Number of tokens that prompts are padded to: fewer than usual where the tokenizer says so."""
    return min(most, int(getattr(tokenizer, "model_max_length", most)))


ATTENTION = r"(single_)?transformer_blocks\.\d+\.attn"
"""The names of the self-attentions in both kinds of blocks."""


class PackedModel(ImageModel):
    """A diffusers pipeline that makes images as FLUX.1's does.

    Other families took this way over with other texts, positions and guidance. Latents are drawn and kept in the text's
    dtype, and packed 2 x 2 to a token. The sigmas are evenly spaced, then shifted by the number of tokens where the
    scheduler asks for it. Timesteps are given divided by 1000. Blocks with two streams project text and image apart,
    blocks with one stream together, the text first. Each branch of guidance is a forward of its own.
    """

    patch = 2
    shifts_by_size = True
    time_in_model_dtype = True
    time_unit = 1000
    most_words: int = 512
    """Number of tokens that the pipeline pads a prompt to."""

    def check(self) -> None:
        if self.config.in_channels != 4 * self.pipe.vae.config.latent_channels:
            raise InputError("the model takes an image beside the text (as FLUX.1 Fill), which is not supported")
        if getattr(self.transformers[0], "encoder_hid_proj", None) is not None:
            raise InputError("the model has an IP-Adapter loaded: unload_ip_adapter() first")

    def text_positions(self, length: int) -> Tensor:
        """Positions [L, 3] of so many text tokens: none, unless a family says otherwise."""
        return torch.zeros(length, 3, dtype=self.dtype)

    def image_positions(self, height: int, width: int) -> Tensor:
        """Positions [S, 3] of an image of so many latents."""
        return self.pipe._prepare_latent_image_ids(1, height // 2, width // 2, self.device, self.dtype)

    def entering(self, latents: Tensor, told: Conditioning) -> Tensor:
        return self.packed(latents)

    def beside(self, told: Conditioning, latents: Tensor) -> dict[str, Any]:
        text, (height, width) = told["text"].shape[1], latents.shape[3:]
        text_ids, image_ids = self.kept(
            (text, height, width, self.device, self.dtype),
            lambda: [x.to(self.device) for x in (self.text_positions(text), self.image_positions(height, width))],
        )
        return {**super().beside(told, latents), "txt_ids": text_ids, "img_ids": image_ids}

    def leaving(self, prediction: Tensor, latents: Tensor) -> Tensor:
        return self.unpacked(prediction, *latents.shape[3:])

    def packed(self, latents: Tensor) -> Tensor:
        """Latents [B, C, 1, h, w] as tokens [B, S, 4 C]."""
        count, channels, _, height, width = latents.shape
        return self.pipe._pack_latents(latents[:, :, 0].contiguous(), count, channels, height, width)

    def unpacked(self, rows: Tensor, height: int, width: int) -> Tensor:
        """Tokens [B, S, 4 C] as latents [B, C, 1, h, w]."""
        stride = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(rows, height * stride, width * stride, stride)[:, :, None]
