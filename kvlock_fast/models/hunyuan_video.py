"""The HunyuanVideo family, text-to-video.

Facts of diffusers' `HunyuanVideoPipeline`: latents are the autoencoder's times its `scaling_factor`; sigmas are evenly
spaced from 1; dual blocks see the text through projections of its own, single blocks have it behind the video, and a
text of fewer tokens than are reserved for it is masked; the model was distilled to take the guidance scale as an input
(`guidance_embeds`), else a negative prompt, where there is one, is a forward of its own; what the transformer says is
in its dtype, and so is the time that it is told, as soon as the scheduler gives latents in that dtype.
"""

import inspect

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.base import MASKED_TEXT, PipelineModel

HUNYUAN_VIDEO = ArchSpec(
    family="hunyuan-video",
    transformers=("HunyuanVideoTransformer3DModel",),
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    text="suffix",
    blocks=("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
)
TEXT_LENGTH = inspect.signature(HunyuanVideoPipeline.__call__).parameters["max_sequence_length"].default
GUIDANCE_UNIT = 1000.0
"""Factor of the guidance scale in diffusers' pipelines, before the transformer embeds it."""


class HunyuanVideoModel(PipelineModel):
    """A diffusers `HunyuanVideoPipeline`."""

    arch = HUNYUAN_VIDEO
    guided_if_asked = True
    evenly_spaced = True
    told_names = MASKED_TEXT | {"pooled_projections": "pooled", "guidance": "guidance"}

    def check(self) -> None:
        frames = self.config.patch_size_t
        if frames != 1:
            raise InputError(f"the model has tokens of {frames} latent frames, which is not supported")
        self._check_image()

    def _check_image(self) -> None:
        """Raise InputError for a transformer that is made for another of diffusers' pipelines."""
        if self.config.in_channels != self.pipe.vae.config.latent_channels or self.config.image_condition_type:
            raise InputError("the model takes an image beside the text: load it by HunyuanVideoImageToVideoPipeline")

    @property
    def told_scale(self) -> bool:
        return self.config.guidance_embeds

    @property
    def time_in_model_dtype(self) -> bool:
        """Follows the pipeline's latents after a step, which Euler's rounds to the prediction's dtype."""
        return type(self.pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C], mask [n, L], pooled [n, D] and, if it is told, guidance [n], in the transformer's dtype."""
        words = self.pipe.encode_prompt(prompts, device=self.device, max_sequence_length=TEXT_LENGTH)
        return self.told_words(words, given)

    def told_words(self, words: tuple[Tensor, Tensor, Tensor], given: Given) -> Conditioning:
        """Results of the pipeline's `encode_prompt`, and the guidance scale."""
        text, pooled, mask = (x.to(self.dtype) for x in words)
        told = {"text": text, "mask": mask, "pooled": pooled}
        if self.told_scale:
            scales = torch.full((len(text),), given.guidance_scale, dtype=self.dtype, device=self.device)
            told["guidance"] = scales * GUIDANCE_UNIT
        return Conditioning(**told)
