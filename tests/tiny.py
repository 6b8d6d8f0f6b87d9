"""Tiny random pipelines of the real diffusers classes, made in memory."""

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "moves",
    "left",
    "right",
    "over",
    "dark",
    "stripes",
    "cat",
    "dog",
]


def tiny_tokenizer(length: int = 12) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def tiny_transformer(seed: int = 0, **changes) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    config = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 64,
    }  # fmt: skip
    return WanTransformer3DModel(**{**config, **changes}).eval()


def tiny_vae(seed: int = 0) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 0.7],
    ).eval()  # fmt: skip


def tiny_wan(scheduler=None, second: bool = False, **transformer) -> WanPipeline:
    """A `WanPipeline` of 3 layers; `second` adds Wan 2.2's low-noise transformer from half the noise on."""
    torch.manual_seed(0)
    text = UMT5Config(
        vocab_size=len(WORDS) + 3,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    pipe = WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=tiny_vae(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_transformer(**transformer),
        transformer_2=tiny_transformer(seed=5, **transformer) if second else None,
        boundary_ratio=0.5 if second else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def untouched(transformer) -> bool:
    """Whether no lock is on it, and nothing of one is left."""
    return not any(
        type(module).__name__.startswith("Locked") or hasattr(module, "kvlock_number")
        for module in transformer.modules()
    )
