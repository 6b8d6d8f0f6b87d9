"""Parts of the image families' tiny pipelines, and how diffusers' own are called."""

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from tests.support.tiny import WORDS


def tiny_autoencoder(kind, channels: int = 4, **changes):
    """Four pixels a latent; a change to None leaves it out."""
    torch.manual_seed(1)
    config = {
        "block_out_channels": (4, 4, 4), "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3, "latent_channels": channels, "layers_per_block": 1,
        "norm_num_groups": 2, "scaling_factor": 0.7, "shift_factor": 0.3, "use_quant_conv": False,
        "use_post_quant_conv": False,
    }  # fmt: skip
    config = {name: value for name, value in {**config, **changes}.items() if value is not None}
    return kind(**config).eval()


def tiny_clip(width: int, kind=CLIPTextModel, **changes):
    """A text encoder of one layer, which gives a vector of a text beside those of its tokens."""
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 3, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=width, bos_token_id=0, eos_token_id=1, pad_token_id=0, **changes,
    )  # fmt: skip
    return kind(config).eval()


def tiny_t5(width: int = 16) -> T5EncoderModel:
    torch.manual_seed(3)
    return T5EncoderModel(
        T5Config(vocab_size=len(WORDS) + 3, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()


def tiny_qwen_vl(width: int = 16) -> Qwen2_5_VLForConditionalGeneration:
    """A language model that could see, of two layers."""
    torch.manual_seed(4)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": len(WORDS) + 3, "rope_parameters": rope, "rope_scaling": rope,
            "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width,
            "fullatt_block_indexes": [0],
        },
        vision_start_token_id=0, vision_end_token_id=0, vision_token_id=0, image_token_id=0, video_token_id=0,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def image_arguments(pipe, call):
    """A call of a text-to-image pipeline but for its scale; the text encoders in the transformer's dtype."""
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and part is not None:
            part.to(pipe.transformer.dtype)
    return {name: value for name, value in call.arguments.items() if name not in ("num_frames", "guidance_scale")}


def blend_after_text(x, source, scene, alpha):
    """`blend_at_call` where the image's tokens come last, and texts are of different lengths."""
    mixed, last = x.double().clone(), slice(-scene.tokens, None)
    weight = torch.where(scene.inside, 0.0, alpha).double()[:, None]
    mixed[:, :, last] = (1 - weight) * mixed[:, :, last] + weight * source[:, :, last].double()
    return mixed.to(x.dtype)
