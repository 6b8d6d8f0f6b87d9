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

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.errors import InputError
from kvlock_fast.masks import Geometry
from kvlock_fast.models.autoencoder import decode_images, encode_image
from kvlock_fast.models.base import PipelineModel


def shift_of(scheduler: Any, tokens: int) -> float:
    """mu: the shift of a schedule by resolution, as several families' pipelines give it to their scheduler.

    It lies on a straight line through two lengths of sequence, by the scheduler's config: diffusers' `calculate_shift`,
    the SD3 paper (arXiv 2403.03206), section 5.3.2.
    """
    config = scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return tokens * slope + (low - slope * few)


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


ATTENTION = r"(single_)?transformer_blocks\.\d+\.attn"
"""The names of the self-attentions in both kinds of blocks."""


class PackedModel(ImageModel):
    """What the loop needs of a diffusers pipeline that makes images as FLUX.1's does.

    Other families took this way over with other texts, positions and guidance. Latents are drawn and kept in the text's
    dtype, and packed 2 x 2 to a token. The sigmas are evenly spaced, then shifted by the number of tokens where the
    scheduler asks for it. Timesteps are given divided by 1000. Blocks with two streams project text and image apart,
    blocks with one stream together, the text first. Each branch of guidance is a forward of its own.
    """

    shifts_by_size = True
    most_words = 512
    """What the pipeline pads a prompt to."""

    def __init__(self, pipe: Any):
        """Raises InputError for a pipeline of another kind."""
        super().__init__(pipe)
        if self.config.in_channels != 4 * pipe.vae.config.latent_channels:
            raise InputError("the model takes an image beside the text (as FLUX.1 Fill), which is not supported")
        if getattr(self.transformers[0], "encoder_hid_proj", None) is not None:
            raise InputError("the model has an IP-Adapter loaded: unload_ip_adapter() first")
        self._positions: dict[tuple, tuple[Tensor, Tensor]] = {}

    def words(self, tokenizer: Any) -> int:
        """How many tokens prompts are padded to: fewer than usual where the tokenizer says so."""
        return min(self.most_words, int(tokenizer.model_max_length))

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Evenly spaced sigmas, and the shift for so many tokens."""
        return even_sigmas(self.pipe.scheduler, num_steps, self.tokens(height, width))

    def told_beside(self, told: Conditioning, tokens: int) -> dict[str, Tensor]:
        """What the transformer is given beside latents, time, text and positions, of an image of so many tokens."""
        return {}

    def text_positions(self, length: int) -> Tensor:
        """[L, 3] of so many text tokens: none, unless a family says otherwise."""
        return torch.zeros(length, 3, dtype=self.latents_dtype)

    def image_positions(self, height: int, width: int) -> Tensor:
        """[S, 3] of an image of so many latents."""
        return self.pipe._prepare_latent_image_ids(1, height // 2, width // 2, self.device, self.latents_dtype)

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, 1, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        dtype, (height, width) = self.latents_dtype, latents.shape[3:]
        rows = self.packed(latents.to(dtype))
        text_ids, image_ids = self._ids(told["text"].shape[1], height, width)
        prediction = self.transformers[which](
            hidden_states=rows,
            timestep=timestep.expand(len(rows)).to(dtype) / 1000,
            encoder_hidden_states=told["text"],
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
            **self.told_beside(told, rows.shape[1]),
        )[0]
        return self.unpacked(prediction, height, width)

    def packed(self, latents: Tensor) -> Tensor:
        """Latents [B, C, 1, h, w] as tokens [B, S, 4 C]."""
        count, channels, _, height, width = latents.shape
        return self.pipe._pack_latents(latents[:, :, 0].contiguous(), count, channels, height, width)

    def unpacked(self, rows: Tensor, height: int, width: int) -> Tensor:
        """Tokens [B, S, 4 C] as latents [B, C, 1, h, w]."""
        stride = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(rows, height * stride, width * stride, stride)[:, :, None]

    def _ids(self, text: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Positions of text and image. Kept: captured steps read them where they are."""
        key = text, height, width, self.device, self.latents_dtype
        if key not in self._positions:
            ids = self.text_positions(text), self.image_positions(height, width)
            self._positions[key] = tuple(x.to(self.device) for x in ids)
        return self._positions[key]
