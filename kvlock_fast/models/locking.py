"""Locking at one interception point: the outputs of every self-attention's K-norm and V projection.

Two hooks a layer blend the source's keys and values into the new ones, in place. What they do in a forward is decided
by the `LockState` they share: nothing, keep the source's K/V, blend with what was kept (in this step or in a cache),
or blend with the batch's first row (the source riding along, "lockstep"). Off means bit-identical to the stock model;
after `detach` the model is as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from kvlock_fast.errors import InputError
from kvlock_fast.kernels.blend import as_heads, blend_
from kvlock_fast.kernels.quantize import QuantizedKV, quantize_kv
from kvlock_fast.models.arch import ArchSpec, first_submodule, refuse_wrapped, select_layers
from kvlock_fast.nvtx import span

HOOK_NAME = "kvlock"

KeptKV = dict[tuple[int, str], Tensor | QuantizedKV]
"""By layer number and "k" or "v"."""


class Mode(Enum):
    """What the hooks do during a forward."""

    OFF = auto()
    CAPTURE = auto()  # keep this forward's K and V
    STORED = auto()  # blend every row with K and V that were kept
    IN_BATCH = auto()  # blend rows 1.. with row 0


class LockState:
    """What all hooks of one transformer share: the mode, the weight, the kept K/V, and how many hooks fired."""

    def __init__(self, background: Tensor | None = None):
        """background: indices [N] of the tokens to keep and blend in CAPTURE and STORED; None for all."""
        self.mode = Mode.OFF
        self.weight: Tensor | None = None
        self.background = background
        self.kept: KeptKV = {}
        self.fired = 0

    def apply(self, key: tuple[int, str], x: Tensor, token_dim: int) -> Tensor:
        """One hook's work on its module's output x."""
        self.fired += 1
        if self.mode is Mode.CAPTURE:
            with span("capture"):
                self._keep(key, x, token_dim)
        elif self.mode is Mode.STORED:
            with span("lock"):
                blend_(x, self.kept[key], self.weight, token_dim, self.background)
        elif self.mode is Mode.IN_BATCH:
            with span("lock"):
                blend_(x[1:], x[:1], self.weight, token_dim)
        return x

    def _keep(self, key: tuple[int, str], x: Tensor, token_dim: int) -> None:
        """Pack x into what is there for this layer, or keep it as it is."""
        place = self.kept.get(key)
        if place is None:
            self.kept[key] = x if self.background is None else x.index_select(token_dim, self.background)
            return
        packed = quantize_kv(as_heads(x, token_dim, place.shape[2]), place.format, place.kind, tokens=self.background)
        place.copy_(packed)


class _LockHook(ModelHook):
    def __init__(self, state: LockState, layer: int, kind: str, token_dim: int):
        super().__init__()
        self.state, self.key, self.token_dim = state, (layer, kind), token_dim

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return self.state.apply(self.key, output, self.token_dim)


class TransformerLock:
    """The hooks on one transformer. `detach` takes them off again."""

    def __init__(
        self,
        transformer: nn.Module,
        arch: ArchSpec,
        layers: tuple[int, ...] | None = None,
        background: Tensor | None = None,
    ):
        """layers: the locked self-attention layers by number, None for all; background: as in `LockState`.

        Raises InputError where hooks would miss K or V; then nothing is attached.
        """
        refuse_wrapped(transformer)
        attentions = arch.attentions(transformer)
        if not attentions:
            raise InputError(f"{type(transformer).__name__} has no self-attention named {arch.attention!r}")
        self.transformer = transformer
        self.layers = select_layers(len(attentions), layers)
        self.state = LockState(background)
        self._targets: list[nn.Module] = []
        try:
            for layer in self.layers:
                name, attention = attentions[layer]
                for kind, names, token_dim in (("k", arch.key, arch.token_dim), ("v", arch.value, 1)):
                    self._hook(first_submodule(attention, names), _LockHook(self.state, layer, kind, token_dim), name)
        except Exception:
            self.detach()
            raise
        _forget_child_registries(transformer)

    def _hook(self, target: nn.Module, hook: _LockHook, name: str) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(target)
        if registry.get_hook(HOOK_NAME) is not None:
            raise InputError(f"{name} is locked already: detach the other lock first")
        registry.register_hook(hook, HOOK_NAME)
        self._targets.append(target)

    def detach(self) -> None:
        """Take the hooks off; the transformer is as it was."""
        for target in self._targets:
            target._diffusers_hook.remove_hook(HOOK_NAME, recurse=False)
            if not target._diffusers_hook.hooks:
                del target._diffusers_hook
            # The registry restores the method as an instance attribute; the class's own one is enough.
            if getattr(vars(target).get("forward"), "__func__", None) is type(target).forward:
                del target.forward
        self._targets = []
        _forget_child_registries(self.transformer)

    @contextmanager
    def forward(self, mode: Mode, weight: Tensor | None = None, kept: KeptKV | None = None) -> Iterator[None]:
        """One forward in `mode`; afterwards every hook must have fired once.

        weight: [rows, S] fp32 (for IN_BATCH without the source's row), needed where the mode blends. kept: the
        background's K and V to blend with (STORED), or the places to pack them into (CAPTURE; where there is none for
        a layer, a tensor is added).
        """
        state = self.state
        state.mode, state.weight, state.kept, state.fired = mode, weight, {} if kept is None else kept, 0
        try:
            yield
        finally:
            state.mode, state.weight, state.kept = Mode.OFF, None, {}
        expected = 2 * len(self.layers)
        if state.fired != expected:
            raise RuntimeError(
                f"{state.fired} of {expected} K/V hooks fired in a forward of {type(self.transformer).__name__}: "
                "layers were skipped, or projections replaced after the lock was attached"
            )


def _forget_child_registries(transformer: nn.Module) -> None:
    """Have a registry at the root look for hooks anew; diffusers caches the list."""
    registry = getattr(transformer, "_diffusers_hook", None)
    if registry is not None:
        registry.invalidate_child_registries_cache()


def kv_sizes(transformer: nn.Module, arch: ArchSpec) -> tuple[int, int]:
    """Heads, and channels a head, of the self-attentions' keys and values. InputError where layers differ."""
    sizes = {(a.heads, a.to_k.out_features // a.heads) for _, a in arch.attentions(transformer)}
    if len(sizes) != 1:
        raise InputError(f"the self-attentions of {type(transformer).__name__} are of different sizes: {sorted(sizes)}")
    return sizes.pop()


def blend_weight(alpha: Tensor, foreground: Tensor) -> Tensor:
    """alpha [B] and foreground tokens bool [1 or B, S] as the blend's weight [B, S] fp32."""
    return torch.where(foreground, 0.0, alpha.float()[:, None])
