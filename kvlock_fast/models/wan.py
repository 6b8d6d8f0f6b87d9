"""The Wan family: Wan 2.1 and 2.2 text-to-video.

Facts of diffusers' `WanPipeline`: latents are normalised by the autoencoder's `latents_mean` and `latents_std`; the
transformer takes (latents, timestep, text) and predicts the flow's velocity; Wan 2.2 A14B has two transformers, split
at `boundary_ratio`; Wan 2.2 TI2V-5B takes one timestep a token (`expand_timesteps`).
"""

from collections.abc import Mapping
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from kvlock_fast.conditioning import Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.locking.foreground import rotate
from kvlock_fast.locking.lock import attend_kept
from kvlock_fast.masks import Geometry
from kvlock_fast.models.base import ChannelNormModel, ForegroundModel, Rope
from kvlock_fast.models.protocols import Part, Pipeline, Transformer

WAN = ArchSpec(family="wan", transformers=("WanTransformer3DModel",), attention=r"blocks\.\d+\.attn1")


class ForegroundProcessor:
    """In place of diffusers' `WanAttnProcessor`, while not all tokens are there. The attention is locked."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Part,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        out = attend_kept(rotate(q, *rotary_emb), rotate(k, *rotary_emb), v, attn.norm_k)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(hidden_states)))


class WanModel(ChannelNormModel, ForegroundModel):
    """A diffusers `WanPipeline`."""

    arch = WAN
    processor = ForegroundProcessor()

    def __init__(self, pipe: Pipeline):
        super().__init__(pipe)
        self.time_by_token = bool(pipe.config.get("expand_timesteps"))

    def check(self) -> None:
        if self.config.image_dim is not None or self.config.in_channels != self.latent_channels:
            raise InputError("the model takes an image beside the text: load it by WanImageToVideoPipeline")

    def facts(self, given: Given) -> dict[str, Any]:
        """Settings that decide which forward serves a step."""
        return {name: self.pipe.config.get(name) for name in ("boundary_ratio", "expand_timesteps")}

    @cached_property
    def geometry(self) -> Geometry:
        config, patch = self.pipe.vae.config, tuple(self.config.patch_size)
        most = min(t.config.rope_max_seq_len for t in self.transformers)
        return Geometry(config.scale_factor_temporal, config.scale_factor_spatial, patch, causal=True, most_tokens=most)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, without those of what is shown beside them."""
        return self.pipe.vae.config.z_dim

    @property
    def text_length(self) -> int:
        """Number of tokens that a prompt is padded to: WanPipeline's 512, or what the tokenizer allows if less."""
        return min(512, int(self.pipe.tokenizer.model_max_length))

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        return self.words(prompts, max_sequence_length=self.text_length)[0].to(self.dtype)

    @property
    def two_stages(self) -> bool:
        return self.pipe.config.get("boundary_ratio") is not None

    def stage_at(self, timestep: float, num_train_timesteps: int) -> int:
        """0 (all steps, or those of high noise) or 1 (low noise)."""
        if not self.two_stages:
            return 0
        return 0 if timestep >= self.pipe.config.boundary_ratio * num_train_timesteps else 1

    def transformer_of(self, stage: int) -> int:
        """Number of the transformer that serves a stage; a pipeline may have been loaded with one of two."""
        return min(stage, len(self.transformers) - 1)

    def token_times(self, timestep: Tensor, latents: Tensor, computed: Tensor | None = None) -> Tensor:
        return timestep.expand(latents.shape[0], self.tokens(latents) if computed is None else len(computed))

    def tokens(self, latents: Tensor) -> int:
        """Number of a sample's tokens; patches that are not whole are none."""
        sizes = zip(latents.shape[2:], self.geometry.patch_size, strict=True)
        return prod(size // patch for size, patch in sizes)

    def _rope(self, transformer: Transformer, x: Tensor, beside: Mapping[str, Any]) -> Rope:
        return transformer.rope(x)

    def _forward_some(
        self,
        transformer: Transformer,
        x: Tensor,
        timestep: Tensor,
        beside: Mapping[str, Any],
        computed: Tensor,
        rope: Rope,
    ) -> Tensor:
        """Follows `WanTransformer3DModel.forward` and its kin."""
        times = self.token_times(timestep, x, computed) if self.time_by_token else self.times(timestep, x)

        def tokens(embedding: nn.Module, x: Tensor) -> Tensor:
            return embedding(x).flatten(2).transpose(1, 2).index_select(1, computed)

        shown = beside.get("control_hidden_states")
        control = None if shown is None else tokens(transformer.vace_patch_embedding, shown)
        x = tokens(transformer.patch_embedding, x)
        per_token = times.shape[1] if times.ndim == 2 else None
        more = {} if per_token is None else {"timestep_seq_len": per_token}
        temb, timestep_proj, text, picture = transformer.condition_embedder(
            times.flatten(), beside["encoder_hidden_states"], beside.get("encoder_hidden_states_image"), **more
        )
        text = text if picture is None else torch.cat([picture, text], dim=1)
        timestep_proj = timestep_proj.unflatten(-1, (6, -1))
        x = _blocks(transformer, x, text, timestep_proj, rope, control)
        table = transformer.scale_shift_table.to(temb.device)
        if per_token is None:
            shift, scale = (table + temb.unsqueeze(1)).chunk(2, dim=1)
        else:
            shift, scale = (part.squeeze(2) for part in (table.unsqueeze(0) + temb.unsqueeze(2)).chunk(2, dim=2))
        x = transformer.proj_out((transformer.norm_out(x.float()) * (1 + scale) + shift).type_as(x))
        return x.unflatten(2, (*transformer.config.patch_size, -1))


def _blocks(
    transformer: Transformer,
    x: Tensor,
    text: Tensor,
    temb: Tensor,
    rope: Rope,
    control: Tensor | None,
) -> Tensor:
    """Through all blocks; the hints of VACE's own blocks are added after those that they belong to."""
    hints: dict[int, Tensor] = {}
    if control is not None:
        for layer, block in zip(sorted(transformer.config.vace_layers), transformer.vace_blocks, strict=True):
            hints[layer], control = block(x, text, control, temb, rope)
    # SkyReels' blocks take an attention mask too, of frames that do not see later ones: there is none.
    more = (None,) if "num_frame_per_block" in transformer.config else ()
    for layer, block in enumerate(transformer.blocks):
        x = block(x, text, temb, rope, *more)
        if layer in hints:
            x = x + hints[layer]
    return x
