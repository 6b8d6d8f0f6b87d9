"""Tiny transformers of the families with a fast path; their lock by its definition, a blend at the attention call."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import CogVideoXPipeline, HunyuanVideoTransformer3DModel, LTXVideoTransformer3DModel
from diffusers.models.transformers import transformer_hunyuan_video, transformer_ltx, transformer_wan

from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.cogvideox import COGVIDEOX
from kvlock_fast.models.ltx import LTX
from kvlock_fast.models.wan import WAN
from tests.support.tiny import COGVIDEOX_KINDS, tiny_cogvideox, tiny_cogvideox_transformer, tiny_transformer

HUNYUAN_VIDEO = ArchSpec(
    family="hunyuan-video",
    transformers=("HunyuanVideoTransformer3DModel",),
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    text="suffix",
)
GRID, TOKENS, WORDS = (3, 4, 6), 18, 7


@dataclass
class Family:
    """predict(rows): the prediction of the first rows of a fixed batch of 3; patch: where its attention is called, by
    which name, and the dimension of the tokens there; before: how much text lies in front of the video.
    """

    transformer: torch.nn.Module
    arch: ArchSpec
    predict: Callable[[int], torch.Tensor]
    patch: tuple[object, str, int]
    before: int = 0


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_random_norms(transformer):
    """Weights of norms that are not one."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in transformer.named_parameters():
        if any(part in name for part in ("norm_q", "norm_k", "norm_added")):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return transformer.eval()


def wan(**changes):
    model = with_random_norms(tiny_transformer(**changes))
    latents, text = normal(3, 4, *GRID), normal(3, WORDS, 16)
    predict = lambda n: model(latents[:n], torch.full((n,), 300), text[:n], return_dict=False)[0]  # noqa: E731
    return Family(model, WAN, predict, (transformer_wan, "dispatch_attention_fn", 1))


def cogvideox(kind):
    model = with_random_norms(tiny_cogvideox_transformer(**COGVIDEOX_KINDS[kind]))
    frames = 6 if kind == "1.5" else 3
    latents, text, rotary = normal(3, frames, 4, *GRID[1:]), normal(3, WORDS, 16), None
    if kind != "2b":
        pipe = tiny_cogvideox(kind)
        rotary = CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, 32, 48, frames, torch.device("cpu"))

    def predict(n):
        told = {"timestep": torch.full((n,), 300), "image_rotary_emb": rotary, "return_dict": False}
        return model(latents[:n], text[:n], **told)[0]

    return Family(model, COGVIDEOX, predict, (torch.nn.functional, "scaled_dot_product_attention", 2), WORDS)


def ltx():
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=3, caption_channels=16,
    )  # fmt: skip
    model = with_random_norms(model)
    latents, text, mask = normal(3, TOKENS, 4), normal(3, WORDS, 16), torch.ones(3, WORDS)
    mask[:, 5:] = 0

    def predict(n):
        return model(
            latents[:n], text[:n], torch.full((n,), 300), mask[:n], num_frames=3, height=2, width=3, return_dict=False
        )[0]

    return Family(model, LTX, predict, (transformer_ltx, "dispatch_attention_fn", 1))


def hunyuan_video():
    """Two dual and two single blocks; the text of each sample is padded to another length."""
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4), mlp_ratio=2.0,
    )  # fmt: skip
    model = with_random_norms(model)
    latents, text, pooled = normal(3, 4, *GRID), normal(3, WORDS, 16), normal(3, 8)
    mask = torch.arange(WORDS) < torch.tensor([[WORDS], [3], [5]])

    def predict(n):
        return model(
            latents[:n], torch.full((n,), 300), text[:n], mask[:n].long(), pooled[:n], torch.full((n,), 6000.0),
            return_dict=False,
        )[0]  # fmt: skip

    return Family(model, HUNYUAN_VIDEO, predict, (transformer_hunyuan_video, "dispatch_attention_fn", 1))


FAMILIES = {
    "wan": wan,
    "cogvideox-2b": lambda: cogvideox("2b"),
    "cogvideox-5b": lambda: cogvideox("5b"),
    "cogvideox-1.5": lambda: cogvideox("1.5"),
    "ltx": ltx,
    "hunyuan-video": hunyuan_video,
}
families = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)


class AtTheCall:
    """In place of a family's attention function: K and V of the video's background blended as they enter it, in fp64.

    Of the self-attentions, in layers `layers`; others are known by their keys, which are those of a text.
    """

    def __init__(self, family, weight, layers):
        """weight: [rows, S] of the source's keys and values."""
        self.family, self.weight, self.layers = family, weight.double(), layers
        self.kept, self.captures, self.count = [], False, 0

    def __enter__(self):
        target, name, self.token_dim = self.family.patch
        self.stock = getattr(target, name)
        self.context = pytest.MonkeyPatch.context()
        self.context.__enter__().setattr(target, name, self)
        return self

    def __exit__(self, *error):
        self.context.__exit__(*error)

    def pass_(self, rows, captures):
        self.captures, self.count = captures, 0
        return self.family.predict(rows)

    def __call__(self, query, key, value, *rest, **options):
        if key.shape[self.token_dim] >= TOKENS:
            key, value = (self.blended(x, i) for i, x in enumerate((key, value)))
            self.count += 1
        return self.stock(query, key, value, *rest, **options)

    def blended(self, x, which):
        video = x.movedim(self.token_dim, 1)[:, self.family.before : self.family.before + TOKENS]
        if self.captures:
            self.kept.append(video[:1].double())
            return x
        if self.count not in self.layers:
            return x
        new = x.clone()
        weight = self.weight[..., None, None]
        mixed = (1 - weight) * video.double() + weight * self.kept[2 * self.count + which]
        new.movedim(self.token_dim, 1)[:, self.family.before : self.family.before + TOKENS] = mixed.to(x.dtype)
        return new
