"""The Latte family, text-to-video.

Facts of diffusers' `LattePipeline`: every second block's self-attention sees one frame, the others one place in all
frames; frames are encoded one by one; a clip has as many frames as the transformer has positions in time; the
transformer may predict a variance beside the noise, which is left; a text is cut to its own tokens, and the negative
one to as many (of several prompts in one call diffusers' own are not cut: here each is as it is alone); both branches
of guidance are one forward, unconditional rows first; noise, latents and predictions are in the model's dtype.
"""

import inspect
from typing import Any

import torch
from diffusers.pipelines.latte.pipeline_latte import LattePipeline
from diffusers.utils.import_utils import is_bs4_available, is_ftfy_available
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.masks import Geometry
from kvlock_fast.models.autoencoder import decode_each, encode_pictures
from kvlock_fast.models.base import PipelineModel

LATTE = ArchSpec(
    family="latte",
    transformers=("LatteTransformer3DModel",),
    attention=r"(temporal_)?transformer_blocks\.\d+\.attn1",
    flow=False,
    one_call=True,
    blocks=("BasicTransformerBlock",),
    by_frame=r"transformer_blocks\.\d+\.attn1",
    by_place=r"temporal_transformer_blocks\.\d+\.attn1",
)
DEFAULTS = inspect.signature(LattePipeline.__call__).parameters
FRAMES_AT_ONCE = DEFAULTS["decode_chunk_size"].default
FAR_BELOW = -10000.0
"""Attention's score for the tokens that a text was filled up with, as diffusers' pipelines have it."""


class LatteModel(PipelineModel):
    """A diffusers `LattePipeline`."""

    arch = LATTE
    in_model_dtype = True

    @property
    def geometry(self) -> Geometry:
        frames, patch = self.config.video_length, self.config.patch_size
        return Geometry(
            1, self.pipe.vae_scale_factor, (1, patch, patch), causal=False, most_tokens=(frames, None, None),
            latents_together=frames,
        )  # fmt: skip

    @property
    def usual_extent(self) -> tuple[int, None, None]:
        """Frames: as many as the model takes."""
        return self.config.video_length, None, None

    @property
    def _cleans(self) -> bool:
        """Whether diffusers cleans prompts: as LattePipeline does, where there is what it needs."""
        return DEFAULTS["clean_caption"].default and is_bs4_available() and is_ftfy_available()

    def facts(self, given: Given) -> dict[str, Any]:
        return {"clean_caption": self._cleans}

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] in the transformer's dtype, of L tokens at most; with a mask [n, L] where some have fewer."""
        return Conditioning.cat([self._told(prompt, "")[0] for prompt in prompts])

    def condition_negative(self, prompt: str, prompts: list[str], given: Given) -> Conditioning:
        """Texts cut to as many tokens as each of the prompts has."""
        return Conditioning.cat([self._told(other, prompt)[1] for other in prompts])

    def _told(self, prompt: str, negative: str) -> list[Conditioning]:
        """Conditioning for one prompt and a negative one."""
        both = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=True, negative_prompt=negative, clean_caption=self._cleans,
            device=self.device,
        )  # fmt: skip
        return [Conditioning("text", text=text.to(self.dtype)) for text in both]

    def encode_video(self, frames: Tensor) -> Tensor:
        return self._normalised(encode_pictures(self.pipe.vae, frames, self.device, FRAMES_AT_ONCE))

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        pictures = latents.float() / self.pipe.vae.config.scaling_factor
        pictures = pictures.to(self.pipe.vae.dtype).transpose(1, 2).flatten(0, 1)
        return decode_each(self.pipe.vae, pictures, tiled, FRAMES_AT_ONCE).unflatten(0, (len(latents), frames))

    def entering(self, latents: Tensor, told: Conditioning) -> Tensor:
        """Raises InputError for other numbers of frames than the transformer has positions for."""
        known, frames = self.config.video_length, latents.shape[2]
        if frames != known:
            raise InputError(
                f"the model takes {known} frames at once, and was given {frames}: give clip_frames {known}"
            )
        return latents

    def beside(self, told: Conditioning, latents: Tensor) -> dict[str, Any]:
        """The text's mask goes along for each frame."""
        below, frames = None, latents.shape[2]
        if "mask" in told:
            below = torch.where(told["mask"], 0.0, FAR_BELOW).to(self.dtype)
            below = below.repeat_interleave(frames, 0, output_size=len(latents) * frames)[:, None]
        return {**super().beside(told, latents), "encoder_attention_mask": below}

    def leaving(self, prediction: Tensor, latents: Tensor) -> Tensor:
        return prediction[:, : latents.shape[1]]
