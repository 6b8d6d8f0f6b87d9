"""KV-Lock for diffusers video models: training-free editing with the background locked to the source's keys and values.

Light to import: torch and diffusers are loaded by the first attribute that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvlock_fast.version import __version__

if TYPE_CHECKING:
    from kvlock_fast import ops
    from kvlock_fast.config import CacheConfig, LockConfig
    from kvlock_fast.errors import InputError
    from kvlock_fast.integrations.attach import AttachedLock, attach
    from kvlock_fast.integrations.guider import KVLockGuidance
    from kvlock_fast.integrations.modular import KVLockDenoiseStep, KVLockSourceStep, KVLockWanBlocks
    from kvlock_fast.locking.arch import ArchSpec
    from kvlock_fast.media.paste import composite
    from kvlock_fast.pipeline import EditOutput, KVLockPipeline
    from kvlock_fast.tools.doctor import capabilities

__all__ = [
    "ArchSpec",
    "AttachedLock",
    "CacheConfig",
    "EditOutput",
    "InputError",
    "KVLockDenoiseStep",
    "KVLockGuidance",
    "KVLockPipeline",
    "KVLockSourceStep",
    "KVLockWanBlocks",
    "LockConfig",
    "__version__",
    "attach",
    "capabilities",
    "composite",
    "ops",
]

# No module at the package's top has the name of what is exported: once imported, it would stand in its place.
_HOMES = {
    "ArchSpec": "locking.arch",
    "AttachedLock": "integrations.attach",
    "attach": "integrations.attach",
    "KVLockGuidance": "integrations.guider",
    "KVLockDenoiseStep": "integrations.modular",
    "KVLockSourceStep": "integrations.modular",
    "KVLockWanBlocks": "integrations.modular",
    "CacheConfig": "config",
    "LockConfig": "config",
    "InputError": "errors",
    "composite": "media.paste",
    "KVLockPipeline": "pipeline",
    "EditOutput": "pipeline",
    "capabilities": "tools.doctor",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("kvlock_fast.ops")
    if name in _HOMES:
        return getattr(import_module(f"kvlock_fast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'kvlock_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
