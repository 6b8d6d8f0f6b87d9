"""EasyAnimate as the conformance suite takes it."""

from functools import partial

import torch
from diffusers import (
    AutoencoderKLMagvit,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import BertConfig, BertModel

from tests.support.conformance import Case
from tests.support.tiny import WORDS, tiny_tokenizer

CHAT = "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"


def tiny_easyanimate(own_projections: int = 3, channels: int = 4) -> EasyAnimatePipeline:
    """An `EasyAnimatePipeline` of 3 layers, of which so many have projections of the text's own."""
    torch.manual_seed(0)
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4, patch_size=2, num_layers=3,
        mmdit_layers=own_projections, time_embed_dim=8, text_embed_dim=16,
    ).eval()  # fmt: skip
    with torch.no_grad():  # norms of their own
        for name, parameter in transformer.named_parameters():
            if "norm_k" in name or "norm_q" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    vae = AutoencoderKLMagvit(
        block_out_channels=[8, 8, 8, 8], latent_channels=4, layers_per_block=1, norm_num_groups=2, scaling_factor=0.7,
        down_block_types=[
            "SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D",
            "SpatialTemporalDownBlock3D",
        ],
        up_block_types=[
            "SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D",
        ],
    ).eval()  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    text = BertConfig(
        vocab_size=len(WORDS) + 3, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    pipe = EasyAnimatePipeline(
        vae=vae,
        text_encoder=BertModel(text).eval(),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(pipe, call):
    """diffusers' own latents."""
    return pipe(**call.arguments).frames


CASES = [
    Case("easyanimate", tiny_easyanimate, stock),
    Case("easyanimate-shared-projections", partial(tiny_easyanimate, own_projections=1), stock),
]
