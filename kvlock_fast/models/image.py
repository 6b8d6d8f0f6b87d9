"""What image families have in common: an image is a video of one frame.

Their autoencoders know no time ([B, C, h, w]), or are those of videos, given one frame; their transformers mostly take
the latents as a sequence, a patch of 2 x 2 a token.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from kvlock_fast.errors import InputError
from kvlock_fast.masks import Geometry
from kvlock_fast.models.pipeline_model import PipelineModel
from kvlock_fast.models.pixels import decode_images, encode_image
from kvlock_fast.models.shifts import shift_of


class ImageModel(PipelineModel):
    """What the loop needs of a diffusers pipeline that makes images, as far as families agree.

    Latents are the autoencoder's, shifted by its `shift_factor` and times its `scaling_factor`.
    """

    patch = 2
    """Latents a token, down and across."""
    shifted = True
    """Whether the pipeline looks at the autoencoder's `shift_factor`."""

    @property
    def geometry(self) -> Geometry:
        patch = (1, self.patch, self.patch)
        return Geometry(1, self.pipe.vae_scale_factor, patch, most_tokens=self.most_tokens, one_frame=True)

    @property
    def most_tokens(self) -> tuple[None, int, int] | None:
        """The most tokens (in time, down, across) that the model knows positions of; None: any number."""
        return None

    @property
    def latents_dtype(self) -> torch.dtype:
        """Of the latents between steps: that of the text, which has to be the transformer's."""
        return self.transformers[0].dtype

    def tokens(self, height: int, width: int) -> int:
        """Of an image of so many pixels."""
        _, down, across = self.geometry.token_grid(1, height, width)
        return down * across

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """[1, C, 1, h, w] fp32, as the family's pipeline draws it: in the model's dtype."""
        return randn_tensor(shape, generator=generator, device=device, dtype=self.latents_dtype).float()

    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [1, H, W, 3] to normalised latents [1, C, 1, h, w] fp32, by the posterior's mode."""
        shift, scale = self._latent_statistics()
        return ((encode_image(self.pipe.vae, frames, self.device) - shift) * scale)[:, :, None].contiguous()

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        """Normalised latents [B, C, 1, h, w] to uint8 [B, 1, H, W, 3] on the CPU."""
        shift, scale = self._latent_statistics()
        return decode_images(self.pipe.vae, latents[:, :, 0].float() / scale + shift, tiled)[:, None]

    def _latent_statistics(self) -> tuple[float, float]:
        """shift_factor and scaling_factor."""
        config = self.pipe.vae.config
        return (config.get("shift_factor") or 0.0) if self.shifted else 0.0, config.scaling_factor


def even_sigmas(scheduler: Any, num_steps: int, tokens: int) -> Mapping[str, Any]:
    """What FLUX's pipeline gives to `set_timesteps`, and those that came after it: evenly spaced sigmas, and mu.

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
