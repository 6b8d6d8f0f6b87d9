"""The HunyuanVideo 1.5 family, text-to-video and image-to-video.

Facts of diffusers' `HunyuanVideo15Pipeline` and `HunyuanVideo15ImageToVideoPipeline`: latents are the autoencoder's
times its `scaling_factor`, kept in the transformer's dtype, as is the time that it is told; sigmas are evenly spaced
from 1; the transformer sees the latents, those of an image in the first frame (zeros without one) and a mask of it, as
channels, and beside them words, quoted ones by their letters, and the image's features, each with a mask; words have
projections of their own in every self-attention; a "guider" guides. The second resizes its image to one of a few
sizes: an edit stays at the size of its source, whose first frame is the image, for the edit and the source alike.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.autoencoder import picture
from kvlock_fast.models.base import WORDS_AND_LETTERS, PipelineModel, check_guider

HUNYUAN_VIDEO15 = ArchSpec(
    family="hunyuan-video-1.5",
    transformers=("HunyuanVideo15Transformer3DModel",),
    attention=r"transformer_blocks\.\d+\.attn",
    blocks=("HunyuanVideo15TransformerBlock",),
)


class HunyuanVideo15Model(PipelineModel):
    """A diffusers `HunyuanVideo15Pipeline`."""

    arch = HUNYUAN_VIDEO15
    why_not_captured = "a forward of HunyuanVideo 1.5 waits for values that decide what it computes"
    evenly_spaced = True
    in_model_dtype = True
    time_in_model_dtype = True
    has_guider = True
    told_names = WORDS_AND_LETTERS | {"image_embeds": "features"}

    def check(self) -> None:
        check_guider(self.pipe.guider)
        if self.config.patch_size_t != 1:
            raise InputError(f"a model whose tokens hold {self.config.patch_size_t} latent frames is not supported")
        if self.config.use_meanflow:
            raise InputError("a model that is told where a step ends (use_meanflow=True) is not supported")

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """Words [n, L, C] and letters [n, M, D] with masks, and an image, in the transformer's dtype."""
        text, mask, letters, letters_mask = self.pipe.encode_prompt(
            prompts, device=self.device, dtype=self.dtype, batch_size=len(prompts)
        )
        told = {"text": text, "mask": mask, "letters": letters, "letters_mask": letters_mask}
        return Conditioning(**told, **self._image(len(prompts), given))

    def _image(self, rows: int, given: Given) -> dict[str, Tensor]:
        """Features [n, N, D] of no image."""
        size = rows, self.pipe.vision_num_semantic_tokens, self.pipe.vision_states_dim
        return {"features": torch.zeros(size, dtype=self.dtype, device=self.device)}

    def entering(self, latents: Tensor, told: Conditioning) -> Tensor:
        """The latents, with an image's latents and their mask [B, C + 1, T, h, w] as channels, 0 without one."""
        rows = latents.to(self.dtype)
        nothing = rows.new_zeros(len(rows), rows.shape[1] + 1, *rows.shape[2:])
        return torch.cat([rows, told.get("image", nothing)], dim=1)


class HunyuanVideo15I2VModel(HunyuanVideo15Model):
    """A diffusers `HunyuanVideo15ImageToVideoPipeline`."""

    arch = replace(HUNYUAN_VIDEO15, family="hunyuan-video-1.5-i2v")
    told_of_frames = True

    def _image(self, rows: int, given: Given) -> dict[str, Tensor]:
        """The first frame's features [n, N, D], and its latents and their mask [n, C + 1, T, h, w]."""
        pipe, image = self.pipe, picture(given.frames[0])
        features = pipe.encode_image(image, rows, self.device, self.dtype)
        empty = torch.zeros(1, pipe.num_channels_latents, *given.mask.latents.shape[1:])
        channels = pipe.prepare_cond_latents_and_mask(
            empty, image, 1, image.height, image.width, dtype=self.dtype, device=self.device
        )
        return {"features": features, "image": torch.cat(channels, dim=1).expand(rows, -1, -1, -1, -1)}
