"""Latte as the conformance suite takes it."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel

from tests.support.conformance import Case
from tests.support.tiny import tiny_t5, tiny_tokenizer

FRAMES = 5


def tiny_latte(scheduler=None) -> LattePipeline:
    """A `LattePipeline` of 2 pairs of layers that predicts a variance too."""
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24, caption_channels=16,
        in_channels=4, out_channels=8, sample_size=6, patch_size=2, video_length=FRAMES, attention_bias=True,
        activation_fn="gelu-approximate", norm_type="ada_norm_single", num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    ).eval()  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, scaling_factor=0.7,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip
    pipe = LattePipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_t5(),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler or DDIMScheduler(timestep_spacing="trailing", clip_sample=False),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(pipe, call):
    """diffusers' own latents."""
    return pipe(**of_latte(call)).frames


def pixels(pipe, call):
    """diffusers' own, [F, H, W, 3]."""
    return pipe(**of_latte(call)).frames[0]


def of_latte(call):
    """What it calls the number of frames."""
    arguments = call.arguments
    arguments["video_length"] = arguments.pop("num_frames")
    return arguments


def blend(x, source, scene, alpha):
    """K or V [rows, H, n, D]: a row is a frame of a sample, or a place of it."""
    frames, height, width = scene.mask.grid
    places = height * width
    inside = scene.inside.view(frames, places)
    inside = inside if x.shape[2] == places else inside.T
    weight = torch.where(inside, 0.0, alpha).double()[:, None, :, None]
    return torch.lerp(x.double(), source.double(), weight).to(x.dtype)


CASES = [
    Case(
        "latte", tiny_latte, stock, size=(FRAMES, 48, 64), blend=blend, frames=pixels,
    ),
]  # fmt: skip
