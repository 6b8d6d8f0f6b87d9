"""Tiny random pipelines of the real diffusers classes, made in memory."""

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

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


def tiny_t5() -> T5EncoderModel:
    """Of 16 channels."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(WORDS) + 3, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


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


COGVIDEOX_SCHEDULE = {
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    "clip_sample": False,
}  # fmt: skip
"""As CogVideoX's checkpoints have it."""
COGVIDEOX_KINDS = {
    "2b": {},
    "5b": {"use_rotary_positional_embeddings": True},
    "1.5": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
}


def tiny_cogvideox_transformer(**changes) -> CogVideoXTransformer3DModel:
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
        "text_embed_dim": 16, "num_layers": 3, "sample_width": 8, "sample_height": 6, "sample_frames": 9,
        "patch_size": 2, "max_text_seq_length": 7,
    }  # fmt: skip
    transformer = CogVideoXTransformer3DModel(**{**config, **changes}).eval()
    with torch.no_grad():  # norms of their own, so that K is not what leaves a norm of 1
        for name, parameter in transformer.named_parameters():
            if "norm_k" in name or "norm_q" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return transformer


def tiny_cogvideox(kind: str = "2b", scheduler=None, **transformer) -> CogVideoXPipeline:
    """A `CogVideoXPipeline` of 3 layers: with positions added to patches, rotary ones, or two latent frames a token."""
    transformer = tiny_cogvideox_transformer(**{**COGVIDEOX_KINDS[kind], **transformer})
    torch.manual_seed(1)
    text = T5Config(vocab_size=len(WORDS) + 3, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2, scaling_factor=0.7,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    ).eval()  # fmt: skip
    pipe = CogVideoXPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=T5EncoderModel(text).eval(),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler or CogVideoXDDIMScheduler(**COGVIDEOX_SCHEDULE),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def untouched(transformer) -> bool:
    """Whether no lock is on it, and nothing of one is left."""
    return not any(
        type(module).__name__.startswith("Locked") or hasattr(module, "kvlock_number")
        for module in transformer.modules()
    )
