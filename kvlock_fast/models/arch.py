"""A model family as data: where its self-attention is, and how its tokens lie. One `ArchSpec` a family."""

import re
from dataclasses import dataclass

from torch import Tensor, nn

from kvlock_fast.errors import InputError


@dataclass(frozen=True)
class ArchSpec:
    """What locking must know of a family of video transformers.

    family: its name; transformers: the class names; attention: a regular expression that the names of the video
    self-attention modules match whole; key, value: submodules whose output is the key (after its norm) and the value,
    the first that exists; token_dim: the dimension of the key's output that holds the tokens (the value's is 1); text:
    where the text's tokens are among them, "none", "prefix" or "suffix"; flow: whether the model predicts a flow's
    velocity, "reversed" where sigma counts from noise to data; one_call: whether the family's pipeline runs both
    branches of guidance in one forward; blocks: the class names of the blocks that are alike, where diffusers does not
    say.
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

    def attentions(self, transformer: nn.Module) -> list[tuple[str, nn.Module]]:
        """The self-attention modules with their names, in the model's order; the index in it is the layer's number."""
        pattern = re.compile(self.attention)
        return [(name, module) for name, module in transformer.named_modules() if pattern.fullmatch(name)]


def without_text(x: Tensor, dim: int, text: str, tokens: int | None) -> Tensor:
    """A view of the video's `tokens` of x along `dim`, where all others are the text's, placed as `ArchSpec.text`."""
    if tokens is None:
        return x
    others = x.shape[dim] - tokens
    if others < 0 or (others and text == "none"):
        raise RuntimeError(f"a self-attention has {x.shape[dim]} tokens, of a video of {tokens} and text {text!r}")
    return x.narrow(dim, others if text == "prefix" else 0, tokens)


def first_submodule(attention: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The first of `names` that is a submodule of `attention`."""
    for name in names:
        module = getattr(attention, name, None)
        if isinstance(module, nn.Module):
            return module
    raise ValueError(f"{type(attention).__name__} has none of the submodules {', '.join(names)}")


def select_layers(count: int, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    """The numbers of the locked layers of `count`; InputError for one that does not exist."""
    if layers is None:
        return tuple(range(count))
    for layer in layers:
        if layer >= count:
            raise InputError(f"layers names layer {layer}, but the model has layers 0 to {count - 1}")
    return layers
