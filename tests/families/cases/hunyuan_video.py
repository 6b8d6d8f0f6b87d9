"""HunyuanVideo as the conformance suite takes it."""

from functools import partial

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.support.conformance import Case
from tests.support.tiny import WORDS, tiny_tokenizer

VOCABULARY = len(WORDS) + 3


def tiny_hunyuan_transformer(**changes) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2,
        "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 2, "text_embed_dim": 16,
        "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
    }  # fmt: skip
    return HunyuanVideoTransformer3DModel(**{**config, **changes}).eval()


def tiny_hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(1)
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, scaling_factor=0.7
    ).eval()


def tiny_llama() -> LlamaModel:
    torch.manual_seed(2)
    return LlamaModel(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2
        )
    ).eval()


def tiny_clip() -> CLIPTextModel:
    torch.manual_seed(3)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            eos_token_id=1,
        )
    ).eval()  # fmt: skip


def tiny_hunyuan(scheduler=None, **transformer) -> HunyuanVideoPipeline:
    pipe = HunyuanVideoPipeline(
        text_encoder=tiny_llama(),
        tokenizer=tiny_tokenizer(400),
        transformer=tiny_hunyuan_transformer(**transformer),
        vae=tiny_hunyuan_vae(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=tiny_clip(),
        tokenizer_2=tiny_tokenizer(77),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


MARKS = ("<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
IMAGE = VOCABULARY


def tiny_llava() -> LlavaForConditionalGeneration:
    """An image is 24 x 24 tokens, as the pipeline counts on."""
    torch.manual_seed(2)
    eyes = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=2
    )
    words = LlamaConfig(
        vocab_size=VOCABULARY + len(MARKS), hidden_size=16, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(vision_config=eyes, text_config=words, image_token_index=IMAGE, pad_token_id=0)
    return LlavaForConditionalGeneration(config).eval()


def tiny_hunyuan_i2v(kind: str, scheduler=None, **transformer) -> HunyuanVideoImageToVideoPipeline:
    """kind: the transformer's `image_condition_type`."""
    channels = {"latent_concat": 9, "token_replace": 4}[kind]
    tokenizer = tiny_tokenizer(400)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    pipe = HunyuanVideoImageToVideoPipeline(
        text_encoder=tiny_llava(),
        tokenizer=tokenizer,
        transformer=tiny_hunyuan_transformer(in_channels=channels, image_condition_type=kind, **transformer),
        vae=tiny_hunyuan_vae(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=tiny_clip(),
        tokenizer_2=tiny_tokenizer(77),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(pipe, call):
    """diffusers' own latents, whole: image-to-video of kind "latent_concat" gives back all but the first frame."""
    steps = []
    _call(pipe, call, callback_on_step_end=lambda pipe, k, timestep, given: steps.append(given["latents"]) or given)
    return steps[-1]


def stock_frames(pipe, call):
    """diffusers' own pixels, whole."""
    decode, decoded = pipe.vae.decode, []
    pipe.vae.decode = lambda *args, **kwargs: decoded.append(decode(*args, **kwargs)) or decoded[-1]
    try:
        _call(pipe, call)
    finally:
        del pipe.vae.decode
    return pipe.video_processor.postprocess_video(decoded[-1][0], output_type="np")[0]


def _call(pipe, call, **more):
    arguments = dict(call.arguments)
    if isinstance(pipe, HunyuanVideoImageToVideoPipeline):
        arguments["image"] = Image.fromarray(call.case.video()[0])
    if not pipe.transformer.config.guidance_embeds:
        arguments["true_cfg_scale"] = arguments["guidance_scale"]
    return pipe(**arguments, **more)


CASES = [
    Case("hunyuan-video", tiny_hunyuan, stock, guided=False, frames=stock_frames, text_alone="context_embedder"),
    Case(
        "hunyuan-video-cfg",
        partial(tiny_hunyuan, guidance_embeds=False),
        stock,
        frames=stock_frames,
        text_alone="context_embedder",
    ),
    Case(
        "hunyuan-video-i2v-concat",
        partial(tiny_hunyuan_i2v, "latent_concat", guidance_embeds=False),
        stock,
        frames=stock_frames,
        text_alone="context_embedder",
    ),
    Case(
        "hunyuan-video-i2v-replace",
        partial(tiny_hunyuan_i2v, "token_replace"),
        stock,
        guided=False,
        frames=stock_frames,
        text_alone="context_embedder",
        without={"test_encoding_is_the_inverse_of_what_decoding_does_to_latents": "the first frame is encoded apart"},
    ),
]
