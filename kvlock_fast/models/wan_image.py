"""Wan image-to-video: 2.1 (also of a first and a last frame), 2.2 A14B and 2.2 TI2V-5B.

Facts of diffusers' `WanImageToVideoPipeline`: as `WanPipeline` (wan.py), and the transformer is told of the picture in
one of two ways. 2.1 and A14B take more channels: after the latents, which pixel frames are given, one channel for each
of a latent frame's, then the latents of a video of those frames and grey; 2.1 takes the picture through a CLIP encoder
too, as tokens in front of the text, which is then of 512 tokens (its attention counts back from there), and with
`pos_embed_seq_len` the last frame beside the first. TI2V-5B (`expand_timesteps`) has the picture's latent in the place
of the first frame's, at time 0, and again in the end.

The picture is the source's first frame, for the source and the edit alike. So the edit begins as the source does:
TI2V-5B cannot change its first frame at all, the others hardly will.
"""

from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.models.autoencoder import picture
from kvlock_fast.models.base import without_first_frame
from kvlock_fast.models.wan import WAN, WanModel

WAN_IMAGE = replace(WAN, family="wan-i2v")
TEXT_LENGTH = 512
"""Tokens of text behind those of a picture, as diffusers' attention counts them."""


class WanImageModel(WanModel):
    """A diffusers `WanImageToVideoPipeline`."""

    arch = WAN_IMAGE
    told_of_frames = True

    def check(self) -> None:
        pipe, channels, latent = self.pipe, self.config.in_channels, self.latent_channels
        wanted = latent if self.holds_first else 2 * latent + pipe.vae.config.scale_factor_temporal
        if channels != wanted:
            raise InputError(
                f"the transformer takes {channels} channels, and image-to-video with this autoencoder has {wanted}"
            )
        if self.sees_picture and (pipe.image_encoder is None or pipe.image_processor is None):
            raise InputError("the transformer takes a picture's features, and the pipeline has no image_encoder")

    @property
    def holds_first(self) -> bool:
        """Whether the first latent frame is the picture's, all along."""
        return bool(self.pipe.config.get("expand_timesteps"))

    @property
    def sees_picture(self) -> bool:
        """Whether the (first) transformer takes the picture's features beside the text."""
        return self.config.image_dim is not None

    @property
    def sees_last(self) -> bool:
        """Whether it takes those of the last frame too."""
        return self.sees_picture and self.config.pos_embed_seq_len is not None

    @property
    def text_length(self) -> int:
        return TEXT_LENGTH if self.sees_picture else super().text_length

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C]; shown [n, c, T or 1, h, w] fp32, of the given frames; features [n, pictures, N, C]."""
        told = {"shown": self._made((given.frames,), "shown", lambda: self._show(given))}
        if self.sees_picture:
            told["features"] = self._made((given.frames,), "features", lambda: self._look(given))
        return self.text_and(prompts, **told)

    def _show(self, given: Given) -> Tensor:
        """The mask of given frames and their latents [1, c, T, h, w], or the first frame's latent [1, C, 1, h, w]."""
        frames, height, width = given.frames.shape[:3]
        pictures = [
            self.pipe.video_processor.preprocess(picture, height=height, width=width).to(self.device, torch.float32)
            for picture in self._pictures(given)
        ]
        last = {"last_image": pictures[1]} if self.sees_last else {}
        noise = torch.empty(0, device=self.device)  # given, so that none is drawn
        _, shown, *_ = self.pipe.prepare_latents(
            pictures[0], 1, self.latent_channels, height, width, frames, torch.float32, self.device, None, noise, **last
        )
        return shown

    def _look(self, given: Given) -> Tensor:
        """The pictures' features [1, pictures, N, C] in the transformer's dtype."""
        pictures = self._pictures(given)
        features = self.pipe.encode_image(pictures if self.sees_last else pictures[0], self.device)
        return features.to(self.transformers[0].dtype)[None]

    def _pictures(self, given: Given) -> list[Image.Image]:
        """The first frame, and the last one where the model takes it."""
        return [picture(given.frames[i]) for i in ((0, -1) if self.sees_last else (0,))]

    def entering(self, latents: Tensor, told: Conditioning) -> Tensor:
        """The latents [B, ...] with what is shown: behind them, or in the place of the first frame."""
        if self.holds_first:
            return torch.cat([told["shown"], latents[:, :, 1:]], dim=2)
        return torch.cat([latents, told["shown"]], dim=1)

    def beside(self, told: Conditioning, latents: Tensor) -> dict[str, Any]:
        """Text, and the pictures' features one below the other."""
        named = super().beside(told, latents)
        if "features" in told:
            named["encoder_hidden_states_image"] = told["features"].flatten(0, 1)
        return named

    def token_times(self, timestep: Tensor, latents: Tensor, computed: Tensor | None = None) -> Tensor:
        """A timestep a token; those of the first frame are at 0."""
        tokens = self.tokens(latents)
        first = tokens // (latents.shape[2] // self.geometry.patch_size[0])
        held = torch.arange(tokens, device=latents.device) < first
        held = held if computed is None else held.index_select(0, computed)
        return torch.where(held, 0.0, timestep.float()).expand(latents.shape[0], -1)

    def may_change(self, pixels: Tensor) -> Tensor:
        return without_first_frame(pixels) if self.holds_first else pixels

    def last_latents(self, latents: Tensor, told: Conditioning) -> Tensor:
        """The last latents [B, C, T, h, w], the first frame as it was shown."""
        return self.entering(latents, told) if self.holds_first else latents
