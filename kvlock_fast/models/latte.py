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
from diffusers import LattePipeline
from diffusers.utils import is_bs4_available, is_ftfy_available
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.masks import Geometry
from kvlock_fast.models.autoencoder import as_pixels, encode_pictures, tiling
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
"""Of what a text was filled up with, among attention's scores, as diffusers' pipelines have it."""


class LatteModel(PipelineModel):
    """What the loop needs of a diffusers `LattePipeline`."""

    arch = LATTE

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
    def latents_dtype(self) -> torch.dtype:
        """Of the latents between steps, in LattePipeline."""
        return self.transformers[0].dtype

    @property
    def _cleans(self) -> bool:
        """Whether diffusers cleans prompts: as LattePipeline does, where there is what it needs."""
        return DEFAULTS["clean_caption"].default and is_bs4_available() and is_ftfy_available()

    def facts(self, given: Given) -> dict[str, Any]:
        """What decides, beside weights and words, what a forward of the source gives."""
        return {"clean_caption": self._cleans}

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] in the transformer's dtype, of L tokens at most; with a mask [n, L] where some have fewer."""
        return Conditioning.cat([self._told(prompt, "")[0] for prompt in prompts])

    def condition_negative(self, prompt: str, prompts: list[str], given: Given) -> Conditioning:
        """Cut to as many tokens as each of the prompts has."""
        return Conditioning.cat([self._told(other, prompt)[1] for other in prompts])

    def _told(self, prompt: str, negative: str) -> tuple[Conditioning, Conditioning]:
        """Of one prompt with a negative one."""
        both = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=True, negative_prompt=negative, clean_caption=self._cleans,
            device=self.device,
        )  # fmt: skip
        texts = (text.to(self.transformers[0].dtype) for text in both)
        return tuple(Conditioning("text", text=text) for text in texts)

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """[1, C, T, h, w] fp32, as LattePipeline draws it: in the model's dtype."""
        return randn_tensor(shape, generator=generator, device=device, dtype=self.latents_dtype).float()

    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [F, H, W, 3] to normalised latents [1, C, T, h, w] fp32, by the posterior's mode."""
        latents = encode_pictures(self.pipe.vae, frames, self.device, FRAMES_AT_ONCE)
        return latents * self.pipe.vae.config.scaling_factor

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        """Normalised latents [B, C, T, h, w] of so many frames to uint8 [B, F, H, W, 3] on the CPU."""
        vae = self.pipe.vae
        pictures = (latents.float() / vae.config.scaling_factor).to(vae.dtype).transpose(1, 2)
        with tiling(vae, tiled):
            decoded = [
                as_pixels(vae.decode(chunk, return_dict=False)[0])
                for chunk in pictures.flatten(0, 1).split(FRAMES_AT_ONCE)
            ]
        return torch.cat(decoded).unflatten(0, (len(latents), frames)).permute(0, 1, 3, 4, 2)

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The noise [B, C, T, h, w] in the transformer's dtype, at latents [B, ...], timestep [].

        Raises InputError for other numbers of frames than the transformer has positions for.
        """
        transformer, (rows, channels, frames) = self.transformers[which], latents.shape[:3]
        if frames != self.config.video_length:
            raise InputError(
                f"the model takes {self.config.video_length} frames at once, and was given {frames}: "
                f"give clip_frames {self.config.video_length}"
            )
        below = None
        if "mask" in told:
            below = torch.where(told["mask"], 0.0, FAR_BELOW).to(transformer.dtype)
            below = below.repeat_interleave(frames, 0, output_size=rows * frames)[:, None]
        return transformer(
            hidden_states=latents.to(transformer.dtype),
            encoder_hidden_states=told["text"],
            encoder_attention_mask=below,
            timestep=timestep.expand(rows),
            return_dict=False,
        )[0][:, :channels]
