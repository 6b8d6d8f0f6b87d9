"""The modules that are locked now, by number, and their class while they are.

Compiled code is given a module's number and nothing else of a lock. Entries are weak: a `TransformerLock` holds its
own, so that a lock that is forgotten is freed with its K and V.

A module is intercepted by its class, which is a subclass of its own one while it is locked. A hook would be an object
of its own in every layer, and torch.compile would compile every block of the model for itself, again with every lock.
By class all blocks share one graph, whatever the lock, mode and alpha.
"""

import itertools
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from kvlock_fast.locking.state import LockState, Mode


@dataclass(eq=False, slots=True, weakref_slot=True)
class Entry:
    """The lock that a module belongs to.

    state: that of its transformer; key: its layer's number, and "k" or "v"; token_dim: the dimension of its output that
    counts tokens.
    """

    state: LockState
    key: tuple[int, str]
    token_dim: int


NUMBER, NUMBER_TENSOR = "kvlock_number", "kvlock_number_tensor"
"""Attributes of a locked module: its number, and the same as a tensor (int64 [], in host memory), since compiled code
would compile a plain number in."""

_NUMBERS = itertools.count()
LOCKED: WeakValueDictionary[int, Entry] = WeakValueDictionary()

CHANGING = threading.RLock()
"""Held while modules change their classes: two locks at once would each take a module for unlocked."""


def locked_entry(number: int) -> Entry:
    """The entry of a module that is locked now. Raises RuntimeError where its lock is gone."""
    entry = LOCKED.get(number)
    if entry is None:
        raise RuntimeError("the lock of this module was forgotten or detached while a forward ran")
    return entry


def number_of(locked: nn.Module) -> int | Tensor:
    """The number of a locked module: a tensor while torch.compile traces."""
    return getattr(locked, NUMBER_TENSOR if torch.compiler.is_compiling() else NUMBER)


def _lock_output(x: Tensor, number: int) -> None:
    entry = LOCKED.get(number)
    if entry is not None:  # None: its lock is gone, and the module about to be its plain self
        entry.state.apply(entry.key, x, entry.token_dim)


@torch.library.custom_op("kvlock_fast::lock_output_", mutates_args=("x",))
def lock_output_(x: Tensor, number: Tensor) -> None:
    """Lock the output x of the module `number`, for compiled code."""
    _lock_output(x, int(number))


lock_output_.register_fake(lambda x, number: None)


class Locked(nn.Module):
    """First base of a locked module's class, in front of the module's own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            output = super().__call__(*args, **kwargs)
            lock_output_(output, getattr(self, NUMBER_TENSOR))
            return output
        # First, and as it is: a lock may be freed, or taken off by another thread, while the module runs.
        number = vars(self).get(NUMBER)
        output = super().__call__(*args, **kwargs)
        if number is not None:
            _lock_output(output, number)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy and a pickle of a locked module are its plain self."""
        kind, entry = type(self), LOCKED.get(getattr(self, NUMBER))
        if entry is not None and entry.state.mode is not Mode.OFF:
            raise RuntimeError("a locked model cannot be copied in the middle of a forward: copy it before or after")
        # Protocol 0 has no look at the object's own class, which pickle compares for the later ones.
        make, arguments, *rest = super().__reduce_ex__(0)
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: x for name, x in rest[0].items() if name not in (NUMBER, NUMBER_TENSOR)}
        return make, tuple(kind.__mro__[2] if x is kind else x for x in arguments), *rest


@cache
def _locked(kind: type[nn.Module]) -> type[nn.Module]:
    """A module's class while it is locked: one for all modules of a class, so that compiled code serves them all."""
    return type(f"Locked{kind.__name__}", (Locked, kind), {"__module__": kind.__module__})


def lock_module(module: nn.Module, entry: Entry) -> None:
    """Give a module the class of a locked one. The caller holds `CHANGING`, and the entry for as long as the lock."""
    number = next(_NUMBERS)
    LOCKED[number] = entry
    setattr(module, NUMBER, number)
    setattr(module, NUMBER_TENSOR, torch.tensor(number))
    module.__class__ = _locked(type(module))


def unlock_modules(modules: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    """Give modules their own classes back, which stand beside them; the list is emptied."""
    with CHANGING:
        for module, kind in modules:
            module.__class__ = kind
            for name in (NUMBER, NUMBER_TENSOR):
                vars(module).pop(name, None)
        modules.clear()
