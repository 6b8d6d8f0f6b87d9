"""Self-attentions whose projections go through the prologue: a class for each family of the fast path."""

from typing import Any

import torch
from torch import Tensor, nn

from kvlock_fast.kernels.attention import attention
from kvlock_fast.locking.arch import Attention
from kvlock_fast.locking.fast_qkv import locked_qkv
from kvlock_fast.locking.state import Rotation


class FastProcessor:
    """The common part of the families' processors: from tokens to what a self-attention gives back."""

    _parallel_config = None

    def __init__(self, backend: Any):
        """backend: diffusers' name of the attention that the user has chosen, None for none."""
        self.backend = backend

    def attended(self, attn: Attention, x: Tensor, rotation: Rotation | None, mask: Tensor | None) -> Tensor:
        """The output [B, n, C] of a self-attention on the tokens x [B, n, C], projected."""
        # Nothing here holds the projections while the attention runs.
        qkv = locked_qkv(attn, (attn.to_q(x), attn.to_k(x), attn.to_v(x)), rotation)
        return projected(attn, self.attend(*qkv, mask).flatten(2, 3))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of q to k, v [B, n, H, D]; mask: as diffusers gives it to its attentions."""
        if mask is not None or self.backend is not None:
            from diffusers.models.attention_dispatch import dispatch_attention_fn

            return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=self.backend)
        if q.is_cuda:
            return attention(q, k, v, attention="library")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def projected(attn: Attention, x: Tensor) -> Tensor:
    """The attention's result x [B, n, H*D] through its output projection."""
    return attn.to_out[1](attn.to_out[0](x))


def prepared(attn: Attention, mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask of the attention of the tokens x [B, n, C], by heads."""
    if mask is None:
        return None
    by_heads = attn.prepare_attention_mask(mask, x.shape[1], x.shape[0])
    return by_heads.view(x.shape[0], attn.heads, -1, by_heads.shape[-1])


class WanFastProcessor(FastProcessor):
    """Replacement of diffusers' `WanAttnProcessor` in a locked self-attention."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotation | None = None,
    ) -> Tensor:
        return self.attended(attn, hidden_states, rotary_emb, attention_mask)


class CogVideoXFastProcessor(FastProcessor):
    """Replacement of diffusers' `CogVideoXAttnProcessor2_0` in a joint attention with text in front of the video."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
    ) -> tuple[Tensor, Tensor]:
        words, x = encoder_hidden_states.shape[1], torch.cat([encoder_hidden_states, hidden_states], dim=1)
        out = self.attended(attn, x, image_rotary_emb, prepared(attn, attention_mask, x))
        return out[:, words:], out[:, :words]


class LTXFastProcessor(FastProcessor):
    """Replacement of diffusers' `LTXVideoAttnProcessor`, where heads have angles of their own."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
    ) -> Tensor:
        mask = prepared(attn, attention_mask, hidden_states)
        return self.attended(attn, hidden_states, image_rotary_emb, mask)


class HunyuanVideoFastProcessor(FastProcessor):
    """Replacement of diffusers' `HunyuanVideoAttnProcessor2_0` in a locked self-attention.

    The text is behind the video, by projections of its own or by the same.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        text, tokens = encoder_hidden_states, hidden_states.shape[1]
        apart = attn.add_q_proj is not None
        x = hidden_states if apart or text is None else torch.cat([hidden_states, text], dim=1)
        q, k, v = locked_qkv(attn, (attn.to_q(x), attn.to_k(x), attn.to_v(x)), image_rotary_emb)
        if apart and text is not None:
            q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), _of_text(attn, text), strict=True))
        out = self.attend(q, k, v, attention_mask).flatten(2, 3)
        if text is None:
            return out, None
        video, text = out[:, :tokens], out[:, tokens:]
        if getattr(attn, "to_out", None) is not None:  # single blocks project after their attention
            video = projected(attn, video)
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


def _of_text(attn: Attention, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The text's queries, keys and values [B, L, H, D], by projections of their own."""
    projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    q, k, v = (project(text).unflatten(2, (attn.heads, -1)) for project in projections)
    q = q if attn.norm_added_q is None else attn.norm_added_q(q)
    return q, k if attn.norm_added_k is None else attn.norm_added_k(k), v
