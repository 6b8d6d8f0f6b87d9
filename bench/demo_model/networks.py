"""The demo model's parts, untrained, the words it understands, and how texts are given to it while it trains.

Sizes are chosen so that two CPU cores can train it. The autoencoder has Wan 2.2's form (residual blocks, 2x2 pixel
patches): 64x64x17 pixels become latents [12, 5, 8, 8]. The transformer has Wan 2.1's form with a token per latent
position, so that masks are followed to 8 pixels.

Texts are treated as in `WanPipeline`, but without carrying hundreds of padding tokens. The pipeline sets embeddings
beyond the prompt's end to zero and lets the transformer attend to them. All of these have the same key and value, so n
of them weigh as one with log(n) added to its score: that one is what training carries.
"""

from __future__ import annotations

import torch
from torch import nn

from kvlock_fast.demo.scene import BENDS, COLOURS, PANS, PATTERNS, PLACES, SHAPES, SIZES

LATENT_CHANNELS = 12
TEXT_DIM = 96
# A caption of one object has at most 22 words, of two 40.
MAX_WORDS = 48
# Words and end mark of the longest caption of one object, and the stand-in for the padding.
TRAINED_WORDS = 24

VAE_CONFIG = {
    "base_dim": 32,
    "decoder_base_dim": 32,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.0] * LATENT_CHANNELS,
    "latents_std": [1.0] * LATENT_CHANNELS,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
TRANSFORMER_CONFIG = {
    "patch_size": (1, 1, 1),
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 5,
    "rope_max_seq_len": 64,
}
SHIFT = 3.0


def make_vae():
    """An untrained `AutoencoderKLWan`."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**VAE_CONFIG)


def make_transformer():
    """An untrained `WanTransformer3DModel`."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**TRANSFORMER_CONFIG)


def make_text_encoder(vocab_size: int):
    """An untrained two-layer `UMT5EncoderModel`."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=24,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        is_encoder_decoder=False,
    )
    return UMT5EncoderModel(config)


def vocabulary() -> list[str]:
    """List every word of the captions' grammar, sorted: those that the tokenizer knows."""
    parts = [*COLOURS, *SHAPES, *SIZES, *PLACES, *BENDS, *PATTERNS, *PANS]
    parts += ["a staying at the moving from to over and background"]
    return sorted({word for part in parts for word in part.split()})


def make_tokenizer():
    """One token per word of the grammar, lower case, then `</s>`; other words become `<unk>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_WORDS,
    )


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
