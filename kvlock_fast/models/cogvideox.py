"""The CogVideoX family: CogVideoX and CogVideoX 1.5 text-to-video.

Facts of diffusers' `CogVideoXPipeline`: latents are the autoencoder's times its `scaling_factor`, and lie as
[B, F, C, h, w]; text and video share the self-attention, the text first; both branches of guidance are one forward,
unconditional rows first; predictions are taken in fp32, latents kept in the model's dtype. In 1.5 a token holds two
latent frames: an odd number gets one more in front, which is dropped before decoding.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
from torch import Tensor

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.locking.foreground import rotate
from kvlock_fast.locking.lock import attend_kept
from kvlock_fast.masks import Geometry
from kvlock_fast.models.autoencoder import decode_each
from kvlock_fast.models.base import ForegroundModel, Rope
from kvlock_fast.models.protocols import Part, Transformer

COGVIDEOX = ArchSpec(
    family="cogvideox",
    transformers=("CogVideoXTransformer3DModel",),
    attention=r"transformer_blocks\.\d+\.attn1",
    token_dim=2,
    text="prefix",
    flow=False,
    one_call=True,
    blocks=("CogVideoXBlock",),
)
DECODED_TOGETHER = 2
"""Latent frames that AutoencoderKLCogVideoX decodes at once: an even number would make four frames of the first."""
OFS = 2.0
"""The value that diffusers' pipelines give a transformer that embeds an "ofs"."""


class ForegroundProcessor:
    """In place of diffusers' `CogVideoXAttnProcessor2_0`, while not all tokens are there. The attention is locked."""

    def __call__(
        self,
        attn: Part,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        words, x = encoder_hidden_states.shape[1], torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = (f(x).unflatten(2, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
        # The norms have heads in front of tokens, which is where the lock knows K's.
        q, k = (norm(x.transpose(1, 2)).transpose(1, 2) for norm, x in ((attn.norm_q, q), (attn.norm_k, k)))
        if image_rotary_emb is not None:
            q, k = (torch.cat([x[:, :words], rotate(x[:, words:], *image_rotary_emb)], dim=1) for x in (q, k))
        out = attend_kept(q, k, v, attn.norm_k)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(hidden_states)))
        return out[:, words:], out[:, :words]


class CogVideoXModel(ForegroundModel):
    """A diffusers `CogVideoXPipeline`."""

    arch = COGVIDEOX
    in_model_dtype = True
    processor = ForegroundProcessor()

    def check(self) -> None:
        config = self.config
        if config.in_channels != self.pipe.vae.config.latent_channels or config.use_learned_positional_embeddings:
            raise InputError("the model takes an image beside the text: load it by CogVideoXImageToVideoPipeline")

    @property
    def geometry(self) -> Geometry:
        vae, config = self.pipe.vae.config, self.config
        spatial, patch = 2 ** (len(vae.block_out_channels) - 1), config.patch_size
        most = None
        if config.patch_size_t is not None and config.use_rotary_positional_embeddings:
            most = None, config.sample_height // patch, config.sample_width // patch  # its codes are cut from a table
        return Geometry(
            vae.temporal_compression_ratio, spatial, (config.patch_size_t or 1, patch, patch), most_tokens=most,
            lead_in=True, latents_together=DECODED_TOGETHER,
        )  # fmt: skip

    @property
    def usual_extent(self) -> tuple[int, int, int]:
        """Frames, height and width of a call that gives none."""
        config, stride = self.config, self.geometry.spatial_stride
        return config.sample_frames, config.sample_height * stride, config.sample_width * stride

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        return self.words(prompts, max_sequence_length=self.config.max_text_seq_length)[0].to(self.dtype)

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Noise [1, C, T, h, w] fp32, drawn frame by frame."""
        batch, channels, frames, *size = shape
        noise = self._drawn((batch, frames, channels, *size), generator, device)
        return noise.transpose(1, 2).float().contiguous()

    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [F, H, W, 3] to normalised latents [1, C, T, h, w] fp32, with the lead-in first."""
        latents = super().encode_video(frames)
        return torch.cat([latents[:, :, :1]] * self.geometry.lead(latents.shape[2]) + [latents], dim=2)

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        """Normalised latents [B, C, T, h, w], without the lead-in, to uint8 [B, F, H, W, 3] on the CPU."""
        own = (frames - 1) // self.geometry.temporal_stride + 1
        latents = latents[:, :, self.geometry.lead(own) :].float()
        return decode_each(self.pipe.vae, latents / self.pipe.vae.config.scaling_factor, tiled)

    def seen(self, latents: Tensor, told: Conditioning) -> Tensor:
        """The transformer's input [B, ..., T, h, w] for the latents, in its dtype."""
        return latents.to(self.dtype)

    def entering(self, latents: Tensor, told: Conditioning) -> Tensor:
        return self.seen(latents, told).transpose(1, 2).contiguous()

    def beside(self, told: Conditioning, latents: Tensor) -> dict[str, Any]:
        ofs = None if self.config.ofs_embed_dim is None else latents.new_full((1,), OFS, dtype=self.dtype)
        return {**super().beside(told, latents), "ofs": ofs, "image_rotary_emb": self.rotary(latents)}

    def leaving(self, prediction: Tensor, latents: Tensor) -> Tensor:
        return prediction.float().transpose(1, 2)

    def rotary(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine [S, D] of the tokens' positions."""
        if not self.config.use_rotary_positional_embeddings:
            return None
        frames, height, width = latents.shape[2:]
        stride = self.geometry.spatial_stride
        return self.kept(
            (frames, height, width, latents.device),
            lambda: CogVideoXPipeline._prepare_rotary_positional_embeddings(
                self.pipe,  # pyright: ignore[reportArgumentType]
                height * stride,
                width * stride,
                frames,
                latents.device,
            ),
        )

    def _rope(self, transformer: Transformer, x: Tensor, beside: Mapping[str, Any]) -> Rope:
        rotary = beside["image_rotary_emb"]
        return None if rotary is None else (rotary[0][None, :, None], rotary[1][None, :, None])

    def _forward_some(
        self,
        transformer: Transformer,
        x: Tensor,
        timestep: Tensor,
        beside: Mapping[str, Any],
        computed: Tensor,
        rope: Rope,
    ) -> Tensor:
        """Follows `CogVideoXTransformer3DModel.forward`; the text is computed whole, in front of the video's tokens."""
        text, ofs, dtype = beside["encoder_hidden_states"], beside["ofs"], x.dtype
        words = text.shape[1]
        temb = transformer.time_embedding(transformer.time_proj(self.times(timestep, x)).to(dtype))
        if ofs is not None:
            temb = temb + transformer.ofs_embedding(transformer.ofs_proj(ofs).to(dtype))
        x = transformer.patch_embed(text, x)
        text, x = x[:, :words], x.index_select(1, computed + words)
        for block in transformer.transformer_blocks:
            x, text = block(x, text, temb, rope)
        x = transformer.proj_out(transformer.norm_out(transformer.norm_final(x), temb=temb)).float()
        config = transformer.config
        return x.unflatten(2, (-1, config.patch_size_t or 1, config.patch_size, config.patch_size)).movedim(2, -1)
