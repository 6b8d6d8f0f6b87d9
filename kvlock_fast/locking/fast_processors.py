"""Self-attentions whose projections go through the prologue: a class for each family of the fast path."""

import torch
from torch import Tensor, nn

from kvlock_fast.locking.fast_path import FastProcessor
from kvlock_fast.locking.fast_qkv import locked_qkv


class WanFastProcessor(FastProcessor):
    """In place of diffusers' `WanAttnProcessor` in a locked self-attention."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        # Nothing here holds the projections while the attention runs.
        x = hidden_states
        qkv = locked_qkv(attn, (attn.to_q(x), attn.to_k(x), attn.to_v(x)), rotary_emb)
        out = self.attend(*qkv, attention_mask)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))


class CogVideoXFastProcessor(FastProcessor):
    """In place of diffusers' `CogVideoXAttnProcessor2_0` in a locked joint attention: text in front of the video."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        words, x = encoder_hidden_states.shape[1], torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if attention_mask is not None:
            rows, tokens = x.shape[:2]
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, rows)
            attention_mask = attention_mask.view(rows, attn.heads, -1, attention_mask.shape[-1])
        # Nothing here holds the projections while the attention runs.
        qkv = locked_qkv(attn, (attn.to_q(x), attn.to_k(x), attn.to_v(x)), image_rotary_emb)
        out = self.attend(*qkv, attention_mask)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))
        return out[:, words:], out[:, :words]


class LTXFastProcessor(FastProcessor):
    """In place of diffusers' `LTXVideoAttnProcessor` in a locked self-attention. Heads have angles of their own."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            rows, tokens = hidden_states.shape[:2]
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, rows)
            attention_mask = attention_mask.view(rows, attn.heads, -1, attention_mask.shape[-1])
        # Nothing here holds the projections while the attention runs.
        x = hidden_states
        qkv = locked_qkv(attn, (attn.to_q(x), attn.to_k(x), attn.to_v(x)), image_rotary_emb)
        out = self.attend(*qkv, attention_mask)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))


class HunyuanVideoFastProcessor(FastProcessor):
    """In place of diffusers' `HunyuanVideoAttnProcessor2_0` in a locked self-attention.

    The text is behind the video, by projections of its own or by the same.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
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
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


def _of_text(attn: nn.Module, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Its queries, keys and values [B, L, H, D], by projections of their own."""
    projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    q, k, v = (project(text).unflatten(2, (attn.heads, -1)) for project in projections)
    q = q if attn.norm_added_q is None else attn.norm_added_q(q)
    return q, k if attn.norm_added_k is None else attn.norm_added_k(k), v
