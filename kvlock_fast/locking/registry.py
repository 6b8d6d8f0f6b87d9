"""The modules that are locked now, by number."""

import itertools

from kvlock_fast.locking.state import LockState

NUMBERS = itertools.count()


LOCKED: dict[int, tuple[LockState, tuple[int, str], int]] = {}
"""By number: the state, the key and the dimension of the tokens of every module that is locked now."""


def locked_entry(number: int) -> tuple[LockState, tuple[int, str], int]:
    """The state, the key and the dimension of the tokens of a locked module."""
    return LOCKED[number]
