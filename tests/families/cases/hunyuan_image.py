"""HunyuanImage as the conformance suite takes it."""

import torch
from diffusers import (
    AutoencoderKLHunyuanImage,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from tests.support.conformance import Case
from tests.support.images import image_arguments, tiny_qwen_vl
from tests.support.tiny import tiny_tokenizer


def tiny_hunyuan_image(told: bool = False, guider=True) -> HunyuanImagePipeline:
    """told: a transformer that is told the scale; guider: True for classifier-free guidance."""
    torch.manual_seed(0)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=8, rope_axes_dim=(8, 8), guidance_embeds=told,
    ).eval()  # fmt: skip
    vae = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(32, 32, 32), layers_per_block=1,
        spatial_compression_ratio=4, sample_size=64, scaling_factor=0.7,
    ).eval()  # fmt: skip
    letters = T5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    pipe = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vae,
        text_encoder=tiny_qwen_vl(),
        tokenizer=tiny_tokenizer(200),
        text_encoder_2=T5EncoderModel(letters).eval(),
        tokenizer_2=ByT5Tokenizer(),
        transformer=transformer,
        guider=ClassifierFreeGuidance() if guider is True else guider,
    )
    # The pipeline's own numbers are for its own encoders.
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 20, 12
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, call):
    if pipe.guider is not None:
        pipe.guider = ClassifierFreeGuidance(guidance_scale=call.guidance)
    return pipe(**image_arguments(pipe, call), distilled_guidance_scale=call.guidance).images


def stock(pipe, call):
    return images(pipe, call)[:, :, None]


CASES = [
    Case("hunyuan-image", tiny_hunyuan_image, stock, size=(1, 24, 32), frames=images),
    Case(
        "hunyuan-image-told",
        lambda: tiny_hunyuan_image(told=True, guider=None),
        stock,
        size=(1, 24, 32),
        guided=False,
        unguided=None,
        frames=images,
    ),
]
