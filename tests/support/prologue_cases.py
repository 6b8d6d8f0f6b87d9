"""Inputs of the prologue's tests, and an fp64 oracle in numpy, written from the formulas token by token."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from kvlock_fast.kernels.prologue import Capture, Lock, QKNorm, RoPE, prologue
from kvlock_fast.kernels.quantize import quantize_kv
from tests.support import oracles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """One call. source: None, a format of the cache, or "in_batch"; angles: 1 or "heads"; missing: background rows."""

    batch: int = 1
    tokens: int = 7
    heads: int = 3
    dim: int = 8
    foreground: int = 3
    norm: str = "rms_across_heads"
    layout: str | None = "interleaved"
    angles: str = "shared"
    source: str | None = None
    source_batch: int = 1
    stage: str = "rotated"
    alpha: float = 0.3
    foreground_only: bool = False
    queries: int | None = None
    dtype: torch.dtype = torch.float32
    output: str = "native"
    capture: Capture | None = None
    seed: int = 0

    def but(self, **changes):
        return replace(self, **changes)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed)).to(DEVICE, dtype)


def projections(case):
    """q, k, v as strided slices of one fused projection."""
    width = case.heads * case.dim
    q, k, v = normal(case.batch, case.tokens, 3 * width, seed=case.seed, dtype=case.dtype).chunk(3, 2)
    if case.foreground_only:
        q, k, v = (x[:, : case.foreground] for x in (q, k, v))
    return q if case.queries is None else q[:, : case.queries], k, v


def norm_of(case):
    """Weights of a trained norm: around one, with an outlier; biases for the layer norm."""
    if case.norm == "none":
        return QKNorm()
    size = case.heads * case.dim if case.norm == "rms_across_heads" else case.dim
    weights = [1 + 0.3 * normal(size, seed=case.seed + i, dtype=case.dtype) for i in (11, 12)]
    weights[1][size // 2] = 4
    biases = [normal(size, seed=case.seed + i, dtype=case.dtype) for i in (13, 14)] if case.norm == "layer" else []
    return QKNorm(case.norm, *weights, *biases, eps=1e-5)


def cancellation(case):
    """How much a norm makes of the rounding of its input: a layer norm subtracts channels that may be nearly equal."""
    if case.norm != "layer":
        return 1.0
    most = 1.0
    for x in projections(case)[:2]:
        heads = oracles.f64(x).reshape(-1, case.dim)
        if heads.size:
            most = max(most, (abs(heads).max(axis=1) / np.sqrt(heads.var(axis=1) + 1e-5)).max())
    return most


def rope_of(case):
    """Angles of a rotation; a third of the tokens (text, say) is not rotated."""
    if case.layout is None:
        return None
    heads = case.heads if case.angles == "heads" else 1
    angle = 3 * normal(case.tokens, heads, case.dim // 2, seed=case.seed + 21)
    angle[: case.tokens // 3] = 0
    return RoPE(angle.cos(), angle.sin(), case.layout)


def lock_of(case):
    if case.source is None:
        return None
    if case.source == "in_batch":
        return Lock(torch.linspace(0, 1, case.batch + 1, device=DEVICE)[1:-1])
    shape = case.source_batch, case.tokens - case.foreground, case.heads, case.dim
    kv = [normal(*shape, seed=case.seed + i, dtype=case.dtype) for i in (31, 32)]
    if case.source != "native":
        kv = [quantize_kv(x, case.source, kind, backend="reference") for x, kind in zip(kv, "kv", strict=True)]
    return Lock(case.alpha, *kv, stage=case.stage)


def inputs(case):
    """Positional and keyword arguments of `prologue`."""
    return (*projections(case), case.heads), dict(
        norm=norm_of(case), rope=rope_of(case), foreground=case.foreground, lock=lock_of(case),
        output=case.output, capture=case.capture,
    )  # fmt: skip


def run(case, backend="triton"):
    positional, named = inputs(case)
    return prologue(*positional, **named, backend=backend)


def normed_token(x, kind, weight, bias, eps):
    """x [H, D] of one token."""
    if kind == "none":
        return x
    if kind == "rms_across_heads":
        return x / np.sqrt((x * x).mean() + eps) * weight.reshape(x.shape)
    if kind == "layer":
        x = x - x.mean(axis=1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * weight
    return x if bias is None else x + bias


def rotated_token(x, cos, sin, layout):
    """x [H, D] times e^{i angle}, its pairs read as complex numbers; cos, sin [1 or H, D / 2]."""
    turn = cos + 1j * sin
    if layout == "interleaved":
        z = (x[:, 0::2] + 1j * x[:, 1::2]) * turn
        return np.stack((z.real, z.imag), axis=2).reshape(x.shape)
    half = x.shape[1] // 2
    z = (x[:, :half] + 1j * x[:, half:]) * turn
    return np.concatenate((z.real, z.imag), axis=1)


class Oracle:
    """q, k, v [B, S, H, D] in fp64, and the new keys of row 0 at both stages before any blend."""

    def __init__(self, positional, named):
        q, k, v, heads = positional
        self.norm, self.rope, self.lock = named["norm"], named["rope"], named["lock"]
        q, k, v = (oracles.f64(x).reshape(*x.shape[:2], heads, x.shape[2] // heads) for x in (q, k, v))
        first = named["foreground"]
        source_k, source_v, stage, skipped = self.source(k, v, first)
        tokens = k.shape[1] if source_k is None else first + source_k.shape[1]
        self.q = np.array([[self.done(x, "q", t) for t, x in enumerate(sample)] for sample in q]).reshape(q.shape)
        shape = (k.shape[0], tokens, *k.shape[2:])
        self.k, self.v = np.empty(shape), np.empty(shape)
        for b in range(shape[0]):
            for t in range(tokens):
                w = self.weight(b, t, first, skipped, missing=k.shape[1] < tokens)
                new_k = None if w == 1 else self.done(k[b, t], "k", t)
                new_v = None if w == 1 else v[b, t]
                ref_k = ref_v = None
                if w != 0:
                    at = (b if len(source_k) > 1 else 0), t - first
                    ref_k, ref_v = self.done(source_k[at], "k", t, stage), source_v[at]
                self.k[b, t], self.v[b, t] = mixed(new_k, ref_k, w), mixed(new_v, ref_v, w)
        self.normed = [self.normed_k(x) for x in k[0, first:]] if len(k) else []

    def source(self, k, v, first):
        if self.lock is None:
            return None, None, None, 0
        if self.lock.k is None:
            return k[:1, first:], v[:1, first:], "raw", 1
        kv = (x if isinstance(x, torch.Tensor) else x.dequantize(torch.float64) for x in (self.lock.k, self.lock.v))
        return (*(oracles.f64(x).reshape(*x.shape[:2], *k.shape[2:]) for x in kv), self.lock.stage, 0)

    def weight(self, b, t, first, skipped, missing):
        if self.lock is None or t < first or b < skipped:
            return 0.0
        if missing:
            return 1.0
        alpha = self.lock.alpha
        return float(alpha[b - skipped]) if isinstance(alpha, torch.Tensor) else float(np.float32(alpha))

    def normed_k(self, x):
        return normed_token(x, self.norm.kind, *self.parameters("k"), self.norm.eps)

    def parameters(self, which):
        given = getattr(self.norm, f"{which}_weight"), getattr(self.norm, f"{which}_bias")
        return [None if x is None else oracles.f64(x) for x in given]

    def done(self, x, which, t, stage="raw"):
        """x [H, D] of token t from its stage to the last."""
        if stage == "raw":
            x = normed_token(x, self.norm.kind, *self.parameters(which), self.norm.eps)
        if stage == "rotated" or self.rope is None:
            return x
        return rotated_token(x, oracles.f64(self.rope.cos[t]), oracles.f64(self.rope.sin[t]), self.rope.layout)


def mixed(new, ref, w):
    if w in (0.0, 1.0):
        return ref if w else new
    return (1 - w) * new + w * ref
