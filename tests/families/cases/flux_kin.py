"""Families that took over FLUX.1's way, as the conformance suite takes them."""

import torch
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)
from transformers import Qwen3Config, Qwen3Model

from tests.support.conformance import Case
from tests.support.images import image_arguments, tiny_autoencoder, tiny_qwen_vl, tiny_t5
from tests.support.tiny import WORDS, tiny_tokenizer

SAID = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
BLOCKS = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
TOKENS = 12


def shifting():
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_chroma() -> ChromaPipeline:
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        **BLOCKS, approximator_num_channels=8, approximator_hidden_dim=32, approximator_layers=1
    ).eval()
    return quiet(
        ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_autoencoder(AutoencoderKL),
            text_encoder=tiny_t5(),
            tokenizer=tiny_tokenizer(TOKENS),
            transformer=transformer,
        )
    )


def tiny_ovis_image() -> OvisImagePipeline:
    torch.manual_seed(0)
    transformer = OvisImageTransformer2DModel(**BLOCKS, out_channels=16).eval()
    config = Qwen3Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, vocab_size=len(WORDS) + 3, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    tokenizer = tiny_tokenizer(TOKENS)
    tokenizer.chat_template = SAID
    pipe = OvisImagePipeline(
        scheduler=shifting(),
        vae=tiny_autoencoder(AutoencoderKL),
        text_encoder=Qwen3Model(config).eval(),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipe.user_prompt_begin_id = 17  # tokens of its instructions, by a tokenizer of words
    return quiet(pipe)


def tiny_longcat_image() -> LongCatImagePipeline:
    torch.manual_seed(0)
    transformer = LongCatImageTransformer2DModel(**{**BLOCKS, "in_channels": 64}).eval()
    tokenizer = tiny_tokenizer(TOKENS)
    pipe = LongCatImagePipeline(
        scheduler=shifting(),
        vae=tiny_autoencoder(AutoencoderKL, 16),
        text_encoder=tiny_qwen_vl(),
        tokenizer=tokenizer,
        text_processor=tokenizer,
        transformer=transformer,
    )
    pipe.tokenizer_max_length = TOKENS
    return quiet(pipe)


def images(pipe, call):
    asked = {"enable_prompt_rewrite": False} if isinstance(pipe, LongCatImagePipeline) else {
        "max_sequence_length": TOKENS
    }  # fmt: skip
    return pipe(**image_arguments(pipe, call), guidance_scale=call.guidance, **asked).images


def stock(pipe, call):
    _, height, width = call.case.size
    return pipe._unpack_latents(images(pipe, call), height, width, pipe.vae_scale_factor)[:, :, None]


CASES = [
    Case("chroma", tiny_chroma, stock, size=(1, 32, 48), frames=images),
    Case("ovis-image", tiny_ovis_image, stock, size=(1, 32, 48), frames=images),
    Case("longcat-image", tiny_longcat_image, stock, size=(1, 32, 48), frames=images),
]
