"""FLUX.1 as the conformance suite takes it."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from tests.support.conformance import Case
from tests.support.images import image_arguments, tiny_autoencoder, tiny_clip, tiny_t5
from tests.support.tiny import tiny_tokenizer


def tiny_flux(guidance_embeds: bool = True, scheduler=None, **changes) -> FluxPipeline:
    """guidance_embeds: whether the transformer is told the scale, as dev; else as schnell."""
    torch.manual_seed(0)
    config = {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 16, "pooled_projection_dim": 12, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    transformer = FluxTransformer2DModel(**{**config, "guidance_embeds": guidance_embeds, **changes}).eval()
    shifts = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64)
    pipe = FluxPipeline(
        scheduler=scheduler or (shifts if guidance_embeds else FlowMatchEulerDiscreteScheduler()),
        vae=tiny_autoencoder(AutoencoderKL),
        text_encoder=tiny_clip(12),
        tokenizer=tiny_tokenizer(9),
        text_encoder_2=tiny_t5(),
        tokenizer_2=tiny_tokenizer(),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, call):
    """diffusers' own images, or packed latents."""
    scale = {"guidance_scale": call.guidance} if call.case.name == "flux-dev" else {"true_cfg_scale": call.guidance}
    return pipe(**image_arguments(pipe, call), **scale, max_sequence_length=12).images


def stock(pipe, call):
    _, height, width = call.case.size
    return pipe._unpack_latents(images(pipe, call), height, width, pipe.vae_scale_factor)[:, :, None]


CASES = [
    Case("flux-dev", tiny_flux, stock, size=(1, 32, 48), guided=False, unguided=None, frames=images),
    Case("flux-schnell", lambda: tiny_flux(False), stock, size=(1, 32, 48), frames=images),
]
