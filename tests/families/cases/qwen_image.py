"""Qwen-Image as the conformance suite takes it."""

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from tests.support.conformance import Case
from tests.support.images import blend_after_text, image_arguments, tiny_qwen_vl
from tests.support.tiny import tiny_tokenizer


def tiny_qwen_image() -> QwenImagePipeline:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 0.7],
    ).eval()  # fmt: skip
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=0.02, base_image_seq_len=16, max_image_seq_len=64
        ),
        vae=vae,
        text_encoder=tiny_qwen_vl(),
        tokenizer=tiny_tokenizer(2048),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, call):
    return pipe(**image_arguments(pipe, call), true_cfg_scale=call.guidance).images


def stock(pipe, call):
    _, height, width = call.case.size
    return pipe._unpack_latents(images(pipe, call), height, width, pipe.vae_scale_factor)


CASES = [Case("qwen-image", tiny_qwen_image, stock, size=(1, 32, 48), frames=images, blend=blend_after_text)]
