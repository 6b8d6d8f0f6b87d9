"""Tiny transformers of diffusers that this project does not describe, each with the arguments of a forward."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

Stranger = tuple[nn.Module, dict[str, Any], int]
"""A transformer, a forward's arguments by name, and the tokens of the video (or image) in them."""


def _time(rows: int, value: float = 500.0) -> torch.Tensor:
    return torch.full((rows,), value)


def sd3() -> Stranger:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
        qk_norm="rms_norm",
    )  # fmt: skip
    text = dict(encoder_hidden_states=torch.randn(2, 5, 16), pooled_projections=torch.randn(2, 12))
    return transformer, dict(hidden_states=torch.randn(2, 4, 8, 12), timestep=_time(2), **text), 24


def auraflow() -> Stranger:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, out_channels=4,
        pos_embed_max_size=256,
    )  # fmt: skip
    text = torch.randn(2, 5, 32)
    return transformer, dict(hidden_states=torch.randn(2, 4, 8, 12), timestep=_time(2), encoder_hidden_states=text), 24


def pixart() -> Stranger:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=16,
        in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True, num_embeds_ada_norm=1000,
        use_additional_conditions=False, norm_type="ada_norm_single",
    )  # fmt: skip
    more = dict(added_cond_kwargs={"aspect_ratio": None, "resolution": None})
    text = torch.randn(2, 16, 16)  # as many as the image's tokens: only what happens tells them apart
    return (
        transformer,
        dict(hidden_states=torch.randn(2, 4, 8, 8), encoder_hidden_states=text, timestep=_time(2)) | more,
        16,
    )


def lumina2() -> Stranger:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128),
        cap_feat_dim=16,
    )  # fmt: skip
    text = dict(encoder_hidden_states=torch.randn(2, 5, 16), encoder_attention_mask=torch.ones(2, 5, dtype=torch.bool))
    return transformer, dict(hidden_states=torch.randn(2, 4, 8, 12), timestep=_time(2, 0.5), **text), 24


def cogview4() -> Stranger:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        text_embed_dim=16, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    sizes = {name: torch.tensor([[64, 64]] * 2) for name in ("original_size", "target_size", "crop_coords")}
    text = torch.randn(2, 5, 16)
    return (
        transformer,
        dict(hidden_states=torch.randn(2, 4, 8, 12), encoder_hidden_states=text, timestep=_time(2), **sizes),
        24,
    )


def dit() -> Stranger:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, attention_bias=True, num_embeds_ada_norm=10,
    )  # fmt: skip
    return (
        transformer,
        dict(hidden_states=torch.randn(2, 4, 8, 8), timestep=_time(2), class_labels=torch.tensor([1, 2])),
        16,
    )


def hunyuan_dit() -> Stranger:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=4, hidden_size=24, text_len=3,
        text_len_t5=3, activation_fn="gelu-approximate",
    )  # fmt: skip
    text = {
        "encoder_hidden_states": torch.randn(2, 3, 16), "text_embedding_mask": torch.ones(2, 3),
        "encoder_hidden_states_t5": torch.randn(2, 3, 16), "text_embedding_mask_t5": torch.ones(2, 3),
        "image_meta_size": torch.ones(2, 6), "style": torch.zeros(2, dtype=torch.int64),
        "image_rotary_emb": [torch.randn(16, 8), torch.randn(16, 8)],
    }  # fmt: skip
    return transformer, dict(hidden_states=torch.randn(2, 4, 8, 8), timestep=_time(2), **text), 16


def chroma() -> Stranger:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    places = dict(img_ids=torch.rand(24, 3) * 5, txt_ids=torch.zeros(5, 3), attention_mask=torch.ones(1, 29))
    text = torch.randn(1, 5, 16)
    return (
        transformer,
        dict(hidden_states=torch.randn(1, 24, 4), encoder_hidden_states=text, timestep=_time(1, 0.5), **places),
        24,
    )


def z_image() -> Stranger:
    """Takes lists, and fills texts and images up to multiples of 32 tokens."""
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=16, n_layers=2, n_refiner_layers=1, n_heads=1,
        n_kv_heads=1, qk_norm=True, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return transformer, dict(x=[torch.randn(16, 1, 8, 8)], t=_time(1, 0.5), cap_feats=[torch.randn(7, 16)]), 16


def omnigen() -> Stranger:
    transformer = diffusers.OmniGenTransformer2DModel(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_layers=2,
        pad_token_id=0, vocab_size=100, in_channels=4, time_step_dim=4,
        rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
    )  # fmt: skip
    tokens = 5 + 1 + 16
    text = {
        "input_ids": torch.arange(5)[None], "input_img_latents": [], "input_image_sizes": {},
        "attention_mask": torch.ones(1, tokens, tokens), "position_ids": torch.arange(tokens)[None],
    }  # fmt: skip
    return transformer, dict(hidden_states=torch.randn(1, 4, 8, 8), timestep=_time(1, 0.5), **text), 16


STRANGERS: dict[str, tuple[Callable[[], Stranger], int, str]] = {
    "sd3": (sd3, 2, "none"),
    "auraflow": (auraflow, 2, "prefix"),
    "pixart": (pixart, 2, "none"),
    "lumina2": (lumina2, 3, "prefix"),
    "cogview4": (cogview4, 2, "prefix"),
    "dit": (dit, 2, "none"),
    "hunyuan-dit": (hunyuan_dit, 4, "none"),
    "chroma": (chroma, 3, "prefix"),
    "z-image": (z_image, 3, "suffix"),
    "omnigen": (omnigen, 2, "prefix"),
}
"""What makes it, how many self-attentions of the image it has, and where the text is in them."""


def latte() -> Stranger:
    """Its tokens attend within a frame, and then within a place: never all to all."""
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=8,
        in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=3,
    )  # fmt: skip
    text = torch.randn(2, 5, 8)
    return (
        transformer,
        dict(hidden_states=torch.randn(2, 4, 3, 8, 8), encoder_hidden_states=text, timestep=_time(2)),
        48,
    )


def sana() -> Stranger:
    transformer = diffusers.SanaTransformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        caption_channels=8, cross_attention_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=4,
    )  # fmt: skip
    text = torch.randn(1, 5, 8)
    return transformer, dict(hidden_states=torch.randn(1, 4, 8, 8), encoder_hidden_states=text, timestep=_time(1)), 64


def sana_video() -> Stranger:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=12,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
        patch_size=(1, 2, 2), sample_size=8,
    )  # fmt: skip
    text = torch.randn(1, 5, 8)
    return (
        transformer,
        dict(hidden_states=torch.randn(1, 4, 2, 8, 8), encoder_hidden_states=text, timestep=_time(1)),
        32,
    )


def made(make: Callable[[], Stranger]) -> Stranger:
    """With weights that make something of every layer: many begin at zero."""
    torch.manual_seed(0)
    transformer, sample, tokens = make()
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return transformer.eval(), sample, tokens
