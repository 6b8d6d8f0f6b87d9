"""Other methods of editing, side by side with the lock: one file each, all with the same two functions.

    why_not(model, solver) -> str | None     why this model or scheduler cannot be edited so; None if it can
    edit(job) -> Tensor                      the clean latents [B, C, T, h, w] of a `Job`

Encoding, the source's path, guidance scales, masks, decoding and the trace are those of every edit.
"""

from importlib import import_module
from types import ModuleType

from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.loop.solver import Solver
from kvlock_fast.models.base import PipelineModel


def load_method(name: str) -> ModuleType:
    """Import the file of a method that is not "lock"."""
    return import_module(f"kvlock_fast.methods.{name}")


def refuse_method(
    lock: LockConfig, model: PipelineModel, solver: Solver, cache: CacheConfig, parted: str | None
) -> None:
    """Raise InputError where a lock, or another method, is not for this model, cache or clip.

    parted: what parts the clip, such as "clip_frames"; None where it goes through the model whole.
    """
    family = model.arch.family
    if lock.family is not None and family != lock.family:
        raise InputError(f"the model is of the family {family}, and the lock is for {lock.family!r} only")
    if lock.method == "lock":
        return
    if cache.path is not None:
        raise InputError(f"cache {str(cache.path)!r} does not go with the method {lock.method!r}: it would not be read")
    if parted is not None:
        raise InputError(f"{parted} does not go with the method {lock.method!r}, which takes a clip whole")
    reason = load_method(lock.method).why_not(model, solver)
    if reason is not None:
        raise InputError(f"the method {lock.method!r} cannot edit here: {reason}")
