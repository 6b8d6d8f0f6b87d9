"""Motif-Video as the conformance suite takes it."""

from functools import partial

import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
)
from transformers import T5Gemma2Encoder, T5Gemma2EncoderConfig

from tests.support.conformance import Case
from tests.support.tiny import WORDS, tiny_tokenizer, tiny_vae


def tiny_motif(**transformer) -> MotifVideoPipeline:
    torch.manual_seed(0)
    config = {
        "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
        "num_single_layers": 2, "mlp_ratio": 2.0, "text_embed_dim": 16, "rope_axes_dim": (2, 4, 4),
    }  # fmt: skip
    pipe = MotifVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(),
        text_encoder=_words(),
        tokenizer=tiny_tokenizer(512),
        transformer=MotifVideoTransformer3DModel(**{**config, **transformer}).eval(),
        guider=ClassifierFreeGuidance(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _words() -> T5Gemma2Encoder:
    torch.manual_seed(1)
    text = {
        "vocab_size": len(WORDS) + 3, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 0,
        "eos_token_id": 1, "dropout_rate": 0.0,
    }  # fmt: skip
    eyes = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    config = T5Gemma2EncoderConfig(text_config=text, vision_config=eyes, mm_tokens_per_image=4, image_token_index=16)
    return T5Gemma2Encoder(config).eval()


def stock(pipe, call):
    """diffusers' own latents."""
    return _call(pipe, call)


def stock_frames(pipe, call):
    """diffusers' own pixels."""
    return _call(pipe, call)[0]


def _call(pipe, call):
    arguments = dict(call.arguments)
    pipe.guider = ClassifierFreeGuidance(guidance_scale=arguments.pop("guidance_scale"))
    return pipe(**arguments).frames


WITH_DECODERS = {
    "num_single_layers": 3, "num_decoder_layers": 1, "enable_text_cross_attention_dual": True,
    "enable_text_cross_attention_single": True,
}  # fmt: skip
CASES = [
    Case("motif", tiny_motif, stock, frames=stock_frames),
    Case("motif-decoders", partial(tiny_motif, **WITH_DECODERS), stock, frames=stock_frames),
]
