"""A model family as data: where its self-attention is, and how its tokens lie. One `ArchSpec` a family."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from kvlock_fast.errors import InputError

SAMPLES, FRAMES, PLACES = "samples", "frames", "places"


class Attention(nn.Module):
    """For type checkers: the attributes that locking reads of a self-attention, where its own class has them."""

    heads: int
    num_heads: int
    inner_dim: int
    processor: Any
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.ModuleList
    norm_q: nn.Module | None
    norm_k: nn.Module | None
    add_q_proj: Any
    add_k_proj: Any
    add_v_proj: Any
    to_add_out: Any
    norm_added_q: nn.Module | None
    norm_added_k: nn.Module | None
    prepare_attention_mask: Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True)
class ArchSpec:
    """Description of a family of video transformers: what locking needs to know.

    Args:
        family: its name.
        transformers: the class names of its transformers.
        attention: regular expression that the names of the video's self-attention modules match whole.
        key, value: submodules whose output is the key (after its norm) and the value; the first that exists counts.
        token_dim: dimension of the key's output that holds the tokens (the value's is 1).
        text: where the text's tokens are among the video's: "none", "prefix" or "suffix".
        flow: whether the model predicts a flow's velocity; "reversed" where sigma counts from noise to data.
        one_call: whether the family's pipeline runs both branches of guidance in one forward.
        blocks: class names of the repeated blocks, where diffusers does not name them.
        by_frame, by_place: regular expressions for self-attentions that see one frame alone, or one place in all
            frames. Frames or places are then the rows of their batch, sample by sample.
        ahead: whether tokens of other frames lie in front of the video's. Each forward then says how many.
        fused: submodules of `value` whose output holds query, key and value, each as wide as the heads together, and
            more after them.
    """

    family: str
    transformers: tuple[str, ...]
    attention: str
    key: tuple[str, ...] = ("norm_k", "to_k")
    value: tuple[str, ...] = ("to_v",)
    token_dim: int = 1
    text: str = "none"
    flow: bool | str = True
    one_call: bool = False
    blocks: tuple[str, ...] = ()
    by_frame: str = ""
    by_place: str = ""
    ahead: bool = False
    fused: tuple[str, ...] = ()

    def attentions(self, transformer: nn.Module) -> list[tuple[str, Attention]]:
        """The self-attention modules with their names, in the model's order; the index in it is the layer's number."""
        named = ((name, cast("Attention", module)) for name, module in transformer.named_modules())
        return [(name, module) for name, module in named if re.fullmatch(self.attention, name)]

    def rows(self, name: str) -> str:
        """Meaning of the rows of a self-attention's batch: SAMPLES, FRAMES or PLACES."""
        if re.fullmatch(self.by_frame, name):
            return FRAMES
        return PLACES if re.fullmatch(self.by_place, name) else SAMPLES


def without_text(x: Tensor, dim: int, text: str, tokens: int | None, ahead: int = 0) -> Tensor:
    """A view of the video's `tokens` of x along `dim`.

    The others are `ahead` tokens in front of the video's, and the text's, placed as `ArchSpec.text`.
    """
    if tokens is None:
        return x
    before, _ = around_video(x.shape[dim], text, tokens, ahead)
    return x.narrow(dim, before, tokens)


def around_video(total: int, text: str, tokens: int, ahead: int = 0) -> tuple[int, int]:
    """Number of tokens in front of the video's and behind them, of `total`; arguments as `without_text`."""
    words = total - tokens - ahead
    if words < 0 or (words and text == "none"):
        raise RuntimeError(f"a self-attention has {total} tokens, of a video of {tokens + ahead} and text {text!r}")
    return (words + ahead, 0) if text == "prefix" else (ahead, words)


def by_samples(x: Tensor, tokens: int | None) -> Tensor:
    """A view [B, S, ...] of x, whose rows are parts of the samples' `tokens`, S."""
    if tokens is None:
        raise RuntimeError("how many tokens the video has must be said where self-attentions see a part of them")
    return x.view(-1, tokens, *x.shape[2:])


def place_by_place(index: Tensor, frames: int, tokens: int) -> Tensor:
    """Token numbers in (t, h, w) order as numbers in (h, w, t) order."""
    places = tokens // frames
    return index % places * frames + index // places


def first_submodule(attention: nn.Module, names: tuple[str, ...]) -> Any:
    """The first of `names` that is a submodule of `attention`: a projection or a norm, of anybody's class."""
    for name in names:
        module = getattr(attention, name, None)
        if isinstance(module, nn.Module):
            return module
    raise ValueError(f"{type(attention).__name__} has none of the submodules {', '.join(names)}")


def kv_width(attention: Attention, arch: ArchSpec) -> int:
    """Number of channels of a self-attention's values, or keys, all heads together."""
    columns, target = value_columns(attention, arch), first_submodule(attention, arch.value)
    return target.out_features if columns is None else columns[1]


def value_columns(attention: Attention, arch: ArchSpec) -> tuple[int, int] | None:
    """First column and width of the value in the output of its submodule; None where it is all there is."""
    target = first_submodule(attention, arch.value)
    if not any(getattr(attention, name, None) is target for name in arch.fused):
        return None
    return 2 * attention.inner_dim, attention.inner_dim


def select_layers(count: int, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    """The numbers of the locked layers of `count`. Raises InputError for one that does not exist."""
    if layers is None:
        return tuple(range(count))
    for layer in layers:
        if layer >= count:
            raise InputError(f"layers names layer {layer}, but the model has layers 0 to {count - 1}")
    return layers


_LINEAR = re.compile(r"Linear(Attn|Attention)|GDN|DeltaNet")
"""In the names of attentions' classes and of their processors': diffusers' Sana, SanaVideo and SanaWM."""


def refuse_linear(transformer: nn.Module) -> None:
    """Raise InputError for a model with linear attention, which cannot be locked token by token.

    There keys pass through a nonlinearity behind their norm, and are summed with the values of all tokens into one
    matrix before a query meets them: keys blended at their norm are not what enters the sum, and no query attends to
    single tokens, so that the source's could take the place of the model's own.
    """
    for name, module in transformer.named_modules():
        for part in (module, getattr(module, "processor", None)):
            if _LINEAR.search(type(part).__name__):
                raise InputError(
                    f"{type(transformer).__name__} cannot be locked: {name} is linear attention "
                    f"({type(part).__name__}), where the keys and values of all tokens are summed into one matrix "
                    "before a query meets them, so that no token's can be the source's"
                )
