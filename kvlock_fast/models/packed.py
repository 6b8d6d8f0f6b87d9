"""FLUX.1's way of making images, which other families took over with other texts, positions and guidance.

Latents are drawn and kept in the text's dtype, and packed 2 x 2 to a token; the sigmas are evenly spaced, then shifted
by the number of tokens where the scheduler asks for it; timesteps are given divided by 1000. Blocks with two streams
project text and image apart, blocks with one stream together, the text first. Each branch of guidance is a forward of
its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.errors import InputError
from kvlock_fast.models.image import ImageModel, even_sigmas

ATTENTION = r"(single_)?transformer_blocks\.\d+\.attn"
"""The names of the self-attentions in both kinds of blocks."""


class PackedModel(ImageModel):
    """What the loop needs of such a diffusers pipeline."""

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
