"""A module's weights wherever they are: in memory, in accelerate's care, or in files of diffusers' group offloading."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kvlock_fast.errors import InputError


@dataclass(frozen=True)
class Weight:
    """A parameter or persistent buffer. stamp: another one where the values may be others; read: gives the values."""

    name: str
    stamp: Hashable
    read: Callable[[], Tensor]


def all_weights(module: nn.Module) -> list[Weight]:
    """All that are in the module's state dict, in its order. Raises InputError where one is nowhere."""
    files = _in_files(module)
    return [_weight(module, name, x, files) for name, x in module.state_dict(keep_vars=True).items()]


def computed_in(module: nn.Module) -> list[str]:
    """The dtypes that weights are cast to for a forward (diffusers' layerwise casting)."""
    hooks = (_hook(part, "layerwise_casting") for part in module.modules())
    return sorted({str(hook.compute_dtype) for hook in hooks if hook is not None})


def _weight(module: nn.Module, name: str, x: Tensor, files: dict[int, Any]) -> Weight:
    if id(x) in files:  # what is in memory of it is anything
        group = files[id(x)]
        path, key = group.safetensors_file_path, group.tensor_to_key[x]
        return Weight(name, (path, Path(path).stat().st_mtime_ns, key), partial(_from_file, path, key))
    if x.is_meta:
        x = _with_accelerate(module, name)
    return Weight(name, (x.data_ptr(), None if x.is_inference() else x._version), lambda: x)


def _hook(part: nn.Module, name: str) -> Any:
    return getattr(getattr(part, "_diffusers_hook", None), "hooks", {}).get(name)


def _in_files(module: nn.Module) -> dict[int, Any]:
    """By the tensor's id, the group with whose file diffusers' group offloading has replaced it."""
    groups = (getattr(_hook(part, "group_offloading"), "group", None) for part in module.modules())
    on_disk = [group for group in groups if group is not None and group.offload_to_disk_path]
    return {id(x): group for group in on_disk if group._is_offloaded_to_disk for x in group.tensor_to_key}


def _from_file(path: str, key: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)


def _with_accelerate(module: nn.Module, name: str) -> Tensor:
    """A weight that accelerate's hooks bring to its module, or to one that this is in."""
    parts = name.split(".")
    for depth in reversed(range(len(parts))):
        hook = getattr(module.get_submodule(".".join(parts[:depth])), "_hf_hook", None)
        for kept in (getattr(one, "weights_map", None) for one in (hook, *getattr(hook, "hooks", ()))):
            try:
                return kept[".".join(parts[depth:])]
            except (KeyError, TypeError):
                continue
    raise InputError(f"the weights of {name} are not in memory: a cache cannot tell which model they make")
