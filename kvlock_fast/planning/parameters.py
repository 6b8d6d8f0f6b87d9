"""How many parameters a diffusers video transformer has, counted from its config alone. One function a family.

d: hidden size; a linear layer from n to m has n m + m parameters, and m of them are its bias.
"""

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]
TIME_CHANNELS = 256
"""Of the sinusoids that LTX and HunyuanVideo embed a timestep by; Wan says `freq_dim`."""


def wan(c: Config) -> int:
    """WanTransformer3DModel and its kin: SkyReels-V2's, ChronoEdit's, and VACE's with its further blocks."""
    d, ffn, patch = c["num_attention_heads"] * c["attention_head_dim"], c["ffn_dim"], _volume(c["patch_size"])
    time = _mlp(c["freq_dim"], d) + _linear(d, 6 * d)
    attention = 4 * _linear(d, d) + 2 * d
    block = 6 * d + 2 * attention + (2 * d if c["cross_attn_norm"] else 0) + _linear(d, ffn) + _linear(ffn, d)
    ends = _linear(c["in_channels"] * patch, d) + _linear(d, c["out_channels"] * patch) + 2 * d
    pictures, added, vace = c.get("image_dim"), c.get("added_kv_proj_dim"), c.get("vace_layers") or ()
    if added:
        block += 2 * _linear(added, d) + d
    image = 0
    if pictures:
        image = _linear(pictures, pictures) + _linear(pictures, d) + 2 * (pictures + d)
        image += (c.get("pos_embed_seq_len") or 0) * pictures
    if vace:
        ends += _linear(c["vace_in_channels"] * patch, d) + (len(vace) + 1) * _linear(d, d) + len(vace) * block
    return ends + time + image + _mlp(c["text_dim"], d) + c["num_layers"] * block


def cogvideox(c: Config) -> int:
    """CogVideoXTransformer3DModel; position codes are no parameters."""
    d, time = c["num_attention_heads"] * c["attention_head_dim"], c["time_embed_dim"]
    patch = c["patch_size"] ** 2 * (c["patch_size_t"] or 1)
    norm = _linear(time, 6 * d) + 2 * d
    attention = 4 * _linear(d, d) + 4 * c["attention_head_dim"]
    block = 2 * norm + attention + _linear(d, 4 * d) + _linear(4 * d, d)
    ends = _linear(c["in_channels"] * patch, d) + _linear(d, c["out_channels"] * patch)
    norms = 4 * d + _linear(time, 2 * d)
    text_and_time = _linear(c["text_embed_dim"], d) + _linear(d, time) + _linear(time, time)
    return ends + norms + text_and_time + c["num_layers"] * block


def ltx(c: Config) -> int:
    """LTXVideoTransformer3DModel."""
    d, text = c["num_attention_heads"] * c["attention_head_dim"], c["cross_attention_dim"]
    time = _mlp(TIME_CHANNELS, d) + _linear(d, 6 * d)
    own = 4 * _linear(d, d) + 2 * d
    cross = 2 * _linear(d, d) + 2 * _linear(text, d) + 2 * d
    block = 6 * d + own + cross + _linear(d, 4 * d) + _linear(4 * d, d)
    ends = _linear(c["in_channels"], d) + _linear(d, c["out_channels"]) + 2 * d
    return ends + time + _mlp(c["caption_channels"], d) + c["num_layers"] * block


def hunyuan_video(c: Config) -> int:
    """HunyuanVideoTransformer3DModel: double-stream blocks, single-stream blocks, a refiner of the text."""
    d, head = c["num_attention_heads"] * c["attention_head_dim"], c["attention_head_dim"]
    ffn, patch = int(c["mlp_ratio"] * d), c["patch_size"] ** 2 * c["patch_size_t"]
    feed_forward = _linear(d, ffn) + _linear(ffn, d)
    double = 2 * (_linear(d, 6 * d) + 4 * _linear(d, d) + 2 * head + feed_forward)
    single = _linear(d, 3 * d) + 3 * _linear(d, d) + 2 * head + _linear(d, ffn) + _linear(d + ffn, d)
    refined = 4 * _linear(d, d) + _linear(d, 4 * d) + _linear(4 * d, d) + 4 * d + _linear(d, 2 * d)
    refiner = c["num_refiner_layers"] * refined
    text = _mlp(TIME_CHANNELS, d) + _mlp(c["text_embed_dim"], d) + _linear(c["text_embed_dim"], d) + refiner
    times = 2 if c["guidance_embeds"] else 1
    conditions = times * _mlp(TIME_CHANNELS, d) + _mlp(c["pooled_projection_dim"], d)
    ends = _linear(c["in_channels"] * patch, d) + _linear(d, c["out_channels"] * patch) + _linear(d, 2 * d)
    return ends + text + conditions + c["num_layers"] * double + c["num_single_layers"] * single


def _linear(n: int, m: int) -> int:
    return n * m + m


def _mlp(n: int, d: int) -> int:
    """n to d to d."""
    return _linear(n, d) + _linear(d, d)


def _volume(patch: list[int]) -> int:
    t, h, w = patch
    return t * h * w
