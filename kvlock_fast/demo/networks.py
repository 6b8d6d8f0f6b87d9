"""The demo model's parts, untrained, and the words it understands: sizes chosen so that two CPU cores can train it.

The autoencoder has Wan 2.2's form (residual blocks, 2x2 pixel patches): 64x64x17 pixels become latents [12, 5, 8, 8].
The transformer has Wan 2.1's form with a token per latent position, so that masks are followed to 8 pixels.
"""

from __future__ import annotations

LATENT_CHANNELS = 12
TEXT_DIM = 96
# A caption of one object has at most 22 words, of two 40.
MAX_WORDS = 48

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


def make_tokenizer():
    """One token per word of the grammar, lower case, then `</s>`; other words become `<unk>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from kvlock_fast.demo.scene import vocabulary

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
