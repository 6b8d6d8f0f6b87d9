"""Text for training, with the treatment `WanPipeline` gives it, but without carrying hundreds of padding tokens.

The pipeline sets embeddings beyond the prompt's end to zero and lets the transformer attend to them. All of these have
the same key and value, so n of them weigh as one with log(n) added to its score: that one is what training carries.
"""

from __future__ import annotations

import torch
from torch import nn

# Words and end mark of the longest caption of one object, and the stand-in for the padding.
TRAINED_WORDS = 24


class TrainingProcessor:
    """`WanAttnProcessor` for training on a CPU: the same values, attention as two plain products.

    PyTorch's fused CPU attention spends four times as long here, most of it going backwards. Cross-attention adds
    `bias` [B, 1, 1, words] to its scores.
    """

    bias: torch.Tensor | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        split = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, split).transpose(1, 2)
        key = attn.norm_k(attn.to_k(source)).unflatten(2, split).transpose(1, 2)
        value = attn.to_v(source).unflatten(2, split).transpose(1, 2)
        if rotary_emb is not None:
            query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
        scores = (query * query.shape[-1] ** -0.5).to(value.dtype) @ key.to(value.dtype).transpose(-1, -2)
        if encoder_hidden_states is not None and self.bias is not None:
            scores = scores + self.bias.to(scores.dtype)
        mixed = scores.softmax(-1).to(value.dtype) @ value
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [B, heads, S, D] by Wan's tables [1, S, 1, D] (each angle twice, neighbours rotate)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2].transpose(1, 2), sin[..., 1::2].transpose(1, 2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


def embed(text_encoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Token ids and mask [B, words] to embeddings [B, words, D], zero beyond the prompt's end."""
    hidden = text_encoder(ids, mask).last_hidden_state
    return hidden * mask[..., None].to(hidden.dtype)


def padding_bias(mask: torch.Tensor, total: int) -> torch.Tensor:
    """Score bias [B, 1, 1, words] which makes the last, empty token stand for all padding up to `total` tokens."""
    bias = torch.zeros(mask.shape).masked_fill(mask == 0, -1e4)
    bias[:, -1] = torch.log((total - mask.sum(1)).float())
    return bias[:, None, None]
