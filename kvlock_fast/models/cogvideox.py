"""The CogVideoX family: CogVideoX and CogVideoX 1.5 text-to-video.

Facts of diffusers' `CogVideoXPipeline`: latents are the autoencoder's times its `scaling_factor`, and lie as
[B, F, C, h, w]; text and video share the self-attention, the text first; both branches of guidance are one forward,
unconditional rows first; predictions are taken in fp32, latents kept in the model's dtype. In 1.5 a token holds two
latent frames: an odd number gets one more in front, which is dropped before decoding.

`foreground_forward` computes some of the tokens, as `CogVideoXTransformer3DModel.forward` does, on rows of the video's
sequence. The text is computed whole, in front of the video's tokens, with keys and values of its own; the rest of the
video is seen as the source's (locking/foreground.py). The blocks are the model's own, compiled or not.
"""

from typing import Any

import torch
from diffusers import CogVideoXPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.locking.foreground import View, processors, rotate, whole_forward
from kvlock_fast.locking.lock import TransformerLock, attend_kept
from kvlock_fast.masks import Geometry, Region
from kvlock_fast.models.autoencoder import decode_each, encode_mode
from kvlock_fast.models.base import PipelineModel

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
"""Latent frames, by AutoencoderKLCogVideoX: of an even number it would make four frames of the first one."""
OFS = 2.0
"""What diffusers' pipelines give a transformer that embeds an "ofs"."""


