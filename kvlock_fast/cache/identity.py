"""What a cache was made of: the facts that its manifest holds, and what they must have in common with an edit's.

Facts are plain JSON values. `SOURCE_FACTS` must be equal for a cache to serve at all; the rest says what it contains,
which may be more than an edit asks for.
"""

import json
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from kvlock_fast.cache.weights import all_weights, computed_in

SOURCE_FACTS = {
    "model": "another model",
    "scheduler": "another schedule",
    "size": "another length or working size",
    "video": "another video, or other frames of it",
    "source_prompt": "another source prompt",
    "source_path": "another way to the source's latents (source_path, inversion_solver)",
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


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes in its logical order, without a copy where it is contiguous on the CPU."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


_known: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()
"""Fingerprints by module, with what they were made of: tens of gigabytes are not hashed twice."""


def fingerprint(modules: list[nn.Module]) -> str:
    """xxh3-128 of the modules' classes, configs and all weights, adapters and their scales included.

    Weights that are offloaded are read from where they are kept. Raises InputError where they are nowhere.
    """
    return "".join(_fingerprint(module) for module in modules)


def _fingerprint(module: nn.Module) -> str:
    weights = all_weights(module)
    # Changes of inference tensors are not counted.
    counted = not any(tensor.is_inference() for tensor in module.state_dict(keep_vars=True).values())
    adapters = [(name, *_adapter(part)) for name, part in module.named_modules() if _adapter(part)]
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    casts = computed_in(module)
    facts = [type(module).__name__, config, adapters, *([casts] if casts else [])]
    facts = json.dumps(facts, sort_keys=True, default=str)
    now = facts, [(weight.name, weight.stamp) for weight in weights]
    if counted and module in _known and _known[module][0] == now:
        return _known[module][1]
    state = xxhash.xxh3_128(facts.encode())
    for weight in weights:
        tensor = weight.read()
        state.update(f"{weight.name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor_bytes(tensor))
    _known[module] = now, state.hexdigest()
    return state.hexdigest()


def _adapter(part: nn.Module) -> list[Any]:
    """What of an adapter layer (peft) is no parameter: scales, and which are switched on."""
    if not isinstance(getattr(part, "scaling", None), dict):
        return []
    return [part.scaling, *(getattr(part, name, None) for name in ("active_adapters", "disable_adapters"))]


def key_of(facts: dict[str, Any]) -> str:
    """A folder's name for these facts."""
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def first_difference(have: dict[str, Any], want: dict[str, Any]) -> str | None:
    """What is another in a cache's facts than in an edit's, in words; None if the cache can serve it."""
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
