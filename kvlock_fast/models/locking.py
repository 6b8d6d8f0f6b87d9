"""Locking at one interception point: the outputs of every self-attention's K-norm and V projection.

Two modules a layer hand their output on to a `LockState` that they share, which does to it what the forward asks for:
nothing, keep the source's K/V, blend with what was kept (in this step or in a cache), or blend with the batch's first
row (the source riding along, "lockstep"). Off means bit-identical to the stock model; after `detach` the model is as
it was.

A module is intercepted by its class, which is a subclass of its own one while it is locked. A hook would be an object
of its own in every layer, and torch.compile would compile every block of the model for itself, again with every lock;
by class all blocks share one graph, whatever the lock, mode and alpha: the graph holds an operator that knows nothing
but the number of the module.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import Enum, auto
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from kvlock_fast.errors import InputError
from kvlock_fast.kernels.blend import as_heads, blend_
from kvlock_fast.kernels.quantize import QuantizedKV, quantize_kv
from kvlock_fast.models.arch import ArchSpec, first_submodule, refuse_wrapped, select_layers, without_text
from kvlock_fast.models.fast import choose_path
from kvlock_fast.models.foreground import View, attend
from kvlock_fast.nvtx import span

KeptKV = dict[tuple[int, str], Tensor | QuantizedKV]
"""By layer number and "k" or "v"."""


class Mode(Enum):
    """What is done to keys and values during a forward."""

    OFF = auto()
    CAPTURE = auto()  # keep this forward's K and V
    STORED = auto()  # blend every row with K and V that were kept
    IN_BATCH = auto()  # blend rows 1.. with row 0
    FOREGROUND = auto()  # only some tokens are there: the attention adds what was kept of the others


class LockState:
    """What all locked modules of a transformer share: the mode, the weight, the kept K/V, how many of them have run.

    Tokens are the video's: those of the text, where there are any beside them, keep their own keys and values.
    """

    def __init__(self, background: Tensor | None = None, text: str = "none"):
        """background: indices [N] of the tokens to keep and blend in CAPTURE and STORED, None for all; text: as
        `ArchSpec.text`.
        """
        self.mode = Mode.OFF
        self.text, self.tokens = text, None
        self.weight: Tensor | None = None
        self.background = background
        self.kept: KeptKV = {}
        self.view: View | None = None
        self.prologue: Any = None
        self.fired = 0

    def apply(self, key: tuple[int, str], x: Tensor, token_dim: int) -> None:
        """A module's output x, taken for what the mode wants, or blended in place."""
        if self.prologue is not None:  # which does it, and counts
            return
        self.fired += 1
        if self.mode in (Mode.OFF, Mode.FOREGROUND):
            return
        x = without_text(x, token_dim, self.text, self.tokens)
        if self.mode is Mode.CAPTURE:
            with span("capture"):
                self._keep(key, x, token_dim)
        elif self.mode is Mode.STORED:
            with span("lock"):
                blend_(x, self.kept[key], self.weight, token_dim, self.background)
        elif self.mode is Mode.IN_BATCH:
            with span("lock"):
                blend_(x[1:], x[:1], self.weight, token_dim)

    def _keep(self, key: tuple[int, str], x: Tensor, token_dim: int) -> None:
        """Pack x into what is there for this layer, or keep it as it is."""
        place = self.kept.get(key)
        if place is None:
            self.kept[key] = x.clone() if self.background is None else x.index_select(token_dim, self.background)
            return
        heads = as_heads(x, token_dim, place.shape[2])
        packed = quantize_kv(
            heads, place.format, place.kind, tokens=self.background, tokens_per_scale=place.tokens_per_scale
        )
        place.copy_(packed)


_NUMBERS = itertools.count()
_LOCKED: dict[int, tuple[LockState, tuple[int, str], int]] = {}
"""By number: the state, the key and the dimension of the tokens of every module that is locked now."""


def locked_entry(number: int) -> tuple[LockState, tuple[int, str], int]:
    """The state, the key and the dimension of the tokens of a locked module."""
    return _LOCKED[number]


def _lock_output(x: Tensor, number: int) -> None:
    state, key, token_dim = _LOCKED[number]
    state.apply(key, x, token_dim)


@torch.library.custom_op("kvlock_fast::lock_output_", mutates_args=("x",))
def lock_output_(x: Tensor, number: Tensor) -> None:
    """The work of the locked module `number` (int64 [], in host memory) on its output, for compiled code."""
    _lock_output(x, int(number))


@lock_output_.register_fake
def _(x: Tensor, number: Tensor) -> None:
    return None


def _attend_kept(q: Tensor, k: Tensor, v: Tensor, number: int) -> Tensor:
    state, (layer, _), token_dim = _LOCKED[number]
    kept = ((state.kept[layer, "k"], token_dim), (state.kept[layer, "v"], 1))
    heads = (x if isinstance(x, QuantizedKV) else as_heads(x, dim, q.shape[2]) for x, dim in kept)
    with span("attend"):
        return attend(q, k, v, tuple(heads), state.view)


