"""Allegro as the conformance suite takes it."""

import torch
from diffusers import AllegroPipeline, AllegroTransformer3DModel, AutoencoderKLAllegro, DDIMScheduler

from tests.support.conformance import Case
from tests.support.tiny import tiny_t5, tiny_tokenizer

TILE, TILE_STRIDE = (8, 32, 32), (4, 16, 16)
"""Frames, height and width; diffusers' own are 24, 320, 320 whatever the config."""


def tiny_allegro(scheduler=None) -> AllegroPipeline:
    """An `AllegroPipeline` of 3 layers, with DDIM in the place of the noisy scheduler that its checkpoints have."""
    torch.manual_seed(0)
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=3, cross_attention_dim=24, caption_channels=16,
        sample_height=8, sample_width=8, sample_frames=3,
    ).eval()  # fmt: skip
    vae = AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, scaling_factor=0.7
    ).eval()
    vae.kernel, vae.stride = TILE, TILE_STRIDE
    vae.enable_tiling()
    pipe = AllegroPipeline(
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
    return pipe(**call.arguments).frames


CASES = [
    Case("allegro", tiny_allegro, stock, size=(12, 32, 48), more={"max_sequence_length": 12}),
]
