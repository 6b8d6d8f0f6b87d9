"""Cosmos as the conformance suite takes it. The transformer without a padding mask, for which it needs torchvision."""

from functools import partial
from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKLCosmos,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image

from tests.support.conformance import Case
from tests.support.images import tiny_qwen_vl, tiny_t5
from tests.support.tiny import tiny_tokenizer, tiny_vae


class Checker(ModelMixin, ConfigMixin):
    """In the place of the safety checker: refuses dogs, and changes nothing."""

    def __init__(self):
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(1))

    def check_text_safety(self, prompt):
        return "dogs" not in prompt

    def check_video_safety(self, frames):
        return frames


def transformer(channels: int = 4, **changes) -> CosmosTransformer3DModel:
    torch.manual_seed(0)
    config = {
        "in_channels": channels, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 18, "num_layers": 3,
        "mlp_ratio": 2.0, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 32, 32),
        "concat_padding_mask": False,
    }  # fmt: skip
    made = CosmosTransformer3DModel(**{**config, **changes}).eval()
    for name, parameter in made.named_parameters():
        if "pos_emb" in name:
            torch.nn.init.normal_(parameter)
    return made


def cosmos_vae(**changes) -> AutoencoderKLCosmos:
    torch.manual_seed(1)
    return AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, **changes,
    ).eval()  # fmt: skip


def of(kind, transformer, vae, scheduler, **parts):
    words = {"text_encoder": tiny_t5(), "tokenizer": tiny_tokenizer(512)}
    pipe = kind(transformer=transformer, vae=vae, scheduler=scheduler, safety_checker=Checker(), **{**words, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cosmos(statistics: bool = False):
    """statistics: an autoencoder whose latents have a mean and a deviation in each frame."""
    changes = {}
    if statistics:
        changes = {
            "latents_mean": torch.linspace(-0.3, 0.4, 16).tolist(),
            "latents_std": torch.linspace(0.7, 1.3, 16).tolist(),
        }
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min")
    return of(CosmosTextToWorldPipeline, transformer(), cosmos_vae(**changes), scheduler)


def cosmos2_image():
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return of(Cosmos2TextToImagePipeline, transformer(extra_pos_embed_type=None), tiny_vae(), scheduler)


def cosmos2_video():
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    made = transformer(5, extra_pos_embed_type=None)
    return of(Cosmos2VideoToWorldPipeline, made, tiny_vae(), scheduler)


def cosmos25():
    words = tiny_tokenizer(512)
    words.chat_template = (
        "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }} {% endfor %}{% endfor %}"
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.01
    )
    made = transformer(5, text_embed_dim=32, extra_pos_embed_type=None)
    return of(Cosmos2_5_PredictBasePipeline, made, tiny_vae(), scheduler, text_encoder=tiny_qwen_vl(), tokenizer=words)


def stock(pipe, call):
    """diffusers' own latents."""
    return pipe(**call.arguments).frames


def stock_image(pipe, call):
    arguments = call.arguments
    del arguments["num_frames"]
    return pipe(**arguments).images[:, :, None]


def stock_picture(pipe, call):
    """diffusers' own pixels, [1, H, W, 3]."""
    arguments = call.arguments
    del arguments["num_frames"]
    return pipe(**arguments).images


def stock_from_picture(pipe, call):
    """Of the first frame, with the posterior's mode for its latents."""
    encode = pipe.vae.encode
    pipe.vae.encode = lambda x: SimpleNamespace(latents=encode(x).latent_dist.mode())
    try:
        return pipe(**call.arguments, image=Image.fromarray(call.case.video()[0])).frames
    finally:
        del pipe.vae.encode


def stock_video(pipe, call):
    """diffusers' own pixels."""
    return stock_from_picture(pipe, call)[0]


CASES = [
    Case("cosmos", cosmos, stock),
    Case("cosmos-statistics", partial(cosmos, statistics=True), stock),
    Case("cosmos2-image", cosmos2_image, stock_image, size=(1, 64, 96), frames=stock_picture),
    Case("cosmos2-video", cosmos2_video, stock_from_picture, frames=stock_video),
    Case("cosmos2.5", cosmos25, stock),
]
