"""CogView4 as the conformance suite takes it."""

import torch
from diffusers import AutoencoderKL, CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import GlmConfig, GlmModel

from tests.support.conformance import Case
from tests.support.images import image_arguments, tiny_autoencoder
from tests.support.tiny import WORDS, tiny_tokenizer


def tiny_cogview4() -> CogView4Pipeline:
    """A `CogView4Pipeline` of 3 layers."""
    torch.manual_seed(0)
    transformer = CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2, text_embed_dim=16,
        time_embed_dim=8, condition_dim=4, rope_axes_dim=(16, 16),
    ).eval()  # fmt: skip
    text = GlmConfig(
        vocab_size=len(WORDS) + 3, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    pipe = CogView4Pipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=GlmModel(text).eval(),
        vae=tiny_autoencoder(AutoencoderKL),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, call):
    return pipe(**image_arguments(pipe, call), guidance_scale=call.guidance).images


def stock(pipe, call):
    return images(pipe, call)[:, :, None]


CASES = [Case("cogview4", tiny_cogview4, stock, size=(1, 32, 48), frames=images)]
