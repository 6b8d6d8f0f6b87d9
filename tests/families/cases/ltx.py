"""LTX-Video as the conformance suite takes it."""

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from tests.support.conformance import Case
from tests.support.tiny import WORDS, tiny_tokenizer


def tiny_ltx(noisy_decoder: bool = False, scheduler=None) -> LTXPipeline:
    """noisy_decoder: an autoencoder that is told how noisy its latents are, as from 0.9.1 on."""
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=3, caption_channels=16,
    ).eval()  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1), patch_size=2,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        timestep_conditioning=noisy_decoder,
    ).eval()  # fmt: skip
    vae.latents_mean.copy_(torch.linspace(-0.3, 0.4, 8))
    vae.latents_std.copy_(torch.linspace(0.7, 1.3, 8))
    text = T5Config(vocab_size=len(WORDS) + 3, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe = LTXPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=T5EncoderModel(text).eval(),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler
        or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, base_image_seq_len=1024),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(pipe, call):
    """diffusers' own latents."""
    packed = pipe(**call.arguments).frames
    frames, height, width = call.latent_grid(pipe)
    return pipe._unpack_latents(packed, frames, height, width)


CASES = [
    Case("ltx", tiny_ltx, stock, size=(5, 64, 64), more={"max_sequence_length": 12}),
    Case("ltx-0.9.1", lambda: tiny_ltx(noisy_decoder=True), stock, size=(5, 64, 64), more={"max_sequence_length": 12}),
]
