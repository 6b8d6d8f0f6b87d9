"""LTX-2 as the conformance suite takes it."""

import pytest
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3TextConfig, Gemma3TextModel

from kvlock_fast.models import wrap_pipeline
from tests.support.conformance import Case
from tests.support.tiny import WORDS, tiny_tokenizer

TEXT = 12


def tiny_ltx2(newer: bool = False) -> LTX2Pipeline:
    """An `LTX2Pipeline` of 2 layers; newer: with gates and texts that are modulated, as from 2.3 on."""
    torch.manual_seed(0)
    text = Gemma3TextConfig(
        vocab_size=len(WORDS) + 3, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=8, text_proj_in_factor=3, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4, video_connector_num_layers=1, video_connector_num_learnable_registers=4,
        audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=4, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=4, rope_double_precision=False,
    ).eval()  # fmt: skip
    gates = dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), newer)
    transformer = LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=6,
        audio_cross_attention_dim=12, num_layers=2, caption_channels=8, rope_double_precision=False,
        vae_scale_factors=(2, 8, 8), **gates,
    ).eval()  # fmt: skip
    vae = AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), down_block_types=("LTX2VideoDownBlock3D",),
        downsample_type=("spatiotemporal",), upsample_type=("spatiotemporal",), upsample_residual=(True,),
        upsample_factor=(2,),
    ).eval()  # fmt: skip
    vae.latents_mean.copy_(torch.linspace(-0.3, 0.4, 8))
    vae.latents_std.copy_(torch.linspace(0.7, 1.3, 8))
    pipe = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=vae,
        audio_vae=AutoencoderKLLTX2Audio(
            base_channels=8, latent_channels=2, mel_bins=16, num_res_blocks=1, resolution=32
        ).eval(),
        text_encoder=Gemma3TextModel(text).eval(),
        tokenizer=tiny_tokenizer(),
        connectors=connectors,
        transformer=transformer,
        vocoder=LTX2Vocoder(
            in_channels=32, hidden_channels=16, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
            resnet_kernel_sizes=[3], resnet_dilations=[[1]],
        ).eval(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def neutral(call):
    """The arguments, with guidance by the text alone."""
    return {
        **call.arguments, "audio_guidance_scale": call.guidance, "stg_scale": 0.0, "audio_stg_scale": 0.0,
        "modality_scale": 1.0, "audio_modality_scale": 1.0, "guidance_rescale": 0.0, "audio_guidance_rescale": 0.0,
    }  # fmt: skip


def stock(pipe, call):
    """diffusers' own latents of video and sound, which it would return without their normalisation."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_denormalize_latents", "_denormalize_audio_latents"):
            patch.setattr(type(pipe), name, staticmethod(lambda latents, *_: latents))
        video, sound = pipe(**neutral(call), return_dict=False)
    return wrap_pipeline(pipe)._joined(video, pipe._pack_audio_latents(sound))


def pixels(pipe, call):
    """diffusers' own, [F, H, W, 3]."""
    return pipe(**neutral(call)).frames[0]


CASES = [
    Case(
        name, make, stock, size=(5, 32, 64), more={"max_sequence_length": TEXT, "decode_timestep": 0.0},
        frames=pixels,
    )
    for name, make in (("ltx2", tiny_ltx2), ("ltx2.3", lambda: tiny_ltx2(newer=True)))
]  # fmt: skip
