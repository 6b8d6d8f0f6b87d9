"""HunyuanVideo 1.5 as the conformance suite takes it."""

from functools import partial

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from PIL import Image
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from tests.support.conformance import Case
from tests.support.tiny import WORDS, tiny_tokenizer

FEATURES = 4
"""Of an image: 2 x 2 patches."""


def tiny_hunyuan15(image: bool = False, scheduler=None, **transformer):
    """image: for image-to-video."""
    torch.manual_seed(0)
    config = {
        "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 3,
        "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 8, "image_embed_dim": 8,
        "rope_axes_dim": (2, 4, 4), "target_size": 80,
    }  # fmt: skip
    parts = {"image_encoder": tiny_eyes(), "feature_extractor": tiny_feature_extractor()} if image else {}
    pipe = (HunyuanVideo15ImageToVideoPipeline if image else HunyuanVideo15Pipeline)(
        text_encoder=_qwen(),
        tokenizer=_chat_tokenizer(),
        transformer=HunyuanVideo15Transformer3DModel(**{**config, **transformer}).eval(),
        vae=_vae(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=_letters(),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(),
        **parts,
    )
    # The pipeline's own numbers are for its own encoders: 108 tokens of a system prompt, then 1000 of the user's.
    pipe.prompt_template_encode_start_idx, pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 60, 40, 12
    pipe.vision_num_semantic_tokens = FEATURES
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _vae() -> AutoencoderKLHunyuanVideo15:
    torch.manual_seed(1)
    return AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1, scaling_factor=0.7
    ).eval()


def _chat_tokenizer():
    tokenizer = tiny_tokenizer(200)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer


def _qwen() -> Qwen2_5_VLTextModel:
    torch.manual_seed(2)
    config = Qwen2_5_VLTextConfig(
        vocab_size=len(WORDS) + 3, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, rope_scaling={"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    return Qwen2_5_VLTextModel(config).eval()


def _letters() -> T5EncoderModel:
    torch.manual_seed(3)
    return T5EncoderModel(T5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).eval()


def tiny_eyes() -> SiglipVisionModel:
    torch.manual_seed(4)
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        )
    ).eval()


def tiny_feature_extractor() -> SiglipImageProcessor:
    return SiglipImageProcessor(size={"height": 8, "width": 8})


def stock(pipe, call):
    """diffusers' own latents."""
    return _call(pipe, call)


def stock_frames(pipe, call):
    """diffusers' own pixels."""
    return _call(pipe, call)[0]


def _call(pipe, call):
    arguments = dict(call.arguments)
    pipe.guider = ClassifierFreeGuidance(guidance_scale=arguments.pop("guidance_scale"))
    if isinstance(pipe, HunyuanVideo15ImageToVideoPipeline):
        arguments["image"] = Image.fromarray(call.case.video()[0])
        del arguments["height"], arguments["width"]
    return pipe(**arguments).frames


SIZE = 9, 64, 96
CASES = [
    Case("hunyuan-video-1.5", tiny_hunyuan15, stock, size=SIZE, frames=stock_frames, text_alone="context_embedder"),
    Case(
        "hunyuan-video-1.5-i2v",
        partial(tiny_hunyuan15, image=True),
        stock,
        size=SIZE,
        frames=stock_frames,
        text_alone="context_embedder",
    ),
]
