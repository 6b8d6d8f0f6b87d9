"""The LTX-2 family, text-to-video-and-sound.

Facts of diffusers' `LTX2Pipeline`, beside those of ltx.py: the transformer makes a sound along with the video, each of
which looks at the other; guidance is of the predicted clean latents, which are then made velocities again.

The sound's latents lie behind the video's, in as many further latent frames as they fill (the rest is 0): they take the
same steps and guidance, belong to no token, and are never locked. The source's sound is not known: its clean latents
are 0, the mean of all sounds, and where the edit keeps the source's background it keeps this too. Of diffusers' further
kinds of guidance there is none: it does the same with stg_scale 0, modality_scale 1, guidance_rescale 0 and an
audio_guidance_scale of guidance_scale.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.ltx2.pipeline_ltx2 import LTX2Pipeline
from diffusers.pipelines.ltx2.utils import conditioning_frame_rate
from torch import Tensor, nn

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.masks import ProjectedMask, project_mask
from kvlock_fast.models.ltx import LTX, LTXModel

LTX2 = replace(LTX, family="ltx2", transformers=("LTX2VideoTransformer3DModel",))
DEFAULTS = inspect.signature(LTX2Pipeline.__call__).parameters
FRAME_RATE = DEFAULTS["frame_rate"].default
SEEN_FRAME_RATE = conditioning_frame_rate(FRAME_RATE, DEFAULTS["motion_speed"].default)


class LTX2Model(LTXModel):
    """A diffusers `LTX2Pipeline`. Latents have the sound's in further frames at the end."""

    arch = LTX2
    told_of_frames = True
    most_text = DEFAULTS["max_sequence_length"].default
    usual_extent = 121, None, None

    @property
    def modules(self) -> list[nn.Module]:
        return [*super().modules, self.pipe.connectors]

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        return self.shifted_sigmas(num_steps, prod(self.geometry.token_grid(frames, height, width)))

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text and sound_text [n, L, C] in the transformer's dtype, for video and sound, and their mask [n, L]."""
        length = min(self.most_text, self.pipe.tokenizer_max_length)
        embeds, mask, _, _ = self.words(prompts, max_sequence_length=length)
        text, sound, mask = self.pipe.connectors(embeds, mask, padding_side=self.pipe.tokenizer.padding_side)
        return Conditioning(text=text.to(self.dtype), sound_text=sound.to(self.dtype), mask=mask)

    def settle(self, cond: Tensor, uncond: Tensor | None, scale: float, latents: Tensor, sigma: Tensor) -> Tensor:
        """The velocity of the guided clean latents."""
        clean = latents - cond * sigma
        if uncond is not None:
            clean = clean + (scale - 1) * (clean - (latents - uncond * sigma))
        return (latents - clean) / sigma

    def project(self, pixels: Tensor) -> ProjectedMask:
        """A mask bool [F, H, W] as the model has it; what holds the sound is background."""
        mask = project_mask(pixels, self.geometry)
        return mask.with_beside(self.sound_frames(*mask.latents.shape[1:]))

    def tokens_of(self, latents: Tensor) -> int:
        """Number of the video's tokens in latents [B, C, T, h, w]."""
        return super().tokens_of(latents.narrow(-3, 0, self._split(*latents.shape[-3:])))

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Noise [1, C, T, h, w] fp32: the video's is drawn first, then the sound's."""
        batch, channels, total, *size = shape
        frames = self._split(total, *size)
        video = self._drawn((batch, channels, frames, *size), generator, device)
        sound = self._drawn((batch, *self._sound_shape(frames)), generator, device)
        return self._joined(video, LTX2Pipeline._pack_audio_latents(sound))

    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [F, H, W, 3] to normalised latents [1, C, T, h, w] fp32, with a mean sound."""
        latents = super().encode_video(frames)
        return F.pad(latents, (0, 0, 0, 0, 0, self.sound_frames(*latents.shape[2:])))

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        """The video of normalised latents [B, C, T, h, w], uint8 [B, F, H, W, 3] on the CPU."""
        return super().decode(latents[:, :, : self._split(*latents.shape[2:])], frames, tiled)

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, T, h, w] fp32 of video and sound, at latents [B, ...], timestep []."""
        transformer, rows = self.transformers[which], len(latents)
        frames, (height, width) = self._split(*latents.shape[2:]), latents.shape[3:]
        timestep = timestep.expand(rows)
        sound = self._sound_of(latents, frames).to(transformer.dtype).contiguous()
        # Positions: where tokens of video [1, 3, S, 2] and sound [1, 1, L, 2] begin and end.
        device = latents.device
        video_places, sound_places = self.kept(
            (frames, height, width, device),
            lambda: (
                transformer.rope.prepare_video_coords(1, frames, height, width, device, fps=SEEN_FRAME_RATE),
                transformer.audio_rope.prepare_audio_coords(1, self._sound_shape(frames)[1], device),
            ),
        )
        video, sound = transformer(
            hidden_states=self.packed(latents[:, :, :frames]).to(transformer.dtype),
            audio_hidden_states=sound,
            encoder_hidden_states=told["text"],
            audio_encoder_hidden_states=told["sound_text"],
            timestep=timestep,
            sigma=timestep,
            encoder_attention_mask=told["mask"],
            audio_encoder_attention_mask=told["mask"],
            num_frames=frames,
            height=height,
            width=width,
            fps=SEEN_FRAME_RATE,
            audio_num_frames=sound_places.shape[2],
            video_coords=video_places.expand(rows, -1, -1, -1),
            audio_coords=sound_places.expand(rows, -1, -1, -1),
            use_cross_timestep=DEFAULTS["use_cross_timestep"].default,
            return_dict=False,
        )
        return self._joined(self.unpacked(video, (frames, height, width)), sound.float())

    def sound_frames(self, frames: int, height: int, width: int) -> int:
        """How many latent frames of this size the sound of so many fills."""
        channels, length, bins = self._sound_shape(frames)
        return -(-channels * length * bins // (self.pipe.vae.config.latent_channels * height * width))

    def _sound_shape(self, frames: int) -> tuple[int, int, int]:
        """Channels, length and mel bins of the sound's latents, of so many latent frames of video."""
        vae = self.pipe.audio_vae
        seconds = ((frames - 1) * self.geometry.temporal_stride + 1) / FRAME_RATE
        rate = vae.config.sample_rate / vae.config.mel_hop_length / float(vae.temporal_compression_ratio)
        return vae.config.latent_channels, round(seconds * rate), vae.config.mel_bins // vae.mel_compression_ratio

    def _split(self, total: int, height: int, width: int) -> int:
        """Number of the video's latent frames among all."""
        return next(n for n in range(total, 0, -1) if n + self.sound_frames(n, height, width) == total)

    def _joined(self, video: Tensor, sound: Tensor) -> Tensor:
        """The video's latents [B, C, T, h, w] and, behind, the sound's [B, L, D]."""
        _, channels, frames, *size = video.shape
        more = self.sound_frames(frames, *size)
        flat = sound.flatten(1)
        flat = F.pad(flat, (0, more * channels * size[0] * size[1] - flat.shape[1]))
        return torch.cat([video, flat.view(-1, channels, more, *size)], dim=2)

    def _sound_of(self, latents: Tensor, frames: int) -> Tensor:
        """The sound's latents [B, L, D]."""
        channels, length, bins = self._sound_shape(frames)
        return latents[:, :, frames:].flatten(1)[:, : channels * length * bins].unflatten(1, (length, -1))
