"""The HunyuanVideo 1.5 family, text-to-video and image-to-video.

Facts of diffusers' `HunyuanVideo15Pipeline` and `HunyuanVideo15ImageToVideoPipeline`: latents are the autoencoder's
times its `scaling_factor`, kept in the transformer's dtype, as is the time that it is told; sigmas are evenly spaced
from 1; the transformer sees the latents, those of an image in the first frame (zeros without one) and a mask of it, as
channels, and beside them words, quoted ones by their letters, and the image's features, each with a mask; words have
projections of their own in every self-attention; a "guider" guides. The second resizes its image to one of a few
sizes: an edit stays at the size of its source, whose first frame is the image, for the edit and the source alike.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.masks import Geometry
from kvlock_fast.models.base import PipelineModel, check_guider, is_on

HUNYUAN_VIDEO15 = ArchSpec(
    family="hunyuan-video-1.5",
    transformers=("HunyuanVideo15Transformer3DModel",),
    attention=r"transformer_blocks\.\d+\.attn",
    blocks=("HunyuanVideo15TransformerBlock",),
)


class HunyuanVideo15Model(PipelineModel):
    """What the loop needs of a diffusers `HunyuanVideo15Pipeline`."""

    arch = HUNYUAN_VIDEO15
    why_not_captured = "a forward of HunyuanVideo 1.5 waits for values that decide what it computes"

    def __init__(self, pipe: Any):
        """Raises InputError for a pipeline of another kind, or a guider that is not classifier-free guidance."""
        super().__init__(pipe)
        check_guider(pipe.guider)
        if self.config.patch_size_t != 1:
            raise InputError(f"a model whose tokens hold {self.config.patch_size_t} latent frames is not supported")
        if self.config.use_meanflow:
            raise InputError("a model that is told where a step ends (use_meanflow=True) is not supported")

    @property
    def latents_dtype(self) -> torch.dtype:
        """Of the latents between steps, in the pipeline."""
        return self.transformers[0].dtype

    @property
    def geometry(self) -> Geometry:
        vae, patch = self.pipe.vae, self.config.patch_size
        return Geometry(vae.temporal_compression_ratio, vae.spatial_compression_ratio, (1, patch, patch))

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Evenly spaced sigmas."""
        return {"sigmas": np.linspace(1.0, 0.0, num_steps + 1)[:-1]}

    def guided(self, guidance_scale: float) -> bool:
        """Whether a negative branch is run: where the guider is on."""
        return is_on(self.pipe.guider) and guidance_scale > 1

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """Of words [n, L, C] and letters [n, M, D] with masks, and an image, in the transformer's dtype."""
        dtype = self.transformers[0].dtype
        text, mask, letters, letters_mask = self.pipe.encode_prompt(
            prompts, device=self.device, dtype=dtype, batch_size=len(prompts)
        )
        told = {"text": text, "mask": mask, "letters": letters, "letters_mask": letters_mask}
        return Conditioning(**told, **self._image(len(prompts), given))

    def _image(self, rows: int, given: Given) -> dict[str, Tensor]:
        """No image's features [n, N, D]."""
        size = rows, self.pipe.vision_num_semantic_tokens, self.pipe.vision_states_dim
        return {"features": torch.zeros(size, dtype=self.transformers[0].dtype, device=self.device)}

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """[1, C, T, h, w] fp32, as the pipeline draws it: in the model's dtype."""
        return randn_tensor(shape, generator=generator, device=device, dtype=self.latents_dtype).float()

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, T, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        transformer = self.transformers[which]
        rows = latents.to(transformer.dtype)
        return transformer(
            hidden_states=torch.cat([rows, self._image_channels(rows, told)], dim=1),
            timestep=timestep.expand(len(rows)).to(rows.dtype),
            encoder_hidden_states=told["text"],
            encoder_attention_mask=told["mask"],
            encoder_hidden_states_2=told["letters"],
            encoder_attention_mask_2=told["letters_mask"],
            image_embeds=told["features"],
            return_dict=False,
        )[0]

    def _image_channels(self, rows: Tensor, told: Conditioning) -> Tensor:
        """An image's latents and their mask [B, C + 1, T, h, w]: none."""
        return rows.new_zeros(len(rows), rows.shape[1] + 1, *rows.shape[2:])


class HunyuanVideo15I2VModel(HunyuanVideo15Model):
    """What the loop needs of a diffusers `HunyuanVideo15ImageToVideoPipeline`."""

    arch = replace(HUNYUAN_VIDEO15, family="hunyuan-video-1.5-i2v")
    told_of_frames = True

    def _image(self, rows: int, given: Given) -> dict[str, Tensor]:
        """The first frame's features [n, N, D], and its latents and their mask [n, C + 1, T, h, w]."""
        pipe, dtype = self.pipe, self.transformers[0].dtype
        image = Image.fromarray(given.frames[0].cpu().numpy())
        features = pipe.encode_image(image, rows, self.device, dtype)
        frames, height, width = given.mask.latents.shape[1:]
        empty = torch.zeros(1, pipe.num_channels_latents, frames, height, width)
        channels = pipe.prepare_cond_latents_and_mask(
            empty, image, 1, image.height, image.width, dtype=dtype, device=self.device
        )
        return {"features": features, "image": torch.cat(channels, dim=1).expand(rows, -1, -1, -1, -1)}

    def _image_channels(self, rows: Tensor, told: Conditioning) -> Tensor:
        return told["image"]
