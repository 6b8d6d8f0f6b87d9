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

import gc
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn

from kvlock_fast.errors import InputError
from kvlock_fast.kernels.blend import as_heads
from kvlock_fast.kernels.quantize import QuantizedKV
from kvlock_fast.locking.arch import (
    SAMPLES,
    ArchSpec,
    first_submodule,
    kv_width,
    select_layers,
    value_columns,
)
from kvlock_fast.locking.compatibility import refuse_caches, refuse_wrapped
from kvlock_fast.locking.fast_path import choose_path
from kvlock_fast.locking.foreground import attend
from kvlock_fast.locking.parallel import Shard, shard_of
from kvlock_fast.locking.registry import LOCKED, NUMBERS, Entry, locked_entry
from kvlock_fast.locking.state import KeptKV as KeptKV
from kvlock_fast.locking.state import LockState
from kvlock_fast.locking.state import Mode as Mode
from kvlock_fast.nvtx import span


def _lock_output(x: Tensor, number: int) -> None:
    entry = LOCKED.get(number)
    if entry is not None:  # None: its lock is gone, and the module about to be its plain self
        entry.state.apply(entry.key, x, entry.token_dim)


@torch.library.custom_op("kvlock_fast::lock_output_", mutates_args=("x",))
def lock_output_(x: Tensor, number: Tensor) -> None:
    """The work of the locked module `number` (int64 [], in host memory) on its output, for compiled code."""
    _lock_output(x, int(number))


@lock_output_.register_fake
def _(x: Tensor, number: Tensor) -> None:
    return None


def _attend_kept(q: Tensor, k: Tensor, v: Tensor, number: int) -> Tensor:
    entry = locked_entry(number)
    state, (layer, _) = entry.state, entry.key
    kept = ((state.kept[layer, "k"], entry.token_dim), (state.kept[layer, "v"], 1))
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

    kvlock_number: in `LOCKED`; compiled code is given it as a tensor, as a plain number would be compiled in.
    """

    kvlock_number: int
    kvlock_number_tensor: Tensor

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            output = super().__call__(*args, **kwargs)
            lock_output_(output, self.kvlock_number_tensor)
            return output
        # First, and as it is: a lock may be freed, or taken off by another thread, while the module runs.
        number = vars(self).get("kvlock_number")
        output = super().__call__(*args, **kwargs)
        if number is not None:
            _lock_output(output, number)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy and a pickle of a locked module are its plain self."""
        kind, entry = type(self), LOCKED.get(self.kvlock_number)
        if entry is not None and entry.state.mode is not Mode.OFF:
            raise RuntimeError("a locked model cannot be copied in the middle of a forward: copy it before or after")
        # Protocol 0 has no look at the object's own class, which pickle compares for the later ones.
        make, arguments, *rest = super().__reduce_ex__(0)
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: x for name, x in rest[0].items() if name not in _OWN}
        return make, tuple(kind.__mro__[2] if x is kind else x for x in arguments), *rest


_OWN = ("kvlock_number", "kvlock_number_tensor")


_CHANGING = threading.RLock()
"""Held while modules change their classes: two locks at once would each take a module for unlocked."""


