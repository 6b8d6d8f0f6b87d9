"""Locking at one interception point: the outputs of every self-attention's K-norm and V projection.

Two modules a layer hand their output on to a `LockState` that they share, which does to it what the forward asks for:
nothing, keep the source's K/V, blend with what was kept (in this step or in a cache), or blend with the batch's first
row (the source riding along, "lockstep"). Off means bit-identical to the stock model; after `detach` the model is as
it was.
"""

import gc
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from weakref import finalize

import torch
from torch import Tensor, nn

from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import (
    SAMPLES,
    ArchSpec,
    Attention,
    first_submodule,
    kv_width,
    select_layers,
    value_columns,
)
from kvlock_fast.locking.compatibility import refuse_caches, refuse_wrapped
from kvlock_fast.locking.fast_path import choose_path
from kvlock_fast.locking.foreground import attend
from kvlock_fast.locking.parallel import Shard, shard_of
from kvlock_fast.locking.registry import CHANGING, Entry, Locked, lock_module, locked_entry, number_of, unlock_modules
from kvlock_fast.locking.state import KeptKV as KeptKV
from kvlock_fast.locking.state import LockState
from kvlock_fast.locking.state import Mode as Mode
from kvlock_fast.nvtx import span


def _attend_kept(q: Tensor, k: Tensor, v: Tensor, number: int) -> Tensor:
    entry = locked_entry(number)
    if entry.state.view is None:
        raise RuntimeError("a forward of some tokens needs the view that they have of the others")
    kept = entry.state.references(entry.key[0], entry.token_dim, q.shape[2])
    with span("attend"):
        return attend(q, k, v, kept, entry.state.view, entry.state.bias)


@torch.library.custom_op("kvlock_fast::attend_kept", mutates_args=())
def _attend_kept_op(q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
    return _attend_kept(q, k, v, int(number)).contiguous()


_attend_kept_op.register_fake(lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format))


def attend_kept(q: Tensor, k: Tensor, v: Tensor, locked: nn.Module) -> Tensor:
    """`foreground.attend` by what is kept of the layer whose keys come out of the locked module."""
    number = number_of(locked)
    return _attend_kept(q, k, v, number) if isinstance(number, int) else _attend_kept_op(q, k, v, number)


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
        """Attach the lock.

        Args:
            transformer: the model, which is changed in place until `detach`.
            arch: how it is locked.
            layers: the locked self-attention layers by number; None: all.
            background: as in `LockState`, of the whole video also where processes share its tokens.
            processors: which attention serves forwards that lock, one of `fast_path.PROCESSORS`.
            format: as in `LockState`.

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
        self._targets: list[tuple[Attention, str, nn.Module]] = []
        self._entries: list[Entry] = []
        self._locked: list[tuple[nn.Module, type[nn.Module]]] = []
        # Runs when the lock is forgotten, so it must not hold the lock itself.
        self._forgotten = finalize(self, unlock_modules, self._locked)
        self._forgotten.atexit = False
        try:
            with CHANGING:
                self._attach_all(arch, attentions)
            self.fast = choose_path(processors, transformer, {n: attentions[n] for n in self.layers}, self.state)
        except BaseException:
            self.detach()
            raise

    def _attach_all(self, arch: ArchSpec, attentions: list[tuple[str, Attention]]) -> None:
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

    def _attach(self, attention: Attention, names: tuple[str, ...], entry: Entry, where: str) -> None:
        target = first_submodule(attention, names)
        name = next(name for name in names if getattr(attention, name, None) is target)
        if isinstance(target, Locked):
            gc.collect()  # a lock that is forgotten may wait for it
            if isinstance(target, Locked):
                raise InputError(f"{where} is locked already: detach the other lock first")
        self._targets.append((attention, name, target))
        self._locked.append((target, type(target)))
        self._entries.append(entry)
        lock_module(target, entry)

    @property
    def attentions(self) -> list[Attention]:
        """The locked self-attentions."""
        return list(dict.fromkeys(attention for attention, *_ in self._targets))

    def use_background(self, background: Tensor | None) -> None:
        """Keep and blend these tokens [N] of the whole video from now on."""
        self.state.background = self._background = background
        self._shared: tuple[Shard, int] | None = None

    def detach(self) -> None:
        """Take the lock off; the transformer is as it was."""
        unlock_modules(self._locked)
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
        """Run one forward in `mode`. Afterwards `forwards` says how many ran.

        In context parallelism weight and tokens are of the whole video, kept is of this process's part.

        Args:
            mode: what is done to keys and values.
            weight: [rows, S] fp32 (for IN_BATCH without the source's row), needed where the mode blends; rows may be
                repeated.
            kept: the background's K and V to blend with (STORED) or to see (FOREGROUND), or the places to pack them
                into (CAPTURE; where a layer has none, a tensor is added).
            tokens: number of the video's tokens, S; the others of a self-attention are text. None: there is no text.
            any_number: allow any number of forwards, none too. Every locked module must run equally often.
            ahead: number of tokens of other frames in front of the video's, which are left as they are. Needed where
                the family has any (`ArchSpec.ahead`).

        Raises RuntimeError where modules were skipped or replaced, as by an adapter that was added later; InputError
        where a cache was switched on meanwhile.
        """
        if any(hasattr(x, "_diffusers_hook") or getattr(x, "is_cache_enabled", False) for x in self._around):
            refuse_caches(self._around)  # which may have been switched on meanwhile
        for attention, name, target in self._targets:
            if getattr(attention, name, None) is not target:
                raise RuntimeError(
                    f"a projection of {type(attention).__name__} was replaced after the lock was attached, as by an "
                    "adapter: load adapters first, then lock"
                )
        if self._says_ahead and ahead is None and mode is not Mode.OFF:
            raise RuntimeError(
                f"{type(self.transformer).__name__} has tokens in front of the video's, whose number was not said"
            )
        weight, tokens = self._own_part(mode, weight, tokens)
        state = self.state
        state.thread = threading.get_ident()
        state.mode, state.weight, state.kept, state.fired = mode, weight, {} if kept is None else kept, Counter()
        state.tokens, state.ahead, state._at_places = tokens, ahead or 0, None
        fast = self.fast if mode not in (Mode.OFF, Mode.FOREGROUND) else None
        try:
            with nullcontext() if fast is None else fast.forward():
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
        parallel = getattr(self.transformer, "_parallel_config", None)
        shard = None if parallel is None else shard_of(self.transformer)
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
