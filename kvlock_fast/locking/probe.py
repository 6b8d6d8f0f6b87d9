"""Observation of a forward of a transformer that nobody has described: who projects, who attends, to what.

Forwards are run with the attention watched where every one of them passes, torch's `scaled_dot_product_attention`.
With its result taken as 0, no token hears of another: what changes with the latents then is the video's, by token.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

KEY_NORMS = ("norm_k", "key_norm", "k_norm", "norm_key", "ln_k")
KEYS = ("to_k", "to_key", "k_proj", "key_proj", "linear_k", "wk", "key", "k")
VALUES = ("to_v", "to_value", "v_proj", "value_proj", "linear_v", "wv", "value", "v")

Forward = Callable[[], Tensor]
AtCall = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def submodule(attention: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of the names that is a submodule."""
    return next((name for name in names if isinstance(getattr(attention, name, None), nn.Module)), None)


def projecting(transformer: nn.Module) -> dict[str, nn.Module]:
    """The modules that have projections of keys and of values, by name."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if submodule(module, KEYS) and submodule(module, VALUES)
    }


@dataclass
class Seen:
    """A forward as it was watched.

    outputs: those of each watched submodule by (module, submodule), in order; calls: the attentions' q, k, v; owners:
    the module that projected for each attention (None: none that is watched); result: what came out.
    """

    outputs: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    calls: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    owners: list[str | None] = field(default_factory=list)
    result: Tensor = field(init=False)


class _Attentions(TorchFunctionMode):
    """Every attention while the mode is on: noted, and its keys and values replaced or its result taken as 0."""

    def __init__(self, seen: Seen, pending: list[str], silent: bool, at_call: AtCall | None):
        super().__init__()
        self.seen, self.pending, self.silent, self.at_call = seen, pending, silent, at_call

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, key, value = named.pop("query"), named.pop("key"), named.pop("value")
        if self.at_call is not None:
            key, value = self.at_call(len(self.seen.calls), key, value)
        self.seen.calls.append((query, key, value))
        self.seen.owners.append(self.pending.pop() if self.pending else None)
        if self.silent:
            return query.new_zeros((*query.shape[:-1], value.shape[-1]))
        return func(query, key, value, *args[3:], **named)


def watch(
    transformer: nn.Module,
    forward: Forward,
    watched: Mapping[str, tuple[str, ...]],
    *,
    silent: bool = False,
    at_call: AtCall | None = None,
    keep: bool = True,
) -> Seen:
    """Watch one forward.

    Args:
        transformer: whose forward it is.
        forward: runs it.
        watched: submodules by the name of their module, the value's last.
        silent: whether attentions give 0.
        at_call: from the number of an attention, its key and value, the key and value that it takes instead.
        keep: whether the submodules' outputs are kept.
    """
    seen, handles = Seen(), []
    pending: list[str] = []

    def note(name: str, part: str, last: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if keep and isinstance(output, Tensor):
                seen.outputs.setdefault((name, part), []).append(output.clone())
            if last:
                pending.append(name)

        return hook

    modules = dict(transformer.named_modules())
    try:
        for name, parts in watched.items():
            for part in parts:
                hook = note(name, part, part == parts[-1])
                handles.append(getattr(modules[name], part).register_forward_hook(hook))
        with torch.no_grad(), _Attentions(seen, pending, silent, at_call):
            seen.result = forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def other_latents(transformer: nn.Module) -> Iterator[None]:
    """Forwards of the transformer with noise on the latents, its first argument, while the context is open."""
    generator = torch.Generator().manual_seed(0)

    def changed(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x + torch.randn(x.shape, generator=generator).to(x)
        return type(x)(changed(part) for part in x) if isinstance(x, (list, tuple)) else x

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        first = next(name for name in ("hidden_states", "x", *kwargs) if name in kwargs)
        return args, kwargs | {first: changed(kwargs[first])}

    handle = transformer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def first_tensor(output: Any) -> Tensor:
    """The prediction in what a transformer returns: a tensor, a list or tuple of such, or diffusers' output."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output
