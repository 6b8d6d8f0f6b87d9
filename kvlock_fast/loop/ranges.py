"""Ranges inside a transformer's forward, by hooks that are there only while ranges are switched on (nvtx.py).

Up to four groups of blocks ("layers 0-7"), in them each self-attention ("attention"), in that the QK-norms ("prologue",
as the fast path calls what it does in their place, and more). A transformer of which torch.compile
has taken a part gets no hooks: they would break its graphs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from torch import nn

from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.nvtx import enabled, span

MOST_GROUPS = 4
NORMS = ("norm_q", "norm_k")


@contextmanager
def layer_ranges(transformer: nn.Module, arch: ArchSpec) -> Iterator[None]:
    """Ranges in the forwards made while the context is open, if they are switched on when it opens."""
    hooks = _Hooks()
    try:
        if enabled():
            hooks.attach(transformer, arch)
        yield
    finally:
        hooks.remove()


class _Hooks:
    """The hooks, and the ranges that they have opened and not yet closed."""

    def __init__(self):
        self.handles: list[Any] = []
        self.open: list[Any] = []

    def attach(self, transformer: nn.Module, arch: ArchSpec) -> None:
        named, modules = arch.attentions(transformer), dict(transformer.named_modules())
        blocks = [modules[name.rpartition(".")[0]] for name, _ in named]
        if any(module._compiled_call_impl is not None for module in (transformer, *blocks)):
            return
        # What a failed block has left open ends with the forward.
        self.handles.append(transformer.register_forward_hook(lambda *_: self._close(0), always_call=True))
        for first, last in groups(len(blocks)):
            name = f"layers {first}-{last}" if last > first else f"layer {first}"
            self._around(blocks[first], blocks[last], lambda name=name: self._begin(name), self._end)
        for _, attention in named:
            self._around(attention, attention, lambda: self._begin("attention"), self._end)
            for norm in (getattr(attention, name, None) for name in NORMS):
                if isinstance(norm, nn.Module):
                    self._around(norm, norm, lambda: self._begin("prologue"), self._end)

    def remove(self) -> None:
        """Take the hooks off."""
        self._close(0)
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _around(self, first: nn.Module, last: nn.Module, before: Callable[[], None], after: Callable[[], None]) -> None:
        self.handles.append(first.register_forward_pre_hook(lambda module, inputs: before()))
        self.handles.append(last.register_forward_hook(lambda module, inputs, output: after()))

    def _begin(self, name: str) -> None:
        context = span(name)
        context.__enter__()
        self.open.append(context)

    def _end(self) -> None:
        self._close(len(self.open) - 1)

    def _close(self, depth: int) -> None:
        """Close ranges from the innermost down to `depth` open ones."""
        while len(self.open) > max(0, depth):
            self.open.pop().__exit__(None, None, None)


def groups(layers: int) -> list[tuple[int, int]]:
    """First and last layer of each group: at most four, as equal as can be."""
    count = min(MOST_GROUPS, layers)
    edges = [layers * i // count for i in range(count + 1)] if count else [0]
    return [(a, b - 1) for a, b in pairwise(edges)]