class CogVideoXModel(PipelineModel):
    """What the loop needs of a diffusers `CogVideoXPipeline`."""

    arch = COGVIDEOX

    def __init__(self, pipe: Any):
        """Raises InputError for a pipeline of another kind."""
        super().__init__(pipe)
        self._check_input(self.config, pipe.vae.config.latent_channels)
        self._rotary: dict[tuple, tuple[Tensor, Tensor]] = {}

    def _check_input(self, config: Any, channels: int) -> None:
        """Raise InputError for a transformer that takes more, or less, than this model gives it."""
        if config.in_channels != channels or config.use_learned_positional_embeddings:
            raise InputError("the model takes an image beside the text: load it by CogVideoXImageToVideoPipeline")

    @property
    def geometry(self) -> Geometry:
        vae, config = self.pipe.vae.config, self.transformers[0].config
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
        """[len(prompts), L, C] in the transformer's dtype."""
        length = self.transformers[0].config.max_text_seq_length
        embeds, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=self.device
        )
        return embeds.to(self.transformers[0].dtype)

    @property
    def latents_dtype(self) -> torch.dtype:
        """Of the latents between steps, in CogVideoXPipeline."""
        return self.transformers[0].dtype

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """[1, C, T, h, w] fp32, as CogVideoXPipeline draws it: frame by frame, in the model's dtype."""
        batch, channels, frames, *size = shape
        shape = (batch, frames, channels, *size)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=self.latents_dtype)
        return noise.transpose(1, 2).float().contiguous()

    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [F, H, W, 3] to normalised latents [1, C, T, h, w] fp32, by the posterior's mode; the lead-in first."""
        latents = encode_mode(self.pipe.vae, frames, self.device) * self.pipe.vae.config.scaling_factor
        return torch.cat([latents[:, :, :1]] * self.geometry.lead(latents.shape[2]) + [latents], dim=2)

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        """Normalised latents [B, C, T, h, w] of so many frames to uint8 [B, F, H, W, 3] on the CPU."""
        own = (frames - 1) // self.geometry.temporal_stride + 1
        latents = latents[:, :, self.geometry.lead(own) :].float()
        return decode_each(self.pipe.vae, latents / self.pipe.vae.config.scaling_factor, tiled)

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The prediction [B, C, T, h, w] fp32, at latents [B, ...], timestep []."""
        transformer = self.transformers[which]
        rows = self._seen(latents, told).transpose(1, 2).contiguous()
        prediction = transformer(
            hidden_states=rows,
            encoder_hidden_states=told["text"],
            timestep=timestep.expand(rows.shape[0]),
            ofs=self._ofs(rows),
            image_rotary_emb=self.rotary(latents),
            return_dict=False,
        )[0]
        return prediction.float().transpose(1, 2)

    def predict_foreground(
        self, lock: TransformerLock, latents: Tensor, timestep: Tensor, told: Conditioning, region: Region,
        background: Tensor, rows: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The prediction of the region's tokens [B, C, T, h, w] fp32, 0 elsewhere, under a lock that has the
        background's K and V: of the tokens `background`, of which `rows` (None: all) are outside the mask.
        """
        x = self._seen(latents, told)
        with whole_forward(lock.transformer):
            return foreground_forward(
                lock,
                x,
                timestep.expand(x.shape[0]),
                told["text"],
                self._ofs(x),
                self.rotary(x),
                region.computed,
                region.foreground,
                background,
                rows,
            ).float()

    def _seen(self, latents: Tensor, told: Conditioning) -> Tensor:
        """What the transformer makes its tokens of [B, ..., T, h, w], in its dtype."""
        return latents.to(self.transformers[0].dtype)

    def _ofs(self, rows: Tensor) -> Tensor | None:
        return None if self.transformers[0].config.ofs_embed_dim is None else rows.new_full((1,), OFS)

    def rotary(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine [S, D] of the tokens' positions; None where the patches are given theirs.

        Kept for good: captured steps read them where they are.
        """
        if not self.transformers[0].config.use_rotary_positional_embeddings:
            return None
        frames, height, width = latents.shape[2:]
        key = frames, height, width, latents.device
        if key not in self._rotary:
            stride = self.geometry.spatial_stride
            self._rotary[key] = CogVideoXPipeline._prepare_rotary_positional_embeddings(
                self.pipe, height * stride, width * stride, frames, latents.device
            )
        return self._rotary[key]


class ForegroundProcessor:
    """In place of diffusers' `CogVideoXAttnProcessor2_0`, while not all tokens are there. The attention is locked."""

    def __call__(
        self,
        attn: nn.Module,
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


PROCESSOR = ForegroundProcessor()


def foreground_forward(
    lock: TransformerLock,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    ofs: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    computed: Tensor,
    foreground: int,
    background: Tensor,
    rows: Tensor | None,
) -> Tensor:
    """The prediction [B, C, T, h, w] of the tokens `computed` [N]; 0 elsewhere.

    latents: [B, C, T, h, w] whole, in the transformer's dtype; timestep: [B]; rotary: cosine and sine [S, D] of all
    the video's tokens, None where the patches are given their positions; foreground: how many of the tokens have keys
    and values of their own, from the first on; background: indices of the kept tokens, of which `rows` (None: all) are
    seen.
    """
    transformer, words = lock.transformer, text.shape[1]
    seen = background if rows is None else background.index_select(0, rows)
    lock.state.view = View(words + foreground, rows, _positions(rotary, seen))
    temb = transformer.time_embedding(transformer.time_proj(timestep).to(latents.dtype))
    if ofs is not None:
        temb = temb + transformer.ofs_embedding(transformer.ofs_proj(ofs).to(latents.dtype))
    x = transformer.patch_embed(text, latents.transpose(1, 2).contiguous())
    text, tokens, x = x[:, :words], x.shape[1] - words, x.index_select(1, computed + words)
    rope = _positions(rotary, computed)
    with processors(lock.attentions, PROCESSOR):
        for block in transformer.transformer_blocks:
            x, text = block(x, text, temb, rope)
    x = transformer.proj_out(transformer.norm_out(transformer.norm_final(x), temb=temb))
    whole = x.new_zeros(x.shape[0], tokens, x.shape[2]).index_copy_(1, computed, x)
    return _unpatchify(whole, latents.shape, transformer.config)


def _positions(rotary: tuple[Tensor, Tensor] | None, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
    """Cosine and sine of some tokens, each [1, N, 1, D]."""
    return None if rotary is None else tuple(x.index_select(0, tokens)[None, :, None] for x in rotary)


def _unpatchify(x: Tensor, shape: torch.Size, config: dict) -> Tensor:
    """Tokens [B, S, C * pt * p * p] as latents [B, C, T, h, w] of this shape (C may differ)."""
    patch = config.patch_size_t or 1, config.patch_size, config.patch_size
    t, h, w = (size // p for size, p in zip(shape[2:], patch, strict=True))
    x = x.view(x.shape[0], t, h, w, -1, *patch).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
