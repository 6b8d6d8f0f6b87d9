"""Stable Diffusion 3 and 3.5 as the conformance suite takes them."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection

from tests.support.conformance import Case
from tests.support.images import image_arguments, tiny_autoencoder, tiny_clip, tiny_t5
from tests.support.tiny import tiny_tokenizer


def tiny_sd3(shifts: bool = False, t5: bool = True, **transformer) -> StableDiffusion3Pipeline:
    """SD3.5 medium: the first of three blocks has a second attention. shifts: a scheduler with a shift by resolution;
    t5: whether its large text encoder was loaded.
    """
    torch.manual_seed(0)
    config = {
        "sample_size": 12, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 32,
        "pooled_projection_dim": 24, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }  # fmt: skip
    transformer = SD3Transformer2DModel(**{**config, **transformer}).eval()
    shift = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64} if shifts else {}
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **shift),
        vae=tiny_autoencoder(AutoencoderKL),
        text_encoder=tiny_clip(12, CLIPTextModelWithProjection, hidden_act="gelu"),
        tokenizer=tiny_tokenizer(9),
        text_encoder_2=tiny_clip(12, CLIPTextModelWithProjection, hidden_act="quick_gelu"),
        tokenizer_2=tiny_tokenizer(9),
        text_encoder_3=tiny_t5(32) if t5 else None,
        tokenizer_3=tiny_tokenizer() if t5 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, call):
    length = 256 if pipe.tokenizer_3 is None else 12
    return pipe(**image_arguments(pipe, call), guidance_scale=call.guidance, max_sequence_length=length).images


def stock(pipe, call):
    return images(pipe, call)[:, :, None]


CASES = [
    Case("sd3.5-medium", tiny_sd3, stock, size=(1, 32, 48), frames=images),
    Case("sd3", lambda: tiny_sd3(dual_attention_layers=(), qk_norm=None), stock, size=(1, 32, 48), frames=images),
    Case("sd3.5-shifted", lambda: tiny_sd3(shifts=True, t5=False), stock, size=(1, 32, 48), frames=images),
]