def _unlock(targets: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    """Give modules their own classes back."""
    with _CHANGING:
        for target, kind in targets:
            target.__class__ = kind
            for name in _OWN:
                vars(target).pop(name, None)
        targets.clear()


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
        format: str | None = None,
    ):
        """layers: the locked self-attention layers by number, None for all; background: as in `LockState`, of the whole
        video also where processes share its tokens; format: as in `LockState`; processors: by which attention forwards
        that lock go, a wish of `fast_path.PROCESSORS`.

        Raises InputError where the lock would miss K or V, and where processors 'fast' cannot be had; then nothing is
        attached.
        """
        refuse_wrapped(transformer)
        attentions = arch.attentions(transformer)
        if not attentions:
            raise InputError(f"{type(transformer).__name__} has no self-attention named {arch.attention!r}")
        self.transformer, self._says_ahead = transformer, arch.ahead
        self.layers = select_layers(len(attentions), layers)
        self.state = LockState(background, arch.text, format)
        self.forwards = 0
        self.use_background(background)
        self._around = _with_parents(transformer, [attentions[layer][0] for layer in self.layers])
        self._targets: list[tuple[nn.Module, tuple[str, ...], nn.Module]] = []
        self._entries: list[Entry] = []
        self._locked: list[tuple[nn.Module, type[nn.Module]]] = []
        # Runs when the lock is forgotten, so it must not hold the lock itself.
        self._forgotten = finalize(self, _unlock, self._locked)
        self._forgotten.atexit = False
        try:
            with _CHANGING:
                self._attach_all(arch, attentions)
            self.fast = choose_path(processors, transformer, {n: attentions[n] for n in self.layers}, self.state)
        except BaseException:
            self.detach()
            raise

    def _attach_all(self, arch: ArchSpec, attentions: list[tuple[str, nn.Module]]) -> None:
        for layer in self.layers:
            name, attention = attentions[layer]
            if arch.rows(name) != SAMPLES:
                self.state.rows[layer] = arch.rows(name)
            self.state.heads[layer] = getattr(attention, "heads", getattr(attention, "num_heads", None))
            for kind, names, token_dim in (("k", arch.key, arch.token_dim), ("v", arch.value, 1)):
                self._attach(attention, names, Entry(self.state, (layer, kind), token_dim), name)
            columns = value_columns(attention, arch)
            if columns is not None:
                self.state.columns[layer, "v"] = columns

    def _attach(self, attention: nn.Module, names: tuple[str, ...], entry: Entry, where: str) -> None:
        target = first_submodule(attention, names)
        if isinstance(target, _Locked):
            gc.collect()  # a lock that is forgotten may wait for it
            if isinstance(target, _Locked):
                raise InputError(f"{where} is locked already: detach the other lock first")
        self._targets.append((attention, names, target))
        self._locked.append((target, type(target)))
        self._entries.append(entry)
        number = next(NUMBERS)
        LOCKED[number] = entry
        target.kvlock_number, target.kvlock_number_tensor = number, torch.tensor(number)
        target.__class__ = _locked(type(target))

    @property
    def attentions(self) -> list[nn.Module]:
        """The locked self-attentions."""
        return list(dict.fromkeys(attention for attention, *_ in self._targets))

    def use_background(self, background: Tensor | None) -> None:
        """Keep and blend these tokens [N] of the whole video from now on."""
        self.state.background = self._background = background
        self._shared: tuple[Shard, int] | None = None

    def detach(self) -> None:
        """Take the lock off; the transformer is as it was."""
        _unlock(self._locked)
        self._targets, self._entries = [], []

    @contextmanager
    def forward(
        self,
        mode: Mode,
        weight: Tensor | None = None,
        kept: KeptKV | None = None,
        tokens: int | None = None,
        any_number: bool = False,
        ahead: int | None = None,
    ) -> Iterator[None]:
        """One forward in `mode`; afterwards every locked module must have run once, and `forwards` is how often.

        any_number: of forwards, none too; then every module must have run as often as the others. weight: [rows, S]
        fp32 (for IN_BATCH without the source's row), needed where the mode blends; rows may be repeated. kept: the
        background's K and V to blend with (STORED) or to see (FOREGROUND), or the places to pack them into (CAPTURE;
        where there is none for a layer, a tensor is added). tokens: the video's, S, beyond which a self-attention's are
        text; None where there is no text among them; ahead: how many tokens of other frames lie in front of them, which
        is to be said of those that have any (`ArchSpec.ahead`) and are left as they are. In context parallelism weight
        and tokens are of the whole video, kept is of this process's part.

        Raises RuntimeError where modules were skipped or replaced, as by an adapter that was added later; InputError
        where a cache was switched on meanwhile.
        """
        refuse_caches(self._around)
        for attention, names, target in self._targets:
            if first_submodule(attention, names) is not target:
                raise RuntimeError(
                    f"a projection of {type(attention).__name__} was replaced after the lock was attached, as by an "
                    "adapter: load adapters first, then lock"
                )
        if self._says_ahead and ahead is None and mode is not Mode.OFF:
            raise RuntimeError(
                f"{type(self.transformer).__name__} has tokens in front of the video's, whose number was not said"
            )
        weight, tokens = self._own_part(mode, weight, tokens)
        state, by = self.state, nullcontext()
        state.thread = threading.get_ident()
        state.mode, state.weight, state.kept, state.fired = mode, weight, {} if kept is None else kept, Counter()
        state.tokens, state.ahead, state._at_places = tokens, ahead or 0, None
        if self.fast is not None and mode not in (Mode.OFF, Mode.FOREGROUND):
            by = self.fast.forward()
        try:
            with by:
                yield
        finally:
            state.mode, state.weight, state.kept, state.view = Mode.OFF, None, {}, None
            state.thread = None
        counts = [state.fired[layer, kind] for layer in self.layers for kind in "kv"]
        self.forwards = max(counts) if any_number else 1
        if set(counts) != {self.forwards}:
            raise RuntimeError(
                f"{sum(counts)} of {len(counts) * self.forwards} locked projections ran in a forward of "
                f"{type(self.transformer).__name__}: layers were skipped"
            )

    def _own_part(self, mode: Mode, weight: Tensor | None, tokens: int | None) -> tuple[Tensor | None, int | None]:
        """Weight and tokens of this process's part, which becomes the state's background as well."""
        shard = shard_of(self.transformer)
        if shard is None or mode is Mode.OFF:
            return weight, tokens
        if tokens is None or mode is Mode.FOREGROUND:
            raise RuntimeError(f"mode {mode.name} with tokens {tokens} does not go with context parallelism")
        if self._background is not None and self._shared != (shard, tokens):
            self.state.background = shard.indices(self._background, tokens)
            self._shared = shard, tokens
        first, end = shard.bounds(tokens)
        return None if weight is None else weight[:, first:end], end - first


def _with_parents(transformer: nn.Module, names: list[str]) -> list[nn.Module]:
    """The modules of these names, and all that they are in."""
    modules = dict(transformer.named_modules())
    found = {"": transformer}
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            parent = ".".join(parts[:depth])
            found[parent] = modules[parent]
    return list(found.values())


def kv_sizes(transformer: nn.Module, arch: ArchSpec) -> tuple[int, int]:
    """Heads, and channels a head, of the self-attentions' keys and values. InputError where layers differ."""
    attentions = [attention for _, attention in arch.attentions(transformer)]
    heads = [a.heads if hasattr(a, "heads") else a.num_heads for a in attentions]
    sizes = {(count, kv_width(a, arch) // count) for count, a in zip(heads, attentions, strict=True)}
    if len(sizes) != 1:
        raise InputError(f"the self-attentions of {type(transformer).__name__} are of different sizes: {sorted(sizes)}")
    return sizes.pop()


def blend_weight(alpha: Tensor, foreground: Tensor, mix: float = 0.0) -> Tensor:
    """alpha [B] and foreground tokens bool [1 or B, S] as the blend's weight [B, S] fp32; mix: its part on these."""
    alpha = alpha.float()[:, None]
    return torch.where(foreground, mix * alpha if mix else 0.0, alpha)
