"""The HunyuanVideo family, image-to-video: an edit is given the first frame of its source, and so is the source.

Facts of diffusers' `HunyuanVideoImageToVideoPipeline`, beside those of the text-to-video one: the image is among the
words, as a few hundred tokens (of a black one for the negative branch), and in the noise, of which it is a thousandth.
A transformer of kind "latent_concat" sees the image's latents as further channels of the first latent frame (the
pipeline drops that frame of what it makes; an edit keeps it). In one of kind "token_replace" the first latent frame
is the image itself at every step: an edit leaves that frame as it is.
"""

from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.models.autoencoder import picture
from kvlock_fast.models.base import without_first_frame
from kvlock_fast.models.hunyuan_video import HUNYUAN_VIDEO, TEXT_LENGTH, HunyuanVideoModel

CONCAT, REPLACE = "latent_concat", "token_replace"
IMAGE_TOKENS_EVERY = {CONCAT: 2, REPLACE: 4}
"""Stride by which the pipeline takes the image's tokens among the words."""
NOISE_SHARE = 0.999
"""Share of noise in the latents that the pipeline starts from; the rest is the image."""


class HunyuanVideoI2VModel(HunyuanVideoModel):
    """A diffusers `HunyuanVideoImageToVideoPipeline`."""

    arch = replace(HUNYUAN_VIDEO, family="hunyuan-video-i2v")
    told_of_frames = True

    @property
    def replaces(self) -> bool:
        """Whether the first latent frame is the image's."""
        return self.config.image_condition_type == REPLACE

    def _check_image(self) -> None:
        channels, config = self.pipe.vae.config.latent_channels, self.config
        expected = {CONCAT: 2 * channels + 1, REPLACE: channels}.get(config.image_condition_type)
        if config.in_channels != expected:
            raise InputError("the model takes no image beside the text: load it by HunyuanVideoPipeline")

    @property
    def time_in_model_dtype(self) -> bool:
        """The image's latents, where they stand for a frame, keep all the pipeline's in fp32."""
        return not self.replaces and super().time_in_model_dtype

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """Text, and the image's latents [n, C, 1, h, w] or, with their mask, [n, C + 1, T, h, w]."""
        every = IMAGE_TOKENS_EVERY[self.config.image_condition_type]
        return self._told(prompts, given, picture(given.frames[0]), every)

    def condition_negative(self, prompt: str, prompts: list[str], given: Given) -> Conditioning:
        """The words are told a black image, with as many of its tokens as the pipeline takes then."""
        black = Image.new("RGB", picture(given.frames[0]).size, 0)
        return self._told([prompt], given, black, IMAGE_TOKENS_EVERY[CONCAT]).expand(len(prompts))

    def _told(self, prompts: list[str], given: Given, image: Image.Image, every: int) -> Conditioning:
        texts = []
        for prompt in prompts:  # of an image each
            words = self.pipe.encode_prompt(
                image, [prompt], device=self.device, max_sequence_length=TEXT_LENGTH, image_embed_interleave=every
            )
            texts.append(self.told_words(words, given))
        latents = self._image_latents(given.frames)
        if not self.replaces:
            mask = torch.ones_like(latents[:, :1])
            latents = torch.cat([latents, mask], dim=1)
            later = latents.new_zeros(*latents.shape[:2], given.mask.latents.shape[1] - 1, *latents.shape[3:])
            latents = torch.cat([latents, later], dim=2)
        return Conditioning.cat(texts).replace(image=latents.expand(len(prompts), -1, -1, -1, -1))

    def _image_latents(self, frames: Tensor) -> Tensor:
        """Latents [1, C, 1, h, w] fp32 of the first of frames uint8 [F, H, W, 3], as the pipeline makes them."""
        image, vae = picture(frames[0]), self.pipe.vae
        pixels = self.pipe.video_processor.preprocess(image, image.height, image.width).to(self.device, vae.dtype)
        return vae.encode(pixels[:, :, None]).latent_dist.mode().float() * vae.config.scaling_factor

    def encode_video(self, frames: Tensor) -> Tensor:
        """A first frame that the model holds is encoded by itself: with others it becomes something else."""
        latents = super().encode_video(frames)
        return _with_first(self._image_latents(frames), latents) if self.replaces else latents

    def may_change(self, pixels: Tensor) -> Tensor:
        return without_first_frame(pixels) if self.replaces else pixels

    def first_latents(self, noise: Tensor, given: Given) -> Tensor:
        """The noise with a little of the image in it; the first frame is the image where it stays so."""
        image = self._image_latents(given.frames)
        share = torch.tensor([NOISE_SHARE], device=noise.device)
        mixed = noise * share + image.expand_as(noise) * (1 - share)
        return _with_first(image, mixed) if self.replaces else mixed

    def last_latents(self, latents: Tensor, told: Conditioning) -> Tensor:
        """With the image's own in the first frame, where it is the image: steps may have rounded them."""
        return _with_first(told["image"].to(latents.dtype), latents) if self.replaces else latents

    def entering(self, latents: Tensor, told: Conditioning) -> Tensor:
        if self.replaces:
            return _with_first(told["image"].to(latents.dtype), latents)
        return torch.cat([latents, told["image"]], dim=1)

    def leaving(self, prediction: Tensor, latents: Tensor) -> Tensor:
        """0 in a first frame that is the image's."""
        return _with_first(torch.zeros_like(prediction[:, :, :1]), prediction) if self.replaces else prediction


def _with_first(first: Tensor, latents: Tensor) -> Tensor:
    """Latents with another first frame."""
    return torch.cat([first, latents[:, :, 1:]], dim=2)
