"""Triton, where it is installed.

Kernel files take `triton` and `tl` from here, so that they can be imported, and their references used, without it.
INTERPRETED says that kernels were defined for Triton's interpreter (TRITON_INTERPRET=1 before the first import): they
then run on CPU tensors, in NumPy.

`kernels/` is a folder at the project's root and a subpackage `kvlock_fast.kernels` (through a symlink). Loaded under
both names, every custom operator would be registered twice, so a kernel module first asks `require_package_name`.
"""

from importlib import import_module
from typing import Any

PACKAGE = "kvlock_fast.kernels"


def require_package_name(module_name: str) -> None:
    """Raise ImportError unless `module_name` lies below `kvlock_fast.kernels`."""
    if not module_name.startswith(PACKAGE + "."):
        tail = module_name.rpartition(".")[2]
        raise ImportError(f"{module_name!r}: import this module as {PACKAGE}.{tail}, not under another name")


require_package_name(__name__)


class _Absent:
    """Stands for `triton` and `tl` where they are missing: enough to define kernels, not to run them."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, function: Any = None, **options: Any) -> Any:
        return self if function is None else function


# Untyped: its own annotations make a device function of `jit`, and constexpr of sizes that the host computes.
triton: Any
try:
    triton = import_module("triton")
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:
    triton = tl = TensorDescriptor = _Absent()
    HAS_TRITON = INTERPRETED = False

__all__ = ["HAS_TRITON", "INTERPRETED", "TensorDescriptor", "require_package_name", "tl", "triton"]
