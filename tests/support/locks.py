"""Locks as tests ask for them."""

from typing import Any

from kvlock_fast.config import LockConfig


def paper(**changes: Any) -> LockConfig:
    """The paper's settings, some of them changed."""
    return LockConfig.preset("paper", **changes)
