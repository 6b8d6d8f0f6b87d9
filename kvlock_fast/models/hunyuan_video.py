"""The HunyuanVideo family, text-to-video.

Facts of diffusers' `HunyuanVideoPipeline`: latents are the autoencoder's times its `scaling_factor`; sigmas are evenly
spaced from 1; dual blocks see the text through projections of its own, single blocks have it behind the video, and a
text of fewer tokens than are reserved for it is masked; the model was distilled to take the guidance scale as an input
(`guidance_embeds`), else a negative prompt, where there is one, is a forward of its own; what the transformer says is
in its dtype, and so is the time that it is told, as soon as the scheduler gives latents in that dtype.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import HunyuanVideoPipeline
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.masks import Geometry
from kvlock_fast.models.base import PipelineModel

HUNYUAN_VIDEO = ArchSpec(
    family="hunyuan-video",
    transformers=("HunyuanVideoTransformer3DModel",),
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    text="suffix",
    blocks=("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
)
TEXT_LENGTH = inspect.signature(HunyuanVideoPipeline.__call__).parameters["max_sequence_length"].default
GUIDANCE_UNIT = 1000.0
"""What diffusers' pipelines multiply the guidance scale by, before the transformer embeds it."""


class HunyuanVideoModel(PipelineModel):
    """What the loop needs of a diffusers `HunyuanVideoPipeline`."""

    arch = HUNYUAN_VIDEO
    guided_if_asked = True

    def __init__(self, pipe: Any):
        """Raises InputError for a pipeline of another kind."""
        super().__init__(pipe)
        if self.config.patch_size_t != 1:
            raise InputError(
                f"the model has tokens of {self.config.patch_size_t} latent frames, which is not supported"
            )
        self._check_image()

    def _check_image(self) -> None:
        """Raise InputError for a transformer that is made for another of diffusers' pipelines."""
        if self.config.in_channels != self.pipe.vae.config.latent_channels or self.config.image_condition_type:
            raise InputError("the model takes an image beside the text: load it by HunyuanVideoImageToVideoPipeline")

    @property
    def geometry(self) -> Geometry:
        vae, patch = self.pipe.vae, self.config.patch_size
        return Geometry(vae.temporal_compression_ratio, vae.spatial_compression_ratio, (1, patch, patch))

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Evenly spaced sigmas."""
        return {"sigmas": np.linspace(1.0, 0.0, num_steps + 1)[:-1]}

    def guided(self, guidance_scale: float) -> bool:
        """Whether a negative branch is run: not where the scale is an input."""
        return guidance_scale > 1 and not self.config.guidance_embeds

    def facts(self, given: Given) -> dict[str, Any]:
        """What decides, beside weights and words, what a forward of the source gives."""
        return {"guidance_scale": given.guidance_scale} if self.config.guidance_embeds else {}

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C], mask [n, L], pooled [n, D] and guidance [n], in the transformer's dtype."""
        words = self.pipe.encode_prompt(prompts, device=self.device, max_sequence_length=TEXT_LENGTH)
        return self.told_words(*words, given)

    def told_words(self, text: Tensor, pooled: Tensor, mask: Tensor, given: Given) -> Conditioning:
        """What the pipeline's `encode_prompt` gives, and the guidance scale."""
        dtype = self.transformers[0].dtype
        guidance = torch.tensor([given.guidance_scale] * len(text), dtype=dtype, device=self.device) * GUIDANCE_UNIT
        return Conditioning(text=text.to(dtype), mask=mask.to(dtype), pooled=pooled.to(dtype), guidance=guidance)

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, T, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        transformer = self.transformers[which]
        return transformer(
            hidden_states=latents.to(transformer.dtype),
            timestep=self.as_told(timestep).expand(len(latents)),
            encoder_hidden_states=told["text"],
            encoder_attention_mask=told["mask"],
            pooled_projections=told["pooled"],
            guidance=told["guidance"] if self.config.guidance_embeds else None,
            return_dict=False,
        )[0]

    def as_told(self, timestep: Tensor) -> Tensor:
        """A timestep rounded as the latents of the pipeline are after a step: of Euler to the prediction's dtype."""
        euler = type(self.pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
        return timestep.to(self.transformers[0].dtype) if euler else timestep
