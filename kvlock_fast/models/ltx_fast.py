"""LTX-Video's self-attention by the prologue."""

from torch import Tensor, nn

from kvlock_fast.models.fast import FastProcessor
from kvlock_fast.models.fast_prologue import locked_qkv


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
