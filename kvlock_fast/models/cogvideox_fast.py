"""CogVideoX's joint attention by the prologue: text in front of the video."""

import torch
from torch import Tensor, nn

from kvlock_fast.models.fast import FastProcessor
from kvlock_fast.models.fast_prologue import locked_qkv


class CogVideoXFastProcessor(FastProcessor):
    """In place of diffusers' `CogVideoXAttnProcessor2_0` in a locked self-attention."""

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
