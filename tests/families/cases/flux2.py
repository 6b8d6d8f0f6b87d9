"""FLUX.2 and FLUX.2 Klein as the conformance suite takes them."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.support.conformance import NEGATIVE, Case
from tests.support.images import image_arguments, tiny_autoencoder
from tests.support.tiny import WORDS, tiny_tokenizer

LANGUAGE = {
    "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
    "vocab_size": len(WORDS) + 4, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
"""Narrow, but as deep as the layers that the pipelines take their texts from."""
TOKENS = 60
SAID = "{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][0]['text'] }} {% endfor %}"


def parts(text_channels: int, guidance_embeds: bool) -> dict:
    """All but text encoder and tokenizer."""
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=text_channels, timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    ).eval()  # fmt: skip
    left_out = dict.fromkeys(("scaling_factor", "shift_factor"))
    vae = tiny_autoencoder(AutoencoderKLFlux2, **left_out)
    with torch.no_grad():
        vae.bn.running_mean.copy_(torch.linspace(-0.3, 0.4, 16))
        vae.bn.running_var.copy_(torch.linspace(0.5, 1.5, 16))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return {"scheduler": scheduler, "vae": vae, "transformer": transformer}


def tiny_flux2() -> Flux2Pipeline:
    """Its processor, which needs torchvision, is its tokenizer here."""
    tokenizer = tiny_tokenizer(TOKENS)
    tokenizer.chat_template = SAID
    torch.manual_seed(4)
    config = Mistral3Config(
        text_config={"model_type": "mistral", "num_hidden_layers": 30, **LANGUAGE},
        vision_config={
            "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "head_dim": 4, "image_size": 28, "patch_size": 14,
        },
        image_token_index=len(WORDS) + 3,
    )  # fmt: skip
    pipe = Flux2Pipeline(
        **parts(24, True),
        text_encoder=Mistral3ForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_klein(distilled: bool = False) -> Flux2KleinPipeline:
    torch.manual_seed(4)
    tokenizer = tiny_tokenizer(TOKENS)
    tokenizer.chat_template = SAID
    pipe = Flux2KleinPipeline(
        **parts(24, False),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=28, **LANGUAGE)).eval(),
        tokenizer=tokenizer,
        is_distilled=distilled,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, call, **more):
    arguments = image_arguments(pipe, call)
    del arguments["negative_prompt"]
    if isinstance(pipe, Flux2KleinPipeline):  # which knows no words of a negative prompt, but its embeddings
        arguments["negative_prompt_embeds"] = pipe.encode_prompt(NEGATIVE, max_sequence_length=TOKENS)[0]
    return pipe(**arguments, guidance_scale=call.guidance, max_sequence_length=TOKENS, **more).images


def stock(pipe, call):
    """As they leave the last step: Klein's output is no longer normalised."""
    _, height, width = call.latent_grid(pipe)
    kept = {}
    images(pipe, call, callback_on_step_end=lambda pipe, i, t, tensors: kept.update(tensors) or {})
    return kept["latents"].transpose(1, 2).unflatten(2, (1, height, width))


CASES = [
    Case("flux2-dev", tiny_flux2, stock, size=(1, 32, 48), guided=False, unguided=None, frames=images),
    Case("flux2-klein", tiny_klein, stock, size=(1, 32, 48), frames=images),
]
