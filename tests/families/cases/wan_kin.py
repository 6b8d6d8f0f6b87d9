"""Wan's kin as the conformance suite takes them: image-to-video, VACE, SkyReels-V2, ChronoEdit."""

from dataclasses import replace
from functools import partial

import torch
from diffusers import (
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    LucyEditPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from tests.support.conformance import Case
from tests.support.tiny import WORDS, tiny_tokenizer, tiny_vae

SHOWN = {"in_channels": 12}
"""Of the given frames: a channel a pixel frame of a latent one's, and latents."""
LOOKED_AT = {**SHOWN, "image_dim": 16, "added_kv_proj_dim": 24}


def transformer(kind, seed=0, **changes):
    """Three layers of a transformer of this class."""
    torch.manual_seed(seed)
    config = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 64,
    }  # fmt: skip
    return kind(**{**config, **changes}).eval()


def text_and_rest():
    """All but the transformer and what sees pictures."""
    torch.manual_seed(0)
    text = UMT5Config(
        vocab_size=len(WORDS) + 3, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return {
        "tokenizer": tiny_tokenizer(), "text_encoder": UMT5EncoderModel(text).eval(), "vae": tiny_vae(),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }  # fmt: skip


def eyes():
    """A CLIP encoder of five tokens a picture."""
    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16
    )
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    return {"image_encoder": CLIPVisionModel(config).eval(), "image_processor": processor}


def of(pipeline, *transformers, **more):
    """A pipeline of these transformers."""
    named = dict(zip(("transformer", "transformer_2"), transformers, strict=False))
    pipe = pipeline(**text_and_rest(), **named, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_i2v(kind):
    wan = partial(transformer, WanTransformer3DModel)
    if kind == "2.1":
        return of(WanImageToVideoPipeline, wan(**LOOKED_AT), **eyes())
    if kind == "2.1-last":
        return of(WanImageToVideoPipeline, wan(**LOOKED_AT, pos_embed_seq_len=10), **eyes())
    if kind == "2.2":
        return of(WanImageToVideoPipeline, wan(**SHOWN), wan(5, **SHOWN), boundary_ratio=0.5)
    return of(WanImageToVideoPipeline, wan(), expand_timesteps=True)


def vace(count=1):
    """count: of transformers."""
    more = {"vace_layers": [0, 2], "vace_in_channels": 8 + 64}
    transformers = [transformer(WanVACETransformer3DModel, 5 * i, **more) for i in range(count)]
    return of(WanVACEPipeline, *transformers, boundary_ratio=0.5 if count == 2 else None)


def lucy():
    return of(LucyEditPipeline, transformer(WanTransformer3DModel, in_channels=8), expand_timesteps=True)


def skyreels():
    return of(SkyReelsV2Pipeline, transformer(SkyReelsV2Transformer3DModel))


def skyreels_i2v():
    return of(SkyReelsV2ImageToVideoPipeline, transformer(SkyReelsV2Transformer3DModel, **LOOKED_AT), **eyes())


def chronoedit():
    return of(ChronoEditPipeline, transformer(ChronoEditTransformer3DModel, **LOOKED_AT), **eyes())


def stock(pipe, call):
    """diffusers' own latents."""
    return pipe(**call.arguments).frames


def first_frame(case):
    return {"image": Image.fromarray(case.video()[0])}


def both_ends(case):
    return {**first_frame(case), "last_image": Image.fromarray(case.video()[-1])}


def all_but_the_mask(case):
    """The video [1, F, 3, H, W] in 0 to 1, grey inside the mask, and the mask."""
    mask = torch.from_numpy(case.mask())[:, None].expand(-1, 3, -1, -1)
    video = torch.from_numpy(case.video()).permute(0, 3, 1, 2) / 255.0
    return {"video": torch.where(mask, 0.5, video)[None], "mask": mask.float()[None]}


def whole_video(case):
    return {"video": [Image.fromarray(frame) for frame in case.video()]}


def case(name, make, shown=None, length=12, size=(9, 32, 48), **more):
    """shown: what diffusers' own pipeline is given of the case's video; length: tokens of text."""
    whole = Case(name, make, stock, size=size)
    shown = {} if shown is None else shown(whole)
    return replace(whole, more={"max_sequence_length": length, **shown, **more})


REASONED = {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 99}

CASES = [
    case("wan-i2v-2.1", partial(wan_i2v, "2.1"), first_frame, 512),
    case("wan-i2v-2.1-first-last", partial(wan_i2v, "2.1-last"), both_ends, 512),
    case("wan-i2v-2.2", partial(wan_i2v, "2.2"), first_frame),
    case("wan-i2v-2.2-5b", partial(wan_i2v, "2.2-5b"), first_frame),
    case("wan-vace", vace, all_but_the_mask),
    case("wan-vace-2.2", partial(vace, 2), all_but_the_mask),
    case("skyreels-v2", skyreels),
    case("skyreels-v2-i2v", skyreels_i2v, first_frame, 512),
    case("lucy-edit", lucy, whole_video),
    case("chronoedit", chronoedit, first_frame, 512, size=(5, 32, 48)),
    case("chronoedit-reasoning", chronoedit, first_frame, 512, **REASONED),
]
