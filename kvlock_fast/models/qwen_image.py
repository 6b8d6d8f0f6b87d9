"""The Qwen-Image family, text-to-image.

Facts of diffusers' `QwenImagePipeline`: the autoencoder is one of videos, given one frame, and its latents are
normalised by `latents_mean` and `latents_std`; they are drawn and kept in the text's dtype, and packed 2 x 2 to a
token; the sigmas are evenly spaced, then shifted by the number of tokens; timesteps are given divided by 1000. Texts
are as long as they are, with a mask only where one is filled up beside a longer one. Each branch of guidance is a
forward of its own, and what they make together is scaled back, token by token, to the length of the conditional
prediction: that holds for the preset `cfg`, while the lock's own guidance is by its formula.
"""

from typing import Any

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.base import TEXT, ChannelNormModel, PipelineModel
from kvlock_fast.models.images import PackedModel

QWEN_IMAGE = ArchSpec(
    family="qwen-image",
    transformers=("QwenImageTransformer2DModel",),
    attention=r"transformer_blocks\.\d+\.attn",
    text="prefix",
)


class QwenImageModel(ChannelNormModel, PackedModel):
    """A diffusers `QwenImagePipeline`."""

    arch = QWEN_IMAGE
    told_names = TEXT | {"encoder_hidden_states_mask": "mask"}
    encode_video = PipelineModel.encode_video
    decode = PipelineModel.decode

    def check(self) -> None:
        config = self.config
        if config.guidance_embeds or config.zero_cond_t or config.use_layer3d_rope or config.use_additional_t_cond:
            raise InputError("the model is a Qwen-Image of another kind (for edits or layers), which is not supported")

    @property
    def most_tokens(self) -> tuple[None, int, int]:
        """Positions are cut from a table, half of them on either side of the middle."""
        most = 2 * len(self.transformers[0].pos_embed.pos_freqs)
        return None, most, most

    def combine(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Guided, each token as long as the conditional prediction has it."""
        height, width = cond.shape[3:]
        cond, uncond = self.packed(cond), self.packed(uncond)
        guided = uncond + scale * (cond - uncond)
        own, made = (torch.norm(x, dim=-1, keepdim=True) for x in (cond, guided))
        return self.unpacked(guided * (own / made), height, width)

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] in the transformer's dtype; mask [n, L] of its tokens, where some are filled up."""
        text, mask = self.pipe.encode_prompt(prompts, device=self.device)
        return Conditioning("text", text=text.to(self.dtype), **({} if mask is None else {"mask": mask.bool()}))

    def beside(self, told: Conditioning, latents: Tensor) -> dict[str, Any]:
        height, width = latents.shape[3:]
        shapes = [[(1, height // 2, width // 2)]] * len(latents)
        return {**PipelineModel.beside(self, told, latents), "img_shapes": shapes}

    def unpacked(self, rows: Tensor, height: int, width: int) -> Tensor:
        stride = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(rows, height * stride, width * stride, stride)
