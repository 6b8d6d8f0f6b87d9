"""The Allegro family, text-to-video.

Facts of diffusers' `AllegroPipeline`: the autoencoder is not causal, four frames are one latent frame, and works in
tiles alone; a text's mask takes its filling out of the cross-attention; both branches of guidance are one forward,
unconditional rows first; noise, latents and predictions are in the model's dtype. Its checkpoints ship a scheduler that
adds noise at every step, for which DDIM is taken.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.allegro.pipeline_allegro import AllegroPipeline
from diffusers.utils.import_utils import is_bs4_available, is_ftfy_available
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.masks import Geometry
from kvlock_fast.models.autoencoder import decode_each, tiling
from kvlock_fast.models.base import MASKED_TEXT, PipelineModel

ALLEGRO = ArchSpec(
    family="allegro",
    transformers=("AllegroTransformer3DModel",),
    attention=r"transformer_blocks\.\d+\.attn1",
    flow=False,
    one_call=True,
    blocks=("AllegroTransformerBlock",),
)
DEFAULTS = inspect.signature(AllegroPipeline.__call__).parameters


class AllegroModel(PipelineModel):
    """A diffusers `AllegroPipeline`."""

    arch = ALLEGRO
    in_model_dtype = True
    told_names = MASKED_TEXT

    @property
    def geometry(self) -> Geometry:
        vae, config = self.pipe.vae, self.config
        patch = config.patch_size_t, config.patch_size, config.patch_size
        return Geometry(vae.config.temporal_compression_ratio, vae.spatial_compression_ratio, patch, causal=False)

    @property
    def usual_extent(self) -> tuple[int, int, int]:
        """Frames, height and width of a call of AllegroPipeline that gives none."""
        config, geometry = self.config, self.geometry
        space = geometry.spatial_stride
        frames = config.sample_frames * geometry.temporal_stride
        return frames, config.sample_height * space, config.sample_width * space

    @property
    def _cleans(self) -> bool:
        """Whether diffusers cleans prompts: as AllegroPipeline does, where there is what it needs."""
        return DEFAULTS["clean_caption"].default and is_bs4_available() and is_ftfy_available()

    def facts(self, given: Given) -> dict[str, Any]:
        return {"clean_caption": self._cleans}

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, 1, L, C] in the transformer's dtype, mask [n, L] of its tokens."""
        most = min(DEFAULTS["max_sequence_length"].default, int(self.pipe.tokenizer.model_max_length))
        told = self.masked_text(prompts, most, clean_caption=self._cleans)
        return told.replace(text=told["text"][:, None])

    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [F, H, W, 3] to normalised latents [1, C, T, h, w] fp32, by the posterior's mode.

        What the tiles do not cover is filled up by repeating the edge, and cut off again.
        """
        vae, patch = self.pipe.vae, self.geometry.spatial_stride
        sizes = frames.shape[0] // self.geometry.temporal_stride, *(size // patch for size in frames.shape[1:3])
        filled = [_covered(*of) for of in zip(frames.shape[:3], vae.kernel, vae.stride, strict=True)]
        for dim, size in enumerate(filled):
            frames = frames.index_select(dim, torch.arange(size).clamp_max(frames.shape[dim] - 1))
        with tiling(vae):
            latents = super().encode_video(frames)
        return latents[:, :, : sizes[0], : sizes[1], : sizes[2]].contiguous()

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        """Normalised latents [B, C, T, h, w] of so many frames to uint8 [B, F, H, W, 3] on the CPU; always in tiles."""
        vae, geometry = self.pipe.vae, self.geometry
        strides = geometry.temporal_stride, geometry.spatial_stride, geometry.spatial_stride
        sizes = [size * stride for size, stride in zip(latents.shape[2:], strides, strict=True)]
        filled = [_covered(*of) for of in zip(sizes, vae.kernel, vae.stride, strict=True)]
        more = [(size - old) // stride for size, old, stride in zip(filled, sizes, strides, strict=True)]
        latents = F.pad(latents.float() / vae.config.scaling_factor, (0, more[2], 0, more[1], 0, more[0]), "replicate")
        videos = decode_each(vae, latents, tiled=True)  # [B, 3, H, W, F]: this autoencoder has frames before channels
        return videos[:, :, : sizes[1], : sizes[2], :frames].permute(0, 4, 2, 3, 1)

    def beside(self, told: Conditioning, latents: Tensor) -> dict[str, Any]:
        """Tables of cosines and sines along each axis, and the tokens' positions in them, go along."""
        (frames, height, width), stride = latents.shape[2:], self.geometry.spatial_stride
        rotary = self.kept(
            (frames, height, width, latents.device),
            lambda: AllegroPipeline._prepare_rotary_positional_embeddings(
                self.pipe,  # pyright: ignore[reportArgumentType]
                1,
                height * stride,
                width * stride,
                frames,
                latents.device,
            ),
        )
        return {**super().beside(told, latents), "image_rotary_emb": rotary}


def _covered(size: int, tile: int, stride: int) -> int:
    """The least size from `size` on that tiles of this size and stride cover whole."""
    return tile + max(0, -(-(size - tile) // stride)) * stride
