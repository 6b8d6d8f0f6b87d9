"""The fast path: attention processors that have the prologue do what lies between a locked self-attention's projections
and its attention, in one pass instead of six.

They are on during forwards that lock, and only then: a model that is not locked keeps diffusers' own, and their bits.
Each takes the place of one of diffusers' processors; an attention that has another, or norms that the prologue does not
know, is left to the generic path (lock.py), which does the same to rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from kvlock_fast.errors import InputError, warn
from kvlock_fast.kernels.language import HAS_TRITON
from kvlock_fast.kernels.launch import KERNEL_DTYPES
from kvlock_fast.locking import fast_processors as ours
from kvlock_fast.locking import fast_trial
from kvlock_fast.locking.arch import Attention
from kvlock_fast.locking.compatibility import device_of
from kvlock_fast.locking.fast_qkv import Prologue
from kvlock_fast.locking.foreground import swapped
from kvlock_fast.locking.qk_norms import norm_kind, why_no_norms
from kvlock_fast.locking.state import LockState
from kvlock_fast.settings import PROCESSORS

FAST: dict[str, type[ours.FastProcessor]] = {
    "transformer_wan.WanAttnProcessor": ours.WanFastProcessor,
    "transformer_wan_animate.WanAttnProcessor": ours.WanFastProcessor,
    "transformer_chronoedit.WanAttnProcessor": ours.WanFastProcessor,
    "transformer_skyreels_v2.SkyReelsV2AttnProcessor": ours.WanFastProcessor,
    "attention_processor.CogVideoXAttnProcessor2_0": ours.CogVideoXFastProcessor,
    "transformer_ltx.LTXVideoAttnProcessor": ours.LTXFastProcessor,
    "transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0": ours.HunyuanVideoFastProcessor,
}
"""Our class in place of one of diffusers', which is given as "module.Class"."""
Attentions = dict[int, tuple[str, Attention]]
"""Name and module by layer."""


class FastPath:
    """The fast processors of a transformer's locked layers."""

    def __init__(self, attentions: Attentions, state: LockState):
        self.state = state
        self.norms = {layer: norms_of(module) for layer, (_, module) in attentions.items()}
        self.attentions = [module for _, module in attentions.values()]

    @contextmanager
    def forward(self) -> Iterator[None]:
        """On for one forward, the attentions' own processors afterwards."""
        processors = [_made(_name(own), _chosen_attention(own)) for own in (each.processor for each in self.attentions)]
        self.state.prologue = Prologue(self.state, self.norms)
        try:
            with swapped(self.attentions, processors):
                yield
        finally:
            self.state.prologue = None


def choose_path(wish: str, transformer: nn.Module, attentions: Attentions, state: LockState) -> FastPath | None:
    """Choose by a wish of `PROCESSORS`: the fast path, or None for the generic one.

    "auto" takes it on CUDA, where it is worth it, if the model has it and a trial there agrees with plain torch. Raises
    InputError with the reason where it is "fast" and cannot be.
    """
    if wish not in PROCESSORS:
        raise InputError(f"processors must be one of {', '.join(PROCESSORS)}, got {wish!r}")
    device = device_of(transformer)
    if wish == "generic" or (wish == "auto" and device.type != "cuda") or not attentions:
        return None
    reason = why_not_fast(transformer, attentions)
    if reason is None and device.type == "cuda":
        reason = _why_not_on(device, transformer, attentions)
        if reason is not None and wish == "auto":
            warn(f"attention goes by the generic path: {reason}")
    if reason is None:
        return FastPath(attentions, state)
    if wish == "fast":
        raise InputError(f"processors is 'fast', but {reason}")
    return None


def check_processors(wish: str, model: Any) -> None:
    """Raise InputError for a wish that is none of `PROCESSORS`, and for "fast" where the model cannot have it."""
    if wish not in PROCESSORS:
        raise InputError(f"processors must be one of {', '.join(PROCESSORS)}, got {wish!r}")
    for transformer in model.transformers if wish == "fast" else ():
        reason = why_not_fast(transformer, dict(enumerate(model.arch.attentions(transformer))))
        if reason is not None:
            raise InputError(f"processors is 'fast', but {reason}")


def why_not_fast(transformer: nn.Module, attentions: Attentions) -> str | None:
    """The reason why the fast processors cannot serve the attentions; None if they can."""
    for name, module in attentions.values():
        own = getattr(module, "processor", None)
        if _name(own) not in FAST:
            kind = type(own).__name__
            return f"there is no fast path for {name} of {type(transformer).__name__}, which has a {kind}"
        if getattr(own, "_parallel_config", None) is not None:
            return f"{name} shares its tokens with other processes"
        width = module.to_q.out_features
        if module.to_k.out_features != width:
            return f"{name} has fewer heads for its keys than for its queries"
        why = why_no_norms(*norms_of(module), module.heads, width // module.heads)
        if why is not None:
            return f"there is no fast path for {name}: {why}"
    return None


def norms_of(module: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms of an attention's queries and keys."""
    return getattr(module, "norm_q", None), getattr(module, "norm_k", None)


def _name(own: Any) -> str:
    """A processor's class with its module; "" where that is not diffusers'."""
    package, _, module = type(own).__module__.rpartition(".")
    return f"{module}.{type(own).__name__}" if package.startswith("diffusers.models") else ""


@cache
def _made(name: str, backend: Any) -> ours.FastProcessor:
    # One for all attentions and locks: compiled code then serves all of them.
    return FAST[name](backend)


def _chosen_attention(own: Any) -> Any:
    """Diffusers' name of the attention that the user has chosen for a processor or for all; None for none."""
    if not hasattr(own, "_attention_backend"):
        return None
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    chosen = own._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    return None if chosen == AttentionBackendName.NATIVE else chosen


def _why_not_on(device: torch.device, transformer: nn.Module, attentions: Attentions) -> str | None:
    """The reason why a GPU cannot run the kernel, which is tried on the first use; None if it can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    dtype = getattr(transformer, "dtype", torch.float32)
    if dtype not in KERNEL_DTYPES:
        return f"the model's dtype is {str(dtype).removeprefix('torch.')}"
    _, module = next(iter(attentions.values()))
    heads, width = module.heads, module.to_q.out_features
    return fast_trial.disagreement(device, dtype, heads, width // heads, norm_kind(module.norm_k, heads, width))