@torch.library.custom_op("kvlock_fast::attend_kept", mutates_args=())
def _attend_kept_op(q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
    return _attend_kept(q, k, v, int(number)).contiguous()


@_attend_kept_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def attend_kept(q: Tensor, k: Tensor, v: Tensor, locked: nn.Module) -> Tensor:
    """`foreground.attend` by what is kept of the layer whose keys come out of the locked module."""
    if torch.compiler.is_compiling():
        return _attend_kept_op(q, k, v, locked.kvlock_number_tensor)
    return _attend_kept(q, k, v, locked.kvlock_number)


class _Locked:
    """Goes in front of a module's own class.

    kvlock_number: in `_LOCKED`; compiled code is given it as a tensor, as a plain number would be compiled in.
    """

    kvlock_number: int
    kvlock_number_tensor: Tensor

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        output = super().__call__(*args, **kwargs)
        if torch.compiler.is_compiling():
            lock_output_(output, self.kvlock_number_tensor)
        else:
            _lock_output(output, self.kvlock_number)
        return output


@cache
def _locked(kind: type[nn.Module]) -> type[nn.Module]:
    """A module's class while it is locked: one for all modules of a class, so that compiled code serves them all."""
    return type(f"Locked{kind.__name__}", (_Locked, kind), {"__module__": kind.__module__})


class TransformerLock:
    """The lock on one transformer. `detach` takes it off again."""

    def __init__(
        self,
        transformer: nn.Module,
        arch: ArchSpec,
        layers: tuple[int, ...] | None = None,
        background: Tensor | None = None,
        processors: str = "generic",
    ):
        """layers: the locked self-attention layers by number, None for all; background: as in `LockState`;
        processors: by which attention forwards that lock go, a wish of `fast.PROCESSORS`.

        Raises InputError where the lock would miss K or V, and where processors 'fast' cannot be had; then nothing is
        attached.
        """
        refuse_wrapped(transformer)
        attentions = arch.attentions(transformer)
        if not attentions:
            raise InputError(f"{type(transformer).__name__} has no self-attention named {arch.attention!r}")
        self.transformer = transformer
        self.layers = select_layers(len(attentions), layers)
        self.state = LockState(background, arch.text)
        self._targets: list[tuple[nn.Module, tuple[str, ...], nn.Module, type[nn.Module]]] = []
        try:
            for layer in self.layers:
                name, attention = attentions[layer]
                for kind, names, token_dim in (("k", arch.key, arch.token_dim), ("v", arch.value, 1)):
                    self._attach(attention, names, (self.state, (layer, kind), token_dim), name)
            self.fast = choose_path(processors, transformer, {n: attentions[n] for n in self.layers}, self.state)
        except BaseException:
            self.detach()
            raise

    def _attach(self, attention: nn.Module, names: tuple[str, ...], entry: tuple, where: str) -> None:
        target = first_submodule(attention, names)
        if isinstance(target, _Locked):
            raise InputError(f"{where} is locked already: detach the other lock first")
        self._targets.append((attention, names, target, type(target)))
        number = next(_NUMBERS)
        _LOCKED[number] = entry
        target.kvlock_number, target.kvlock_number_tensor = number, torch.tensor(number)
        target.__class__ = _locked(type(target))

    @property
    def attentions(self) -> list[nn.Module]:
        """The locked self-attentions."""
        return list(dict.fromkeys(attention for attention, *_ in self._targets))

    def detach(self) -> None:
        """Take the lock off; the transformer is as it was."""
        for _, _, target, kind in self._targets:
            target.__class__ = kind
            del _LOCKED[target.kvlock_number], target.kvlock_number, target.kvlock_number_tensor
        self._targets = []

    @contextmanager
    def forward(
        self, mode: Mode, weight: Tensor | None = None, kept: KeptKV | None = None, tokens: int | None = None
    ) -> Iterator[None]:
        """One forward in `mode`; afterwards every locked module must have run once.

        weight: [rows, S] fp32 (for IN_BATCH without the source's row), needed where the mode blends. kept: the
        background's K and V to blend with (STORED) or to see (FOREGROUND), or the places to pack them into (CAPTURE;
        where there is none for a layer, a tensor is added). tokens: the video's, S, beyond which a self-attention's are
        text; None where there is no text among them.

        Raises RuntimeError where modules were skipped or replaced, as by an adapter that was added later.
        """
        for attention, names, target, _ in self._targets:
            if first_submodule(attention, names) is not target:
                raise RuntimeError(
                    f"a projection of {type(attention).__name__} was replaced after the lock was attached, as by an "
                    "adapter: load adapters first, then lock"
                )
        state, by = self.state, nullcontext()
        state.mode, state.weight, state.kept, state.fired = mode, weight, {} if kept is None else kept, 0
        state.tokens = tokens
        if self.fast is not None and mode not in (Mode.OFF, Mode.FOREGROUND):
            by = self.fast.forward()
        try:
            with by:
                yield
        finally:
            state.mode, state.weight, state.kept, state.view = Mode.OFF, None, {}, None
        expected = 2 * len(self.layers)
        if state.fired != expected:
            raise RuntimeError(
                f"{state.fired} of {expected} locked projections ran in a forward of "
                f"{type(self.transformer).__name__}: layers were skipped"
            )


def kv_sizes(transformer: nn.Module, arch: ArchSpec) -> tuple[int, int]:
    """Heads, and channels a head, of the self-attentions' keys and values. InputError where layers differ."""
    sizes = {(a.heads, a.to_k.out_features // a.heads) for _, a in arch.attentions(transformer)}
    if len(sizes) != 1:
        raise InputError(f"the self-attentions of {type(transformer).__name__} are of different sizes: {sorted(sizes)}")
    return sizes.pop()


def blend_weight(alpha: Tensor, foreground: Tensor, mix: float = 0.0) -> Tensor:
    """alpha [B] and foreground tokens bool [1 or B, S] as the blend's weight [B, S] fp32; mix: its part on these."""
    alpha = alpha.float()[:, None]
    return torch.where(foreground, mix * alpha if mix else 0.0, alpha)
