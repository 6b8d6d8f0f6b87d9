"""Kandinsky 5 as the conformance suite takes it."""

from functools import partial

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from tests.families.cases.hunyuan_video import tiny_hunyuan_vae
from tests.support.conformance import Case
from tests.support.images import tiny_qwen_vl
from tests.support.tiny import WORDS, tiny_tokenizer


class Processor(PreTrainedTokenizerFast):
    """A tokenizer that is asked as processors of several kinds of input are."""

    def __call__(self, text, images=None, videos=None, **settings):
        return super().__call__(text, **settings)


def tiny_kandinsky5_transformer(**changes) -> Kandinsky5Transformer3DModel:
    """Of three blocks; what its own beginning leaves at 0 is not."""
    torch.manual_seed(0)
    config = {
        "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 16, "time_dim": 16,
        "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims": (4, 6, 6),
    }  # fmt: skip
    transformer = Kandinsky5Transformer3DModel(**{**config, **changes}).eval()
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "modulation" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    transformer.to = partial(cast, transformer)
    return transformer


def cast(transformer, *args, **kwargs):
    """As from_pretrained does it: what has to stay in fp32 does, and diffusers' own calls fail where it does not."""
    type(transformer).to(transformer, *args, **kwargs)
    for name, module in transformer.named_modules():
        if any(kept in name for kept in transformer._keep_in_fp32_modules):
            module.float()
    return transformer


def tiny_kandinsky5(pipeline=Kandinsky5T2VPipeline, vae=None, **transformer):
    transformer = tiny_kandinsky5_transformer(**transformer)
    torch.manual_seed(1)
    clip = CLIPTextConfig(
        vocab_size=len(WORDS) + 3, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        eos_token_id=1,
    )  # fmt: skip
    plain = tiny_tokenizer(2048)
    tokenizer = Processor(
        tokenizer_object=plain.backend_tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    pipe = pipeline(
        transformer=transformer,
        vae=tiny_hunyuan_vae() if vae is None else vae,
        text_encoder=tiny_qwen_vl(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModel(clip).eval(),
        tokenizer_2=tiny_tokenizer(77),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = "a cat moves {}", 3
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_kandinsky5_image():
    torch.manual_seed(2)
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, scaling_factor=0.4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip
    pipe = tiny_kandinsky5(Kandinsky5T2IPipeline, vae)
    pipe.resolutions = [(48, 32)]
    return pipe


def stock(pipe, call):
    """diffusers' own latents."""
    return pipe(**call.arguments).frames.permute(0, 4, 1, 2, 3)


def images(pipe, call):
    return pipe(**{name: value for name, value in call.arguments.items() if name != "num_frames"}).image


def stock_image(pipe, call):
    return images(pipe, call).permute(0, 4, 1, 2, 3)


ROUNDED = 2e-2
"""Keys are rounded to bf16 after they are rotated: a blend of rounded ones is not a rounded blend."""

CASES = [
    Case("kandinsky-5", lambda: tiny_kandinsky5(visual_cond=True), stock, tolerance=ROUNDED),
    Case("kandinsky-5-image", tiny_kandinsky5_image, stock_image, size=(1, 32, 48), frames=images, tolerance=ROUNDED),
]
