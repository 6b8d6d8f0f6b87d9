"""The modules that are locked now, by number. Compiled code is given this number and nothing else of a lock.

Entries are weak: a `TransformerLock` holds its own, so that a lock that is forgotten is freed with its K and V.
"""

import itertools
from dataclasses import dataclass
from weakref import WeakValueDictionary

from kvlock_fast.locking.state import LockState


@dataclass(eq=False, slots=True, weakref_slot=True)
class Entry:
    """The lock that a module belongs to.

    state: that of its transformer; key: its layer's number, and "k" or "v"; token_dim: the dimension of its output that
    counts tokens.
    """

    state: LockState
    key: tuple[int, str]
    token_dim: int


NUMBERS = itertools.count()
LOCKED: WeakValueDictionary[int, Entry] = WeakValueDictionary()


def locked_entry(number: int) -> Entry:
    """The entry of a module that is locked now. Raises RuntimeError where its lock is gone."""
    entry = LOCKED.get(number)
    if entry is None:
        raise RuntimeError("the lock of this module was forgotten or detached while a forward ran")
    return entry
