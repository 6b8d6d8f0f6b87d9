"""FramePack as the conformance suite takes it: one section."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
)
from PIL import Image

from tests.families.cases.hunyuan_video import tiny_clip, tiny_hunyuan_vae, tiny_llama
from tests.families.cases.hunyuan_video15 import tiny_eyes, tiny_feature_extractor
from tests.support.conformance import Case
from tests.support.tiny import tiny_tokenizer


def tiny_framepack() -> HunyuanVideoFramepackPipeline:
    torch.manual_seed(0)
    transformer = HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4), has_image_proj=True,
        image_proj_dim=8, has_clean_x_embedder=True,
    ).eval()  # fmt: skip
    pipe = HunyuanVideoFramepackPipeline(
        text_encoder=tiny_llama(),
        tokenizer=tiny_tokenizer(400),
        transformer=transformer,
        vae=tiny_hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder_2=tiny_clip(),
        tokenizer_2=tiny_tokenizer(77),
        image_encoder=tiny_eyes(),
        feature_extractor=tiny_feature_extractor(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(pipe, call):
    """diffusers' own latents."""
    return _call(pipe, call)[0]


def stock_frames(pipe, call):
    """diffusers' own pixels."""
    return _call(pipe, call)[0]


def _call(pipe, call):
    """With the posterior's mode for the image; a section of all frames but the first."""
    image, arguments = Image.fromarray(call.case.video()[0]), dict(call.arguments)
    window = (arguments["num_frames"] - 1) // 4
    pipe.prepare_image_latents = lambda image, **_: (
        pipe.vae.encode(image[:, :, None]).latent_dist.mode() * pipe.vae.config.scaling_factor
    )
    try:
        return pipe(**{**arguments, "image": image, "latent_window_size": window, "num_frames": 1}).frames
    finally:
        del pipe.prepare_image_latents


CASES = [
    Case(
        "framepack",
        tiny_framepack,
        stock,
        guided=False,
        frames=stock_frames,
        text_alone="context_embedder",
        without={"test_encoding_is_the_inverse_of_what_decoding_does_to_latents": "the first frame is encoded apart"},
    )
]
