"""A trial of the prologue's kernel on the GPU it is to run on, beside plain torch: before the fast path is chosen for
anybody.
"""

from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.kernels.prologue import Capture, Lock, Places, PrologueOutput, QKNorm, RoPE, prologue
from kvlock_fast.kernels.quantize import QuantizedKV, quantize_kv

TOKENS = 130
ROUNDINGS, FP8_STEP = 16, 1 / 8
"""How far both may be apart, relative to the largest value: in steps of the dtype, and of what is packed."""


@cache
def disagreement(device: torch.device, dtype: torch.dtype, heads: int, dim: int, norm: str) -> str | None:
    """Try each way to lock and to keep K and V once at these sizes: what is wrong with the kernel, None if nothing."""
    errors = ()  # without Triton the reference alone is tried
    with suppress(ImportError):
        errors = (import_module("triton.errors").TritonError,)
    trial = _Trial(device, dtype, heads, dim, norm)
    try:
        for name, arguments in trial.calls():
            by_kernel, by_torch = (prologue(*trial.qkv, heads, **arguments, backend=x) for x in ("triton", "reference"))
            for kind, a, b, allowed in trial.pairs(by_kernel, by_torch):
                if not _near(a, b, allowed):
                    return f"the prologue's kernel gives other {kind} than plain torch on this GPU ({name})"
    except errors as error:
        return f"the prologue's kernel does not run on this GPU: {str(error).splitlines()[0]}"
    return None


class _Trial:
    """Random projections, and calls that lock and keep them."""

    def __init__(self, device: torch.device, dtype: torch.dtype, heads: int, dim: int, norm: str):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.heads, self.dim, self.dtype = heads, dim, dtype
        q, k, v = normal(2, TOKENS, 3 * heads * dim).to(dtype).chunk(3, 2)
        self.qkv = q, k, v
        size = heads * dim if norm == "rms_across_heads" else dim
        q_weight, k_weight = (None if norm == "none" else 1 + 0.1 * normal(size).to(dtype) for _ in range(2))
        self.norm = QKNorm(norm, q_weight, k_weight)
        angle = normal(TOKENS, 1, dim // 2)
        self.rope = RoPE(angle.cos(), angle.sin()) if dim % 2 == 0 else None
        order = torch.randperm(TOKENS, generator=generator).to(device)
        self.rows = (order - TOKENS // 3).int()
        self.weight = torch.linspace(-0.5, 1.5, TOKENS).clamp(0, 1).to(device)[None]
        self.kept = normal(1, TOKENS - TOKENS // 3, heads, dim).to(dtype)

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and arguments of `prologue` after the heads."""
        common = {"norm": self.norm, "rope": self.rope}
        places = Places(self.rows, self.kept.shape[1])
        k, v = (quantize_kv(self.kept, "fp8_e4m3", kind) for kind in "kv")
        return [
            ("in the batch", {**common, "foreground": 0, "lock": Lock(self.weight)}),
            ("stored", {**common, "places": places, "lock": Lock(self.weight, k, v, stage="normed")}),
            ("kept", {**common, "places": places, "capture": Capture("fp8_e4m3", "normed")}),
        ]

    def pairs(self, one: PrologueOutput, other: PrologueOutput) -> list[tuple[str, Tensor, Tensor, float]]:
        """Outputs to compare: a name, both values, the allowed difference."""
        rounding = ROUNDINGS * torch.finfo(self.dtype).eps
        found = [(name, getattr(one, name), getattr(other, name), rounding) for name in "qkv"]
        for name in ("captured_k", "captured_v"):
            a, b = getattr(one, name), getattr(other, name)
            if isinstance(a, QuantizedKV):
                found.append(
                    (name.replace("_", " "), a.dequantize(torch.float32), b.dequantize(torch.float32), FP8_STEP)
                )
        return found


def _near(a: Tensor, b: Tensor, allowed: float) -> bool:
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= allowed * b.abs().max())
