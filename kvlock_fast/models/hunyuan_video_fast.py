"""HunyuanVideo's attentions by the prologue: text behind the video, by projections of its own or by the same."""

import torch
from torch import Tensor, nn

from kvlock_fast.models.fast import FastProcessor
from kvlock_fast.models.fast_prologue import locked_qkv


class HunyuanVideoFastProcessor(FastProcessor):
    """In place of diffusers' `HunyuanVideoAttnProcessor2_0` in a locked self-attention."""

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
