"""Mochi as the conformance suite takes it."""

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

from tests.support.conformance import Case
from tests.support.tiny import tiny_t5, tiny_tokenizer


def tiny_mochi(**changes) -> MochiPipeline:
    """A `MochiPipeline` of 3 layers; changes: of its autoencoder."""
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, pooled_projection_dim=16, text_embed_dim=16,
        time_embed_dim=8, max_sequence_length=12,
    ).eval()  # fmt: skip
    with torch.no_grad():  # positions that turn, and norms of their own
        transformer.pos_frequencies.normal_()
        for name, parameter in transformer.named_parameters():
            if "norm_k" in name or "norm_q" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    narrow = (32, 32, 32, 32)  # groups of 32 channels are not to be had narrower
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=narrow, decoder_block_out_channels=narrow, layers_per_block=(1, 1, 1, 1, 1),
        **{"scaling_factor": 0.8, **changes},
    ).eval()  # fmt: skip
    pipe = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        text_encoder=tiny_t5(),
        tokenizer=tiny_tokenizer(),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(pipe, call):
    """diffusers' own latents."""
    return pipe(**call.arguments).frames


HOST = "diffusers' own attention counts the text's tokens on the host, which a whole graph cannot"
CASES = [
    Case(
        "mochi", tiny_mochi, stock, size=(13, 32, 48), more={"max_sequence_length": 12},
        without={"test_compiled_blocks_take_one_graph_for_all_alphas": HOST},
    ),
]  # fmt: skip
