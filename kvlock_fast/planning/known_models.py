"""Sizes of the known models by name, written down so that a plan by name builds no module.

The tests hold every number to diffusers' modules on the meta device, and to transformers' text encoders.
"""

from collections.abc import Mapping
from typing import Any

import torch

from kvlock_fast.masks import Geometry
from kvlock_fast.planning.model_size import ModelSize

UMT5_XXL, T5_XXL, LLAMA_3_8B, CLIP_L = 5_680_910_336, 4_762_310_656, 7_505_186_816, 123_060_480
"""Parameters of the text encoders: encoders alone, HunyuanVideo's Llama without its output matrix."""

_WAN = {
    "family": "wan", "head_dim": 128, "text_tokens": 0, "channels": 16,
    "geometry": Geometry(4, 8, (1, 2, 2), most_tokens=1024), "frames": 81, "height": 480, "width": 832,
    "text_encoder_parameters": UMT5_XXL, "vae_parameters": 126_892_531,
}  # fmt: skip
_COGVIDEOX = {
    "family": "cogvideox", "head_dim": 64, "text_tokens": 226, "channels": 16,
    "geometry": Geometry(4, 8, (1, 2, 2), lead_in=True, latents_together=2), "frames": 49, "height": 480, "width": 720,
    "text_encoder_parameters": T5_XXL, "vae_parameters": 215_583_907,
}  # fmt: skip
_SIZES: dict[str, dict[str, Any]] = {
    "wan-1.3b": {**_WAN, "layers": 30, "heads": 12, "feed_forward": 8960, "parameters": 1_418_996_800},
    "wan-14b": {**_WAN, "layers": 40, "heads": 40, "feed_forward": 13824, "parameters": 14_288_491_584},
    "cogvideox-2b": {
        **_COGVIDEOX, "layers": 30, "heads": 30, "feed_forward": 7680, "parameters": 1_693_783_872,
        "dtype": torch.float16,
    },
    "cogvideox-5b": {**_COGVIDEOX, "layers": 42, "heads": 48, "feed_forward": 12288, "parameters": 5_570_283_072},
    "ltx": {
        "family": "ltx", "layers": 28, "heads": 32, "head_dim": 64, "feed_forward": 8192, "text_tokens": 0,
        "channels": 128, "geometry": Geometry(8, 32, (1, 1, 1)), "frames": 161, "height": 512, "width": 704,
        "parameters": 1_923_385_472, "text_encoder_parameters": T5_XXL, "vae_parameters": 419_193_649,
    },
    "hunyuan-video": {
        "family": "hunyuan-video", "layers": 60, "heads": 24, "head_dim": 128, "feed_forward": 12288,
        "text_tokens": 256, "channels": 16, "geometry": Geometry(4, 8, (1, 2, 2)), "frames": 129, "height": 720,
        "width": 1280, "parameters": 12_821_012_544, "text_encoder_parameters": LLAMA_3_8B + CLIP_L,
        "vae_parameters": 246_478_803,
    },
    "demo": {
        **_WAN, "layers": 5, "heads": 3, "head_dim": 64, "feed_forward": 512, "channels": 12,
        "geometry": Geometry(4, 8, (1, 1, 1), most_tokens=64), "frames": 17, "height": 64, "width": 64,
        "parameters": 2_813_068, "text_encoder_parameters": 226_048, "vae_parameters": 2_659_448,
        "dtype": torch.float32,
    },
}  # fmt: skip
MODELS = {name: ModelSize(name=name, **sizes) for name, sizes in _SIZES.items()}

_WAN_CLASS, _COGVIDEOX_CLASS = "WanTransformer3DModel", "CogVideoXTransformer3DModel"
CONFIGS: dict[str, Mapping[str, Any]] = {
    "wan-1.3b": {"_class_name": _WAN_CLASS, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "wan-14b": {"_class_name": _WAN_CLASS},
    "cogvideox-2b": {"_class_name": _COGVIDEOX_CLASS},
    "cogvideox-5b": {
        "_class_name": _COGVIDEOX_CLASS, "num_attention_heads": 48, "num_layers": 42,
        "use_rotary_positional_embeddings": True,
    },
    "ltx": {"_class_name": "LTXVideoTransformer3DModel"},
    "hunyuan-video": {"_class_name": "HunyuanVideoTransformer3DModel"},
}  # fmt: skip
"""Configs of the known models' transformers, where they differ from diffusers' defaults."""
