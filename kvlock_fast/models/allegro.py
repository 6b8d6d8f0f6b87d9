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
from diffusers import AllegroPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.masks import Geometry
from kvlock_fast.models.autoencoder import as_pixels, encode_mode, tiling
from kvlock_fast.models.base import PipelineModel

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
    """What the loop needs of a diffusers `AllegroPipeline`."""

    arch = ALLEGRO

    def __init__(self, pipe: Any):
        """Raises InputError for a pipeline of another kind."""
        super().__init__(pipe)
        self._rotary: dict[tuple, tuple] = {}

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
    def latents_dtype(self) -> torch.dtype:
        """Of the latents between steps, in AllegroPipeline."""
        return self.transformers[0].dtype

    @property
    def _cleans(self) -> bool:
        """Whether diffusers cleans prompts: as AllegroPipeline does, where there is what it needs."""
        return DEFAULTS["clean_caption"].default and is_bs4_available() and is_ftfy_available()

    def facts(self, given: Given) -> dict[str, Any]:
        """What decides, beside weights and words, what a forward of the source gives."""
        return {"clean_caption": self._cleans}

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, 1, L, C] in the transformer's dtype, mask [n, L] of its tokens."""
        length = min(DEFAULTS["max_sequence_length"].default, int(self.pipe.tokenizer.model_max_length))
        text, mask, _, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=length,
            clean_caption=self._cleans, device=self.device,
        )  # fmt: skip
        return Conditioning(text=text.to(self.transformers[0].dtype)[:, None], mask=mask)

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """[1, C, T, h, w] fp32, as AllegroPipeline draws it: in the model's dtype."""
        return randn_tensor(shape, generator=generator, device=device, dtype=self.latents_dtype).float()

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
            latents = encode_mode(vae, frames, self.device) * vae.config.scaling_factor
        return latents[:, :, : sizes[0], : sizes[1], : sizes[2]].contiguous()

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        """Normalised latents [B, C, T, h, w] of so many frames to uint8 [B, F, H, W, 3] on the CPU; always in tiles."""
        vae, geometry = self.pipe.vae, self.geometry
        strides = geometry.temporal_stride, geometry.spatial_stride, geometry.spatial_stride
        sizes = [size * stride for size, stride in zip(latents.shape[2:], strides, strict=True)]
        filled = [_covered(*of) for of in zip(sizes, vae.kernel, vae.stride, strict=True)]
        more = [(size - old) // stride for size, old, stride in zip(filled, sizes, strides, strict=True)]
        latents = F.pad(latents.float() / vae.config.scaling_factor, (0, more[2], 0, more[1], 0, more[0]), "replicate")
        videos = []
        with tiling(vae):
            for one in latents.to(vae.dtype).split(1):
                video = vae.decode(one, return_dict=False)[0][:, :frames, :, : sizes[1], : sizes[2]]
                videos.append(as_pixels(video))
        return torch.cat(videos).permute(0, 1, 3, 4, 2)

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The noise [B, C, T, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        transformer = self.transformers[which]
        return transformer(
            hidden_states=latents.to(transformer.dtype),
            encoder_hidden_states=told["text"],
            encoder_attention_mask=told["mask"],
            timestep=timestep.expand(len(latents)),
            image_rotary_emb=self.rotary(latents),
            return_dict=False,
        )[0]

    def rotary(self, latents: Tensor) -> tuple:
        """Tables of cosines and sines along each axis, and the tokens' positions in them.

        Kept for good: captured steps read them where they are.
        """
        frames, height, width = latents.shape[2:]
        key = frames, height, width, latents.device
        if key not in self._rotary:
            stride = self.geometry.spatial_stride
            self._rotary[key] = AllegroPipeline._prepare_rotary_positional_embeddings(
                self.pipe, 1, height * stride, width * stride, frames, latents.device
            )
        return self._rotary[key]


def _covered(size: int, tile: int, stride: int) -> int:
    """The least size from `size` on that tiles of this size and stride cover whole."""
    return tile + max(0, -(-(size - tile) // stride)) * stride
