"""Other changes to a transformer: those that a lock cannot coexist with are refused.

torch.compile is for a transformer's repeated blocks ("regional"): one block is compiled, and serves all of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from kvlock_fast.errors import InputError


@contextmanager
def compiled_blocks(transformers: Sequence[nn.Module], wish: str, names: tuple[str, ...] = ()) -> Iterator[None]:
    """The blocks compiled while the context is open, by a wish of `COMPILE`; what was compiled before stays so.

    names: of the blocks' classes, where diffusers does not say. What torch has compiled it keeps: opening the context
    again costs nothing. Raises InputError for a model that does not name its repeated blocks, and where they cannot be
    compiled.
    """
    if wish == "off":
        yield
        return
    ours: list[nn.Module] = []
    try:
        for block in (block for transformer in transformers for block in repeated_blocks(transformer, names)):
            if block._compiled_call_impl is None:
                block.compile()
                ours.append(block)
        yield
    except TorchDynamoException as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"compile is 'regional', but the model's blocks cannot be compiled: {first}") from error
    finally:
        for block in ours:
            block._compiled_call_impl = None


def repeated_blocks(transformer: nn.Module, names: tuple[str, ...] = ()) -> list[nn.Module]:
    """The blocks that are alike, as diffusers says or, where it does not, by the names of their classes."""
    alike = set(getattr(transformer, "_repeated_blocks", None) or names)
    blocks = [module for module in transformer.modules() if type(module).__name__ in alike]
    if not blocks:
        raise InputError(
            f"compile is 'regional', but {type(transformer).__name__} does not say which of its blocks are alike"
        )
    return blocks


CACHES = {
    "faster_cache": "FasterCache",
    "first_block_cache": "FirstBlockCache",
    "layer_skip": "LayerSkip",
    "mag_cache": "MagCache",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
    "sea_cache": "SeaCache",
    "taylorseer_cache": "TaylorSeerCache",
    "text_kv_cache": "TextKVCache",
}
"""By the module of `diffusers.hooks` that their hooks come from: a hook's own name is often the caller's choice."""


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """diffusers' hooks on a module, by name."""
    return getattr(getattr(module, "_diffusers_hook", None), "hooks", {})


def device_of(transformer: nn.Module) -> torch.device:
    """The device that a transformer runs on; hooks that offload it know it before the weights are there."""
    for module in transformer.modules():
        group = hooks_of(module).get("group_offloading")
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if group is not None:
            device = group.config.onload_device
        if device is not None:
            return torch.device(device)
    return next(transformer.parameters()).device


def refuse_caches(modules: Iterable[nn.Module]) -> None:
    """Raise InputError if one of diffusers' caches is on any of the modules.

    They take a layer's output from an earlier step, and tell branches apart by a context that diffusers' own pipelines
    give. So they are refused whether or not something is locked, and however they were switched on.
    """
    for module in modules:
        for name, hook in hooks_of(module).items():
            package, _, where = type(hook).__module__.rpartition(".")
            if package == "diffusers.hooks" and where in CACHES:
                raise InputError(
                    f"diffusers' {CACHES[where]} is on (hook {name!r}), which takes layers' outputs from earlier "
                    "steps: switch it off first, by disable_cache() or remove_hook()"
                )
        if getattr(module, "is_cache_enabled", False):
            raise InputError(
                f"the transformer's cache is on ({type(module._cache_config).__name__}), which takes layers' outputs "
                "from earlier steps: call disable_cache() first"
            )


def refuse_wrapped(transformer: Any) -> None:
    """Raise InputError for states of a model in which a lock would miss keys, values or whole layers."""
    if hasattr(transformer, "_orig_mod"):
        raise InputError(
            "the transformer is wrapped by torch.compile(): use its own compile() or compile_repeated_blocks() instead"
        )
    refuse_caches(transformer.modules())
    if getattr(getattr(transformer, "_parallel_config", None), "tensor_parallel_config", None) is not None:
        raise InputError("the transformer runs in tensor parallelism, in which no process has all of a token's keys")
    for name, module in transformer.named_modules():
        if _is_fused(module):
            raise InputError(f"{name} has fused projections, which hide its values: unfuse_qkv_projections() first")


def _is_fused(attention: nn.Module) -> bool:
    if not getattr(attention, "fused_projections", False):
        return False
    # diffusers' older attentions keep the mark when they are taken apart: their processor decides.
    older = any(kind.__module__ == "diffusers.models.attention_processor" for kind in type(attention).__mro__)
    return not older or "Fused" in type(attention.processor).__name__
