"""The EasyAnimate family, text-to-video.

Facts of diffusers' `EasyAnimatePipeline`: text and video share the self-attention, the text first, with projections of
its own in the first blocks and the video's in those after; a text has always as many tokens as the pipeline fills it up
to, all of which count; both branches of guidance are one forward, unconditional rows first; noise, latents, timesteps
and predictions are in the model's dtype; the schedule's shift is by 1 whatever the size.
"""

from collections.abc import Mapping
from typing import Any

from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
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
    """A diffusers `EasyAnimatePipeline`."""

    arch = EASYANIMATE
    shifts_by_size = True
    why_not_captured = "it makes its tokens' positions on the host in every forward"
    in_model_dtype = True
    time_in_model_dtype = True

    def check(self) -> None:
        if self.config.in_channels != self.pipe.vae.config.latent_channels:
            raise InputError("the model takes an image or a control video beside the text: that is not supported")

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """The shift, for a scheduler that takes one."""
        return {"mu": 1} if isinstance(self.pipe.scheduler, FlowMatchEulerDiscreteScheduler) else {}

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        return self.words(prompts)[0].to(self.dtype)

    def leaving(self, prediction: Tensor, latents: Tensor) -> Tensor:
        return prediction[:, : latents.shape[1]]
