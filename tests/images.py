"""Parts of the image families' tiny pipelines, and how diffusers' own are called."""

import torch
from tiny import WORDS
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel


def tiny_autoencoder(kind, channels: int = 4, **changes):
    """Four pixels a latent."""
    torch.manual_seed(1)
    config = {
        "block_out_channels": (4, 4, 4), "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3, "latent_channels": channels, "layers_per_block": 1,
        "norm_num_groups": 2, "scaling_factor": 0.7, "shift_factor": 0.3, "use_quant_conv": False,
        "use_post_quant_conv": False,
    }  # fmt: skip
    return kind(**{**config, **changes}).eval()


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


def image_arguments(pipe, call):
    """A call of a text-to-image pipeline but for its scale; the text encoders in the transformer's dtype, as it asks."""
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and part is not None:
            part.to(pipe.transformer.dtype)
    return {name: value for name, value in call.arguments.items() if name not in ("num_frames", "guidance_scale")}
