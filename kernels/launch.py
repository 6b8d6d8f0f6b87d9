"""Who runs an operation, and the one place where kernels are launched.

`runs_triton` decides between the reference and Triton; `launch` starts a kernel. `recorded_launches` lists what was
started, and on a dry run starts nothing: launchers then take `meta` tensors, and the list is what a program of these
shapes would compile to. Tests count launches with it, and `kvlock-fast kernels` compiles what is shipped.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.kernels.language import HAS_TRITON, INTERPRETED, require_package_name

require_package_name(__name__)

BACKENDS = ("auto", "reference", "triton")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def runs_triton(backend: str, *tensors: Tensor) -> bool:
    """Whether Triton serves these tensors. "auto" takes it for CUDA tensors of the dtypes the kernels know.

    Raises ValueError for an unknown backend, and for "triton" where Triton cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return False
    floating = [t for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1]
    unknown = next((t.dtype for t in floating if t.dtype not in KERNEL_DTYPES), None)
    if backend == "auto":
        return HAS_TRITON and unknown is None and all(t.is_cuda for t in tensors)
    if not HAS_TRITON:
        raise ValueError("backend='triton': Triton is not installed")
    if unknown is not None:
        raise ValueError(f"backend='triton' takes float16, bfloat16 and float32, got {unknown}")
    if not INTERPRETED and not all(t.is_cuda for t in tensors):
        where = next(t.device for t in tensors if not t.is_cuda)
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got one on {where} "
            "(to try kernels on the CPU, set TRITON_INTERPRET=1 before the first import)"
        )
    return True


@dataclass(frozen=True)
class Launch:
    """A kernel launch: arguments by name, `options` such as num_warps."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclass
class _Recording:
    launches: list[Launch] = field(default_factory=list)
    architecture: int | None = None


_recording: ContextVar[_Recording | None] = ContextVar("kvlock_fast_launches", default=None)
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@contextmanager
def recorded_launches(dry_run_for: int | None = None) -> Iterator[list[Launch]]:
    """The launches made inside, in order. `dry_run_for`: a compute capability such as 90; then nothing is started."""
    recording = _Recording(architecture=dry_run_for)
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)


def architecture(x: Tensor) -> int:
    """The compute capability the kernels for `x` are tuned for, such as 90; 0 for the interpreter."""
    recording = _recording.get()
    if recording is not None and recording.architecture is not None:
        return recording.architecture
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        return 10 * major + minor
    return 0


def processors(x: Tensor) -> int:
    """Number of multiprocessors of x's device; on a dry run an H200's 132, for the interpreter 1."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return 132 if architecture(x) else 1


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """Start `kernel` on `grid`, unless that is empty. Arguments as the kernel's; num_warps and the like by name."""
    if 0 in grid:
        return
    recording = _recording.get()
    if recording is not None:
        options = {name: named[name] for name in OPTIONS if name in named}
        by_name = dict(zip(kernel.arg_names, arguments, strict=False))
        by_name |= {name: value for name, value in named.items() if name not in options}
        recording.launches.append(Launch(kernel, grid, by_name, options))
        if recording.architecture is not None:
            return
    device = next(a.device for a in (*arguments, *named.values()) if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **named)
