"""AuraFlow as the conformance suite takes it."""

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler

from tests.support.conformance import Case
from tests.support.images import image_arguments, tiny_autoencoder
from tests.support.tiny import tiny_t5, tiny_tokenizer


def tiny_aura_flow() -> AuraFlowPipeline:
    """An `AuraFlowPipeline` of 3 layers, of which one has projections of the text's own."""
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
        pos_embed_max_size=64,
    ).eval()  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    pipe = AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_t5(),
        vae=tiny_autoencoder(AutoencoderKL),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, call):
    return pipe(**image_arguments(pipe, call), guidance_scale=call.guidance, max_sequence_length=12).images


def stock(pipe, call):
    return images(pipe, call)[:, :, None]


CASES = [Case("aura-flow", tiny_aura_flow, stock, size=(1, 32, 48), frames=images)]
