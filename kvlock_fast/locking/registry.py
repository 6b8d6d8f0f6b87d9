"""The modules that are locked now, by number. What compiled code is given of a lock is only this number.

Entries are weak: a `TransformerLock` holds its own, so that a lock that is forgotten is freed with its K and V.
"""

import itertools
from dataclasses import dataclass
from weakref import WeakValueDictionary

from kvlock_fast.locking.state import LockState


@dataclass(eq=False, slots=True, weakref_slot=True)
class Entry:
    """What a locked module belongs to.

    state: that of its transformer; key: its layer's number, and "k" or "v"; token_dim: the dimension of its output that
    counts tokens.
    """

    state: LockState
    key: tuple[int, str]
    token_dim: int


NUMBERS = itertools.count()
LOCKED: WeakValueDictionary[int, Entry] = WeakValueDictionary()
