"""Kandinsky 5, text-to-video and text-to-image.

Facts of diffusers' `Kandinsky5T2VPipeline` and `Kandinsky5T2IPipeline`: latents are the autoencoder's times its
`scaling_factor`, lie as [B, T, h, w, C] and are kept in the transformer's dtype, in which it is told the time too; with
`visual_cond` there are channels for a given first frame, which are empty in text-to-video; the text goes through blocks
of its own, as long as it is and without a mask, and is attended to by cross-attention; a pooled text goes with the
time. Rotated keys and queries are rounded to bf16, also in fp32: a blend between 0 and 1 is made before that.

Models with sparse attention ("nabla") are refused: it lets tokens see blocks of others that it chooses by their keys,
and has them in another order.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvlock_fast.conditioning import MASK, Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.locking.foreground import swapped
from kvlock_fast.masks import Geometry
from kvlock_fast.models.base import TEXT, PipelineModel
from kvlock_fast.models.images import ImageModel
from kvlock_fast.models.protocols import Part, Transformer

KANDINSKY5 = ArchSpec(
    family="kandinsky-5",
    transformers=("Kandinsky5Transformer3DModel",),
    attention=r"visual_transformer_blocks\.\d+\.self_attention",
    key=("key_norm",),
    value=("to_value",),
)


class Kandinsky5Model(PipelineModel):
    """A diffusers `Kandinsky5T2VPipeline`."""

    arch = KANDINSKY5
    in_model_dtype = True
    time_in_model_dtype = True
    told_names = TEXT | {"pooled_projections": "pooled"}

    def check(self) -> None:
        kind = self.config.attention_type
        if kind != "regular":
            raise InputError(
                f"the transformer's attention is {kind!r}, which sees blocks of tokens that it chooses by their keys: "
                "only 'regular' attention can be locked"
            )

    @property
    def geometry(self) -> Geometry:
        vae = self.pipe.vae.config
        return Geometry(vae.temporal_compression_ratio, vae.spatial_compression_ratio, **self._tokens)

    @property
    def _tokens(self) -> dict[str, Any]:
        """The token's size in latents, and the most tokens along each axis."""
        most = self.transformers[0].visual_rope_embeddings.max_pos
        return {"patch_size": tuple(self.config.patch_size), "most_tokens": tuple(most)}

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, without those of a given frame."""
        return self.config.in_visual_dim

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] and pooled [n, D] in the transformer's dtype; a mask [n, L] where some texts are filled up."""
        # One by one: the text encoder is given no mask.
        each = [self.pipe.encode_prompt(prompt, device=self.device, dtype=self.dtype) for prompt in prompts]
        return Conditioning.cat([Conditioning("text", text=text, pooled=pooled) for text, pooled, _ in each])

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Noise [1, C, T, h, w] fp32, drawn with channels last."""
        batch, channels, *size = shape
        noise = self._drawn((batch, *size, channels), generator, device)
        return noise.float().permute(0, 4, 1, 2, 3).contiguous()

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, T, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        transformer = self.transformers[which]
        rows = latents.permute(0, 2, 3, 4, 1).to(self.dtype).contiguous()
        if self.config.visual_cond:
            rows = torch.cat([rows, rows.new_zeros(*rows.shape[:-1], rows.shape[-1] + 1)], dim=-1)
        # Numbers of the tokens in time, down and across, and of the text's.
        grid = (n // patch for n, patch in zip(latents.shape[2:], self.config.patch_size, strict=True))
        sizes = (*grid, told["text"].shape[1])
        *places, words = self.kept(
            (*sizes, latents.device), lambda: [torch.arange(size, device=latents.device) for size in sizes]
        )
        with _masked(transformer, told):
            velocity = transformer(
                hidden_states=rows,
                timestep=self.times(timestep, latents),
                visual_rope_pos=places,
                text_rope_pos=words,
                scale_factor=self._scale(latents),
                sparse_params=None,
                **self.beside(told, latents),
            ).sample
        return velocity.permute(0, 4, 1, 2, 3)

    def _scale(self, latents: Tensor) -> tuple[float, float, float]:
        """Divisors of positions at the latents' size."""
        stride = self.geometry.spatial_stride
        return self.pipe._get_scale_factor(latents.shape[3] * stride, latents.shape[4] * stride)


class Kandinsky5ImageModel(Kandinsky5Model, ImageModel):
    """A diffusers `Kandinsky5T2IPipeline`."""

    arch = replace(KANDINSKY5, family="kandinsky-5-image")
    shifted = False

    def check(self) -> None:
        super().check()
        if self.config.visual_cond:
            raise InputError("the transformer takes a picture beside the text: it is made for Kandinsky5I2IPipeline")

    @property
    def geometry(self) -> Geometry:
        return Geometry(1, self.pipe.vae_scale_factor_spatial, one_frame=True, **self._tokens)

    def _scale(self, latents: Tensor) -> tuple[float, float, float]:
        return 1.0, 1.0, 1.0


def _masked(transformer: Transformer, told: Conditioning) -> AbstractContextManager[None]:
    """Attention to the text that leaves out what texts were filled up with, where some were."""
    if MASK not in told:
        return nullcontext()
    of_text = [block.self_attention for block in transformer.text_transformer_blocks]
    of_video = [block.cross_attention for block in transformer.visual_transformer_blocks]
    attentions = of_text + of_video
    return swapped(attentions, [MaskedText(told[MASK])] * len(attentions))


class MaskedText:
    """In place of diffusers' `Kandinsky5AttnProcessor` where keys and values are the text's."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, mask: Tensor):
        """mask: bool [B, L], False where a text has been filled up."""
        self.mask = mask

    def __call__(
        self,
        attn: Part,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: Any = None,
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_query(hidden_states), attn.to_key(text), attn.to_value(text)
        q, k, v = (x.unflatten(2, (attn.num_heads, -1)) for x in (q, k, v))
        q, k = (
            _rotated(norm(x.float()), rotary_emb).type_as(x) for norm, x in ((attn.query_norm, q), (attn.key_norm, k))
        )
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(*heads_first, attn_mask=self.mask[:, None, None])
        return attn.out_layer(out.transpose(1, 2).flatten(2))


def _rotated(x: Tensor, rope: Tensor | None) -> Tensor:
    """x [B, L, H, D] fp32 turned by matrices of its pairs, and rounded, as diffusers' Kandinsky has it."""
    if rope is None:
        return x
    return (rope * x.unflatten(-1, (-1, 1, 2))).sum(dim=-1).flatten(-2).to(torch.bfloat16)
