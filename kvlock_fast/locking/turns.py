"""Edits of one transformer in several threads take turns, because a lock changes the model itself."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_TURNS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_MAKING = threading.Lock()


@contextmanager
def one_at_a_time(transformers: Iterable[nn.Module]) -> Iterator[None]:
    """Wait until no other thread edits with these transformers, and keep others waiting until the end.

    The same thread may come again, as a callback does; the lock on the model then refuses it.
    """
    with _MAKING:
        turns = {id(turn): turn for turn in (_TURNS.setdefault(model, threading.RLock()) for model in transformers)}
    with ExitStack() as held:
        for _, turn in sorted(turns.items()):  # in one order, so that no two wait for each other
            held.enter_context(turn)
        yield
