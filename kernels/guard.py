"""Keeps the kernels importable under one name only.

`kernels/` is a folder at the project's root and a subpackage `kvlock_fast.kernels` (through a symlink). Loaded under
both names, every custom operator would be registered twice, so a kernel module first asks `require_package_name`.
"""

PACKAGE = "kvlock_fast.kernels"


def require_package_name(module_name: str) -> None:
    """Raise ImportError unless `module_name` lies below `kvlock_fast.kernels`."""
    if not module_name.startswith(PACKAGE + "."):
        tail = module_name.rpartition(".")[2]
        raise ImportError(f"{module_name!r}: import this module as {PACKAGE}.{tail}, not under another name")


require_package_name(__name__)
