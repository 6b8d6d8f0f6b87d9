"""The LongCat-Image family, text-to-image: blocks like FLUX.1's, guided by two branches.

Facts of diffusers' `LongCatImagePipeline`, beside those of images.py: noise is drawn in fp32; the text is a
Qwen2.5-VL's, not masked, with positions on the diagonal, which the image's go on from; what both branches of guidance
make is shortened, token by token, to the length of the conditional prediction: that holds for the preset `cfg`, while
the lock's own guidance is by its formula. Prompts are taken as they are: they are not rewritten first, as the pipeline
does unless told not to.
"""

import inspect

import torch
from diffusers.pipelines.longcat_image.pipeline_longcat_image import LongCatImagePipeline, prepare_pos_ids
from torch import Tensor

from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.images import ATTENTION, PackedModel

LONGCAT_IMAGE = ArchSpec(
    family="longcat-image", transformers=("LongCatImageTransformer2DModel",), attention=ATTENTION, text="prefix"
)
LEAST_SCALE = inspect.signature(LongCatImagePipeline.__call__).parameters["cfg_renorm_min"].default


class LongCatImageModel(PackedModel):
    """A diffusers `LongCatImagePipeline`."""

    arch = LONGCAT_IMAGE

    def combine(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Guided, no token longer than the conditional prediction has it."""
        height, width = cond.shape[3:]
        cond, uncond = self.packed(cond), self.packed(uncond)
        guided = uncond + scale * (cond - uncond)
        own, made = (torch.norm(x, dim=-1, keepdim=True) for x in (cond, guided))
        return self.unpacked(guided * (own / (made + 1e-8)).clamp(min=LEAST_SCALE, max=1.0), height, width)

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        text, _ = self.pipe.encode_prompt(prompts)
        return text.to(self.dtype)

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Noise [1, C, 1, h, w] fp32, drawn in fp32 and then rounded."""
        return self._drawn(shape, generator, device, torch.float32).to(self.dtype).float()

    def text_positions(self, length: int) -> Tensor:
        return prepare_pos_ids(modality_id=0, type="text", start=(0, 0), num_token=length)

    def image_positions(self, height: int, width: int) -> Tensor:
        first = (self.pipe.tokenizer_max_length,) * 2
        return prepare_pos_ids(modality_id=1, type="image", start=first, height=height // 2, width=width // 2)
