"""CogVideoX's forward of some of the tokens: as `CogVideoXTransformer3DModel.forward`, on rows of the video's sequence.

The text is computed whole, in front of the video's tokens, with keys and values of its own; the rest of the video is
seen as the source's (models/foreground.py). The blocks are the model's own, compiled or not.
"""

import torch
from torch import Tensor, nn

from kvlock_fast.models.foreground import View, processors, rotate
from kvlock_fast.models.locking import TransformerLock, attend_kept


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
