"""The fast path: attention processors that have the prologue do what lies between a locked self-attention's projections
and its attention, in one pass instead of six.

They are on during forwards that lock, and only then: a model that is not locked keeps diffusers' own, and their bits.
Each takes the place of one of diffusers' processors; an attention that has another, or norms that the prologue does not
know, is left to the generic path (lock.py), which does the same to rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from kvlock_fast.errors import InputError, warn
from kvlock_fast.kernels.attention import attention
from kvlock_fast.kernels.language import HAS_TRITON
from kvlock_fast.kernels.launch import KERNEL_DTYPES
from kvlock_fast.locking.compatibility import device_of
from kvlock_fast.locking.foreground import swapped
from kvlock_fast.locking.qk_norms import norm_kind, why_no_norms
from kvlock_fast.settings import PROCESSORS

FAST = {
    "transformer_wan.WanAttnProcessor": "WanFastProcessor",
    "transformer_wan_animate.WanAttnProcessor": "WanFastProcessor",
    "transformer_chronoedit.WanAttnProcessor": "WanFastProcessor",
    "transformer_skyreels_v2.SkyReelsV2AttnProcessor": "WanFastProcessor",
    "attention_processor.CogVideoXAttnProcessor2_0": "CogVideoXFastProcessor",
    "transformer_ltx.LTXVideoAttnProcessor": "LTXFastProcessor",
    "transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0": "HunyuanVideoFastProcessor",
}
"""The class in fast_processors.py by diffusers' own, which is given as "module.Class"."""


class FastProcessor:
    """What the families' processors have in common: the attention itself."""

    _parallel_config = None

    def __init__(self, backend: Any):
        """backend: diffusers' name of the attention that the user has chosen, None for none."""
        self.backend = backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of q to k, v [B, n, H, D]; mask: as diffusers gives it to its attentions."""
        if mask is not None or self.backend is not None:
            from diffusers.models.attention_dispatch import dispatch_attention_fn

            return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=self.backend)
        if q.is_cuda:
            return attention(q, k, v, attention="library")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class FastPath:
    """The fast processors of a transformer's locked layers."""

    def __init__(self, attentions: dict[int, tuple[str, nn.Module]], state: Any):
        """attentions: name and module by layer; state: their `LockState`."""
        self.state = state
        self.norms = {layer: norms_of(module) for layer, (_, module) in attentions.items()}
        self.attentions = [module for _, module in attentions.values()]

    @contextmanager
    def forward(self) -> Iterator[None]:
        """On for one forward, the attentions' own processors afterwards."""
        from kvlock_fast.locking.fast_qkv import Prologue

        ours = [fast_processor(module.processor) for module in self.attentions]
        self.state.prologue = Prologue(self.state, self.norms)
        try:
            with swapped(self.attentions, ours):
                yield
        finally:
            self.state.prologue = None


def choose_path(
    wish: str, transformer: nn.Module, attentions: dict[int, tuple[str, nn.Module]], state: Any
) -> FastPath | None:
    """The fast path by a wish of `PROCESSORS`, None for the generic one.

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


def why_not_fast(transformer: nn.Module, attentions: dict[int, tuple[str, nn.Module]]) -> str | None:
    """What in the attentions, name and module by layer, the fast processors would miss; None if nothing."""
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
    """Of an attention's queries and keys."""
    return getattr(module, "norm_q", None), getattr(module, "norm_k", None)


def fast_processor(own: Any) -> FastProcessor:
    """Ours in place of one of diffusers' that is in `FAST`."""
    return _made(_name(own), _chosen_attention(own))


def _name(own: Any) -> str | None:
    """Of a processor's class, with its module; None where that is not diffusers'."""
    package, _, module = type(own).__module__.rpartition(".")
    return f"{module}.{type(own).__name__}" if package.startswith("diffusers.models") else None


@cache
def _made(kind: str, backend: Any) -> FastProcessor:
    # One for all attentions and locks: compiled code then serves all of them.
    # Imported late: the processors are subclasses of FastProcessor.
    return getattr(import_module("kvlock_fast.locking.fast_processors"), FAST[kind])(backend)


def _chosen_attention(own: Any) -> Any:
    """Diffusers' name of the attention that the user has chosen for a processor or for all; None for none."""
    if not hasattr(own, "_attention_backend"):
        return None
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    chosen = own._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    return None if chosen == AttentionBackendName.NATIVE else chosen


def _why_not_on(
    device: torch.device, transformer: nn.Module, attentions: dict[int, tuple[str, nn.Module]]
) -> str | None:
    """What on a GPU speaks against the kernel, which is tried on the first use; None if nothing."""
    if not HAS_TRITON:
        return "Triton is not installed"
    dtype = getattr(transformer, "dtype", torch.float32)
    if dtype not in KERNEL_DTYPES:
        return f"the model's dtype is {str(dtype).removeprefix('torch.')}"
    from kvlock_fast.locking.fast_trial import disagreement

    _, module = next(iter(attentions.values()))
    width = module.to_q.out_features
    return disagreement(
        device, dtype, module.heads, width // module.heads, norm_kind(module.norm_k, module.heads, width)
    )
