"""Locking at one interception point: the outputs of every self-attention's K-norm and V projection.

Two hooks a layer blend the source's keys and values into the new ones, in place. What they do in a forward is decided
by the `LockState` they share: nothing, keep the source's K/V, blend with what was kept, or blend with the batch's
first row (the source riding along, "lockstep"). Off means bit-identical to the stock model; after `detach` the model
is as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from kvlock_fast.errors import InputError
from kvlock_fast.kernels.blend import blend_
from kvlock_fast.models.arch import ArchSpec, first_submodule, refuse_wrapped, select_layers

HOOK_NAME = "kvlock"


class Mode(Enum):
    """What the hooks do during a forward."""

    OFF = auto()
    CAPTURE = auto()  # keep this forward's K and V
    STORED = auto()  # blend every row with the K and V kept last
    IN_BATCH = auto()  # blend rows 1.. with row 0


class LockState:
    """What all hooks of one transformer share: the mode, the weight, the kept K/V, and how many hooks fired."""

    def __init__(self, background: Tensor | None = None):
        """background: indices [N] of the tokens to keep and blend in CAPTURE and STORED; None for all."""
        self.mode = Mode.OFF
        self.weight: Tensor | None = None
        self.background = background
        self.kept: dict[tuple[int, str], Tensor] = {}
        self.fired = 0

    def apply(self, key: tuple[int, str], x: Tensor, token_dim: int) -> Tensor:
        """One hook's work on its module's output x."""
        self.fired += 1
        if self.mode is Mode.CAPTURE:
            self.kept[key] = x if self.background is None else x.index_select(token_dim, self.background)
        elif self.mode is Mode.STORED:
            blend_(x, self.kept[key], self.weight, token_dim, self.background)
        elif self.mode is Mode.IN_BATCH:
            blend_(x[1:], x[:1], self.weight, token_dim)
        return x


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
        self.state.kept.clear()
        _forget_child_registries(self.transformer)

    @contextmanager
    def forward(self, mode: Mode, weight: Tensor | None = None) -> Iterator[None]:
        """One forward in `mode`; afterwards every hook must have fired once.

        weight: [rows, S] fp32 (for IN_BATCH without the source's row), needed where the mode blends.
        """
        state = self.state
        state.mode, state.weight, state.fired = mode, weight, 0
        try:
            yield
        finally:
            state.mode, state.weight = Mode.OFF, None
        expected = 2 * len(self.layers)
        if state.fired != expected:
            raise RuntimeError(
                f"{state.fired} of {expected} K/V hooks fired in a forward of {type(self.transformer).__name__}: "
                "layers were skipped, or projections replaced after the lock was attached"
            )

    def forget(self) -> None:
        """Let go of the kept K and V."""
        self.state.kept.clear()


def _forget_child_registries(transformer: nn.Module) -> None:
    """Have a registry at the root look for hooks anew; diffusers caches the list."""
    registry = getattr(transformer, "_diffusers_hook", None)
    if registry is not None:
        registry.invalidate_child_registries_cache()


def blend_weight(alpha: Tensor, foreground: Tensor) -> Tensor:
    """alpha [B] and foreground tokens bool [1 or B, S] as the blend's weight [B, S] fp32."""
    return torch.where(foreground, 0.0, alpha.float()[:, None])
