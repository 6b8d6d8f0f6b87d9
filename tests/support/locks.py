"""Locks as tests ask for them."""

from typing import Any

from kvlock_fast.config import LockConfig


def paper(**changes: Any) -> LockConfig:
    """The paper's settings in a first reading, as its ablations keep it, some of them changed."""
    return LockConfig.preset("paper", **{"reduction": "elements", "warmup_alpha": 1.0, **changes})
