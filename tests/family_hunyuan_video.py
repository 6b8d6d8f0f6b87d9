"""HunyuanVideo as the conformance suite takes it."""

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from tiny import WORDS, tiny_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

VOCABULARY = len(WORDS) + 3


def tiny_hunyuan_transformer(**changes) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2,
        "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 2, "text_embed_dim": 16,
        "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
    }  # fmt: skip
    return HunyuanVideoTransformer3DModel(**{**config, **changes}).eval()


def tiny_hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(1)
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, scaling_factor=0.7
    ).eval()


def tiny_llama() -> LlamaModel:
    torch.manual_seed(2)
    return LlamaModel(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2
        )
    ).eval()


def tiny_clip() -> CLIPTextModel:
    torch.manual_seed(3)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            eos_token_id=1,
        )
    ).eval()  # fmt: skip


def tiny_hunyuan(scheduler=None, **transformer) -> HunyuanVideoPipeline:
    pipe = HunyuanVideoPipeline(
        text_encoder=tiny_llama(),
        tokenizer=tiny_tokenizer(400),
        transformer=tiny_hunyuan_transformer(**transformer),
        vae=tiny_hunyuan_vae(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=tiny_clip(),
        tokenizer_2=tiny_tokenizer(77),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
