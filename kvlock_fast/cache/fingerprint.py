"""Fingerprints of weights wherever they are: in memory, in accelerate's care, in files of diffusers' group offloading.

A cache's manifest holds the facts that it was made of, as plain JSON values. `SOURCE_FACTS` must be equal to an edit's
for the cache to serve at all; the rest says what it contains, which may be more than the edit asks for.
`first_difference` says in which of them the two differ.
"""

import json
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import Tensor, nn

from kvlock_fast.cache.shard import tensor_bytes
from kvlock_fast.errors import InputError


@dataclass(frozen=True)
class Weight:
    """A parameter or persistent buffer.

    stamp: changes with the values, as far as torch counts their changes; read: gives the values; held: the
    tensor in memory, None where it is in a file.
    """

    name: str
    stamp: Hashable
    read: Callable[[], Tensor]
    held: Tensor | None = None


def _all_weights(module: nn.Module) -> list[Weight]:
    """All weights of the module's state dict, in its order. Raises InputError where one is nowhere."""
    files = _in_files(module)
    return [_weight(module, name, x, files) for name, x in module.state_dict(keep_vars=True).items()]


def _computed_in(module: nn.Module) -> list[str]:
    """Dtypes that weights are cast to for a forward (diffusers' layerwise casting)."""
    hooks = (_hook(part, "layerwise_casting") for part in module.modules())
    return sorted({str(hook.compute_dtype) for hook in hooks if hook is not None})


def _weight(module: nn.Module, name: str, x: Tensor, files: dict[int, Any]) -> Weight:
    if id(x) in files:  # what is in memory of it is anything
        group = files[id(x)]
        path, key = group.safetensors_file_path, group.tensor_to_key[x]
        return Weight(name, (path, Path(path).stat().st_mtime_ns, key), partial(_from_file, path, key))
    if x.is_meta:
        x = _with_accelerate(module, name)
    return Weight(name, (x.data_ptr(), None if x.is_inference() else x._version), lambda: x, x)


def _hook(part: nn.Module, name: str) -> Any:
    return getattr(getattr(part, "_diffusers_hook", None), "hooks", {}).get(name)


def _in_files(module: nn.Module) -> dict[int, Any]:
    """The group whose file replaces a tensor (diffusers' group offloading), by the tensor's id."""
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
        for one in (hook, *getattr(hook, "hooks", ())):
            kept = getattr(one, "weights_map", None)
            with suppress(KeyError):
                if kept is not None:
                    return kept[".".join(parts[depth:])]
    raise InputError(f"the weights of {name} are not in memory: a cache cannot tell which model they make")


SOURCE_FACTS = {
    "model": "another model",
    "scheduler": "another schedule",
    "size": "another length or working size",
    "video": "another video, or other frames of it",
    "source_prompt": "another source prompt",
    "source_path": "another way to the source's latents (source_path, source_noise, inversion_solver)",
    "noise": "other noise",
}
"""The facts that must be the same, each with what to say if it is not."""


def digest(*tensors: Tensor) -> str:
    """xxh3-128 of dtypes, shapes and bytes, as hex."""
    state = xxhash.xxh3_128()
    for tensor in tensors:
        state.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor_bytes(tensor))
    return state.hexdigest()


_known: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()
"""Fingerprints by module, with what they were made of: tens of gigabytes are not hashed twice."""


def fingerprint(modules: list[nn.Module]) -> str:
    """xxh3-128 of the modules' classes, configs and all weights, adapters and their scales included.

    Weights that are offloaded are read from where they are kept. Raises InputError where they are nowhere.
    """
    return "".join(_fingerprint(module) for module in modules)


def _fingerprint(module: nn.Module) -> str:
    weights = _all_weights(module)
    # Changes of inference tensors are not counted.
    counted = not any(tensor.is_inference() for tensor in module.state_dict(keep_vars=True).values())
    adapters = [(name, *_adapter(part)) for name, part in module.named_modules() if _adapter(part)]
    casts = _computed_in(module)
    facts = [type(module).__name__, _config(module), adapters, *([casts] if casts else [])]
    facts = json.dumps(facts, sort_keys=True, default=str)
    now = facts, [(weight.name, weight.stamp) for weight in weights], _sampled(weights)
    if counted and module in _known and _known[module][0] == now:
        return _known[module][1]
    state = xxhash.xxh3_128(facts.encode())
    for weight in weights:
        tensor = weight.read()
        state.update(f"{weight.name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor_bytes(tensor))
    _known[module] = now, state.hexdigest()
    return state.hexdigest()


def _config(module: Any) -> dict[str, Any]:
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    return {key: value for key, value in config.items() if not key.startswith("_")}


SAMPLED = 256
"""Bytes of a weight that are looked at each time, evenly spread."""


def _sampled(weights: list[Weight]) -> str:
    """A digest of some bytes of every weight in memory.

    Changes through `.data`, NumPy or DLPack are not counted by torch. Those of fused adapters, of casts and of loaded
    weights touch most of a tensor's bytes, and so these.
    """
    taken: dict[torch.device, list[Tensor]] = {}
    with torch._C.DisableTorchFunctionSubclass():  # packed weights have ideas of their own about joining
        for weight in weights:
            if weight.held is None or not weight.held.numel():
                continue
            data = _bytes_of(weight.held.detach())
            count = min(data.numel(), SAMPLED)
            places = torch.arange(count, device=data.device) * (data.numel() - 1) // max(1, count - 1)
            taken.setdefault(data.device, []).append(data[places])
    state = xxhash.xxh3_128()
    for device in sorted(taken, key=str):
        state.update(torch.cat(taken[device]).cpu().numpy().data)
    return state.hexdigest()


def _bytes_of(x: Tensor) -> Tensor:
    """The tensor's bytes [n]; in the order of its memory where it is not contiguous, so that nothing is copied."""
    if x.is_contiguous():
        return x.reshape(-1).view(torch.uint8)
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def _adapter(part: nn.Module) -> list[Any]:
    """The facts of an adapter layer (peft) beside its parameters: scales, and which are switched on."""
    if not isinstance(getattr(part, "scaling", None), dict):
        return []
    return [part.scaling, *(getattr(part, name, None) for name in ("active_adapters", "disable_adapters"))]


def key_of(facts: dict[str, Any]) -> str:
    """A folder's name for these facts."""
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def first_difference(have: dict[str, Any], want: dict[str, Any]) -> str | None:
    """The first fact of a cache that differs from an edit's, in words; None if the cache can serve it."""
    for name, words in SOURCE_FACTS.items():
        mine, theirs = have.get(name), want[name]
        if mine == theirs:
            continue
        if isinstance(mine, dict):
            name = next(key for key in {**theirs, **mine} if mine.get(key) != theirs.get(key))
            mine, theirs = f"{name} {_short(mine.get(name))}", _short(theirs.get(name))
        hashed = name in ("video", "noise") or name.startswith("fingerprint")
        return words if hashed else f"{words} ({_short(mine)}, not {_short(theirs)})"
    return None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
