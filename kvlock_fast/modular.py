"""Documented name of `kvlock_fast.integrations.modular`: KV-Lock as blocks of diffusers' modular pipelines for Wan."""

from kvlock_fast.integrations.modular import (
    KVLockDenoiseStep,
    KVLockSourceStep,
    KVLockWan22Blocks,
    KVLockWanBlocks,
)

__all__ = ["KVLockDenoiseStep", "KVLockSourceStep", "KVLockWan22Blocks", "KVLockWanBlocks"]
