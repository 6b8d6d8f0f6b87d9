"""Wan's self-attention by the prologue."""

from torch import Tensor, nn

from kvlock_fast.models.fast import FastProcessor
from kvlock_fast.models.fast_prologue import locked_qkv


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
