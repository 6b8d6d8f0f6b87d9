"""The Cosmos families: Cosmos 1 text-to-world, Cosmos 2 text-to-image and from a picture, Cosmos 2.5 predict from text.

Facts of diffusers' `CosmosTextToWorldPipeline`, `Cosmos2TextToImagePipeline` and `Cosmos2_5_PredictBasePipeline`: the
time that the transformer is told is made of sigma; guidance is cond + w (cond - uncond). In the first two noise is
added to a signal that stays, x = x0 + sigma n, from sigma 80 on; the transformer's output is made into x0, in whose
space guidance takes place, and the steps are Euler's. In the third it is a flow's velocity, and an image or a clip to
go on from may be shown beside the text, which an edit has no use for. The pipelines refuse words and change pictures by
a safety checker, as the models' licence asks; so does an edit.

Cosmos 2 from a picture is `Cosmos2VideoToWorldPipeline`: an edit is given the first frame of its source, and so is the
source. The transformer sees the picture's latents in the place of the first latent frame's, nearly without noise and
with a time of their own; a mask channel marks them. Its prediction of the first frame is the picture, in both branches,
so an edit leaves that frame as it is. The picture's latents are the posterior's mode; the pipeline draws a sample.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.pipelines.cosmos.pipeline_cosmos2_video2world import Cosmos2VideoToWorldPipeline
from diffusers.pipelines.cosmos.pipeline_cosmos_text2world import CosmosTextToWorldPipeline
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.masks import Geometry
from kvlock_fast.models.base import ChannelNormModel, without_first_frame
from kvlock_fast.models.protocols import Solver

COSMOS = ArchSpec(
    family="cosmos",
    transformers=("CosmosTransformer3DModel",),
    attention=r"transformer_blocks\.\d+\.attn1",
    token_dim=2,
    flow="exploding",
    blocks=("CosmosTransformerBlock",),
)
FRAME_RATE = inspect.signature(CosmosTextToWorldPipeline.__call__).parameters["fps"].default
DEFAULTS = inspect.signature(Cosmos2VideoToWorldPipeline.__call__).parameters
PICTURE_FRAME_RATE, PICTURE_SIGMA = DEFAULTS["fps"].default, DEFAULTS["sigma_conditioning"].default


class CosmosModel(ChannelNormModel):
    """A diffusers `CosmosTextToWorldPipeline`."""

    arch = COSMOS
    makes_images: bool = False
    _mask_channels: int = 0
    _vae_names: tuple[str, str, str] = "latent_channels", "temporal_compression_ratio", "spatial_compression_ratio"

    def check(self) -> None:
        """Raise InputError for a pipeline without its safety checker or torchvision, or shown more than text."""
        if self.pipe.safety_checker is None:
            raise InputError("the pipeline has no safety_checker, which the licence of Cosmos asks for")
        if self.config.concat_padding_mask and find_spec("torchvision") is None:
            raise InputError("the model's transformer needs torchvision, which is not installed")
        if self.config.in_channels != self.pipe.vae.config[self._vae_names[0]] + self._mask_channels:
            raise InputError("the model is shown a video beside the text: use the pipeline for text alone")

    @property
    def geometry(self) -> Geometry:
        time, space = (self.pipe.vae.config[name] for name in self._vae_names[1:])
        patch = tuple(self.config.patch_size)
        most = tuple(size // p for size, p in zip(self.config.max_size, patch, strict=True))
        return Geometry(time, space, patch, most_tokens=most, one_frame=self.makes_images)

    def omega0(self, guidance_scale: float) -> float:
        """The pipelines' own scale is what is added beyond the conditional prediction."""
        return guidance_scale + 1 if self.guided(guidance_scale) else guidance_scale

    def combine(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        return cond + (scale - 1) * (cond - uncond)

    def time_at(self, solver: Solver, k: int) -> Tensor:
        """Sigma of x_k [] fp32."""
        return solver.sigmas[k]

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """Conditioning for each of the prompts. Raises InputError for one that the checker refuses."""
        checker = self.pipe.safety_checker.to(self.device)
        for prompt in prompts:
            if not checker.check_text_safety(prompt):
                raise InputError(f"prompt {prompt!r} was found unsafe by the model's safety checker")
        return super().condition(prompts, given)

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Embeddings [len(prompts), L, C] in the text encoder's dtype."""
        return self.words(prompts)[0]

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        """Normalised latents to uint8 [B, F, H, W, 3] on the CPU, as the safety checker leaves them."""
        videos = super().decode(latents, frames, tiled)
        checker = self.pipe.safety_checker.to(self.device)
        return torch.stack([torch.from_numpy(checker.check_video_safety(video.numpy())) for video in videos])

    def _normalised(self, latents: Tensor) -> Tensor:
        return super()._normalised(latents) * self._scale

    def _denormalised(self, latents: Tensor) -> Tensor:
        mean, std = self._latent_statistics(latents)
        return latents.float() * std / self._scale + mean

    @property
    def _scale(self) -> float:
        """The latents' deviation in the noise's terms."""
        return self.pipe.scheduler.config.sigma_data

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [1, C, T, 1, 1], of each latent frame."""
        config, frames = self.pipe.vae.config, latents.shape[2]
        if config.latents_mean is None:
            return latents.new_zeros(()), latents.new_ones(())
        mean, std = (
            torch.tensor(values).view(1, config.latent_channels, -1, 1, 1)[:, :, :frames].to(latents)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The clean latents [B, C, T, h, w] fp32 at latents [B, ...] of sigma `timestep` []."""
        scheduler = self.pipe.scheduler
        rows = scheduler.precondition_inputs(latents, timestep)
        output = self._ask(which, rows, scheduler.precondition_noise(timestep), told, fps=FRAME_RATE)
        return scheduler.precondition_outputs(latents, output, timestep)

    def _ask(self, which: int, rows: Tensor, time: Tensor, told: Conditioning, **more: Any) -> Tensor:
        """The transformer's output [B, C, T, h, w] in its dtype, at rows [B, ...] and time [] or [B, 1, T, 1, 1]."""
        transformer = self.transformers[which]
        stride = self.geometry.spatial_stride
        height, width = (size * stride for size in rows.shape[3:])
        time = time.expand(len(rows)).to(transformer.dtype) if time.ndim == 0 else time
        return transformer(
            hidden_states=rows.to(transformer.dtype),
            timestep=time,
            padding_mask=rows.new_zeros(1, 1, height, width, dtype=transformer.dtype),
            return_dict=False,
            **self.beside(told, rows),
            **more,
        )[0]


class Cosmos2Model(CosmosModel):
    """A diffusers `Cosmos2TextToImagePipeline`."""

    arch = replace(COSMOS, family="cosmos2-image")
    makes_images = True
    _vae_names = "z_dim", "scale_factor_temporal", "scale_factor_spatial"

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """Evenly spaced places along the scheduler's own range."""
        return {"sigmas": torch.linspace(0, 1, num_steps, dtype=torch.float64)}

    _latent_statistics = ChannelNormModel._latent_statistics

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The clean latents [B, C, T, h, w] in the transformer's dtype at latents [B, ...] of sigma `timestep` []."""
        time = _flow_time(timestep)
        output = self._ask(which, latents * (1 - time), time, told)
        return ((1 - time) * latents + -time * output.float()).to(output.dtype)


def _flow_time(sigma: Tensor) -> Tensor:
    """Time of the flow that x / (1 + sigma) goes along."""
    return sigma / (sigma + 1)


class Cosmos25Model(Cosmos2Model):
    """A diffusers `Cosmos2_5_PredictBasePipeline`, of text alone."""

    arch = replace(COSMOS, family="cosmos2.5", flow=True)
    makes_images = False
    _mask_channels = 1

    @property
    def _scale(self) -> float:
        return 1.0

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """The scheduler's own."""
        return {}

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, T, h, w] fp32 at latents [B, ...] of sigma `timestep` []."""
        time = timestep.expand(len(latents), 1, latents.shape[2], 1, 1)
        mask = latents.new_zeros(len(latents), 1, *latents.shape[2:], dtype=self.dtype)
        return self._ask(which, latents, time, told, condition_mask=mask).float()


class Cosmos2VideoModel(Cosmos2Model):
    """A diffusers `Cosmos2VideoToWorldPipeline`, of a first frame."""

    arch = replace(COSMOS, family="cosmos2-video")
    told_of_frames = True
    makes_images = False
    _mask_channels = 1

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C], and the first frame's latents [n, C, 1, h, w] fp32."""
        image = self.encode_video(given.frames[:1])
        return super().condition(prompts, given).replace(image=image.expand(len(prompts), -1, -1, -1, -1))

    def may_change(self, pixels: Tensor) -> Tensor:
        return without_first_frame(pixels, "video")

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """Clean latents [B, C, T, h, w] fp32, at latents [B, ...] of sigma `timestep` [], the first frame as given."""
        dtype, image, time = self.dtype, told["image"], _flow_time(timestep)
        picture_time = _flow_time(torch.full_like(time, PICTURE_SIGMA))
        first = torch.zeros_like(latents[:, :1])
        first[:, :, 0] = 1
        held = first[:, :, :, :1, :1]
        output = self._ask(
            which,
            torch.cat([image, (latents * (1 - time))[:, :, 1:]], dim=2),
            (held * picture_time + (1 - held) * time).to(dtype),
            told,
            fps=PICTURE_FRAME_RATE,
            condition_mask=first.to(dtype),
        )
        clean = ((1 - time) * latents + -time * output.float()).to(dtype)
        return torch.cat([image, clean[:, :, 1:].float()], dim=2)
