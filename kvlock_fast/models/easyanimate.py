"""The EasyAnimate family, text-to-video.

Facts of diffusers' `EasyAnimatePipeline`: text and video share the self-attention, the text first, with projections of
its own in the first blocks and the video's in those after; a text has always as many tokens as the pipeline fills it up
to, all of which count; both branches of guidance are one forward, unconditional rows first; noise, latents, timesteps
and predictions are in the model's dtype; the schedule's shift is by 1 whatever the size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.masks import Geometry
from kvlock_fast.models.base import PipelineModel

EASYANIMATE = ArchSpec(
    family="easyanimate",
    transformers=("EasyAnimateTransformer3DModel",),
    attention=r"transformer_blocks\.\d+\.attn1",
    token_dim=2,
    text="prefix",
    one_call=True,
    blocks=("EasyAnimateTransformerBlock",),
)


class EasyAnimateModel(PipelineModel):
    """What the loop needs of a diffusers `EasyAnimatePipeline`."""

    arch = EASYANIMATE
    shifts_by_size = True
    why_not_captured = "it makes its tokens' positions on the host in every forward"

    def __init__(self, pipe: Any):
        """Raises InputError for a pipeline of another kind."""
        super().__init__(pipe)
        if self.config.in_channels != pipe.vae.config.latent_channels:
            raise InputError("the model takes an image or a control video beside the text: that is not supported")

    @property
    def geometry(self) -> Geometry:
        vae, patch = self.pipe.vae, self.config.patch_size
        return Geometry(vae.temporal_compression_ratio, vae.spatial_compression_ratio, (1, patch, patch))

    @property
    def latents_dtype(self) -> torch.dtype:
        """Of the latents between steps, in EasyAnimatePipeline."""
        return self.transformers[0].dtype

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """The shift, for a scheduler that takes one."""
        return {"mu": 1} if isinstance(self.pipe.scheduler, FlowMatchEulerDiscreteScheduler) else {}

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """[len(prompts), L, C] in the transformer's dtype."""
        text, *_ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=self.device)
        return text.to(self.transformers[0].dtype)

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """[1, C, T, h, w] fp32, as EasyAnimatePipeline draws it: in the model's dtype."""
        return randn_tensor(shape, generator=generator, device=device, dtype=self.latents_dtype).float()

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, T, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        transformer = self.transformers[which]
        return transformer(
            latents.to(transformer.dtype),
            timestep.expand(len(latents)).to(transformer.dtype),
            encoder_hidden_states=told["text"],
            return_dict=False,
        )[0][:, : latents.shape[1]]
