"""Checks of the prologue's arguments: every wrong call is a ValueError that says what was given."""

from dataclasses import replace

import torch
from torch import Tensor

from kvlock_fast.kernels.language import require_package_name
from kvlock_fast.kernels.prologue_reference import (
    LAYOUTS,
    NORMS,
    OUTPUTS,
    STAGES,
    Capture,
    Lock,
    Places,
    QKNorm,
    RoPE,
)
from kvlock_fast.kernels.quantize import FORMATS, QuantizedKV

require_package_name(__name__)


def check_projections(q: Tensor, k: Tensor, v: Tensor, heads: int) -> int:
    """Channels a head."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if heads < 1 or x.ndim != 3 or not x.is_floating_point() or x.shape[2] == 0 or x.shape[2] % heads:
            raise ValueError(f"{name} must be a float [B, S, {heads} * D], got {x.dtype} {tuple(x.shape)}")
        if x.stride(2) != 1:
            raise ValueError(f"{name}'s channels must be contiguous, got strides {x.stride()}")
    if k.shape != v.shape or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v must agree in batch and channels, k and v in tokens: got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    return q.shape[2] // heads


def check_names(norm: QKNorm, rope: RoPE | None, output: str, capture: Capture | None) -> None:
    given = [("norm", norm.kind, NORMS), ("output", output, OUTPUTS)]
    if rope is not None:
        given.append(("RoPE layout", rope.layout, LAYOUTS))
    if capture is not None:
        given += [("capture format", capture.format, FORMATS), ("capture stage", capture.stage, STAGES[1:])]
    for what, name, known in given:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: one of {', '.join(known)}")


def check_norm(norm: QKNorm, heads: int, dim: int) -> None:
    size = heads * dim if norm.kind == "rms_across_heads" else dim
    for name in ("q_weight", "k_weight", "q_bias", "k_bias"):
        x = getattr(norm, name)
        if x is None:
            continue
        if norm.kind == "none" or (name.endswith("bias") and norm.kind != "layer"):
            raise ValueError(f"the norm {norm.kind!r} has no {name}")
        if x.shape != (size,) or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous [{size}] for {norm.kind!r}, got {tuple(x.shape)}")


def check_rope(rope: RoPE | None, tokens: int, heads: int, dim: int) -> None:
    if rope is None:
        return
    if dim % 2:
        raise ValueError(f"RoPE rotates pairs of channels: D must be even, got {dim}")
    for name, x in (("cos", rope.cos), ("sin", rope.sin)):
        if x.shape not in ((tokens, 1, dim // 2), (tokens, heads, dim // 2)) or x.dtype != torch.float32:
            shape = f"[{tokens}, 1 or {heads}, {dim // 2}]"
            raise ValueError(f"{name} must be fp32 {shape}, got {x.dtype} {tuple(x.shape)}")
        if x.numel() and (x.stride() != rope.cos.stride() or not x[0].is_contiguous()):
            raise ValueError("cos and sin must have the same strides and contiguous rows")


def check_places(places: Places, tokens: int, lock: Lock | None) -> None:
    rows = places.rows
    if rows.shape != (tokens,) or rows.dtype != torch.int32 or not rows.is_contiguous():
        raise ValueError(f"places' rows must be contiguous int32 [{tokens}], got {rows.dtype} {tuple(rows.shape)}")
    if not 0 <= places.count <= tokens:
        raise ValueError(f"places' count must be a number of tokens from 0 to {tokens}, got {places.count}")
    if lock is not None and lock.k is None:
        raise ValueError(
            "places are for a lock's own k and v: a source in the batch has its tokens where the others do"
        )


def placed_lock(lock: Lock, k: Tensor, v: Tensor, heads: int, foreground: int, count: int) -> tuple[Lock, int]:
    """The lock with its keys and values as [B or 1, R, H, D] or QuantizedKV, those of row 0 if it has none; and R.

    count: number of the background's tokens.
    """
    if (lock.k is None) != (lock.v is None):
        raise ValueError("a lock has both k and v or neither")
    if lock.k is None:
        lock = replace(lock, k=k[:1, foreground:], v=v[:1, foreground:], stage="raw", first_row=1)
    assert lock.k is not None
    tokens = lock.k.shape[1]
    if lock.stage not in STAGES:
        raise ValueError(f"unknown lock stage {lock.stage!r}: one of {', '.join(STAGES)}")
    placed = {}
    for kind in ("k", "v"):
        x = getattr(lock, kind)
        rows = x.shape[1]
        fits = rows == count or k.shape[1] == foreground
        if isinstance(x, Tensor) and x.ndim == 3 and x.shape[2] == k.shape[2]:
            x = x.unflatten(2, (heads, -1))
        want = rows, heads, k.shape[2] // heads
        if not fits or x.shape[0] not in (1, k.shape[0]) or tuple(x.shape[1:]) != want or rows != tokens:
            shape = f"[1 or {k.shape[0]}, {count}, {heads}, {want[2]}]"
            raise ValueError(f"the lock's {kind} must be {shape}, got {tuple(getattr(lock, kind).shape)}")
        if isinstance(x, QuantizedKV) and x.kind != kind:
            raise ValueError(f"the lock's {kind} was quantised as {x.kind!r}")
        if isinstance(x, Tensor) and x.stride(3) != 1:
            raise ValueError(f"the channels of the lock's {kind} must be contiguous, got strides {x.stride()}")
        placed[kind] = x
    return replace(lock, **placed), tokens


def alpha_of(lock: Lock, k: Tensor) -> Tensor:
    count, tokens = k.shape[0] - lock.first_row, k.shape[1]
    if isinstance(lock.alpha, Tensor):
        alpha = lock.alpha
        if alpha.shape not in ((count,), (count, tokens), (1, tokens)) or alpha.dtype != torch.float32:
            shapes = f"[{count}] or [{count} or 1, {tokens}]"
            raise ValueError(f"alpha must be fp32 {shapes}, got {alpha.dtype} {tuple(alpha.shape)}")
        if alpha.ndim == 2 and alpha.stride(1) != 1:
            raise ValueError(f"alpha's rows must be contiguous, got strides {alpha.stride()}")
        return alpha
    if not 0.0 <= lock.alpha <= 1.0:
        raise ValueError(f"alpha must be a number between 0 and 1 or a tensor, got {lock.alpha!r}")
    return torch.full((count,), float(lock.alpha), device=k.device)
