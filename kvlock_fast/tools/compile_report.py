"""What the kernels compile to, without a GPU: registers, spills, shared memory, matrix instructions, warnings.

Every kernel file lists what it ships for an architecture by calling its own launchers with `meta` tensors in a dry run
(`launch_shipped`). Each launch is then compiled by Triton's own launcher (compiler_process.py), so a row here is what a
GPU would run, and stays in Triton's cache. All of that happens in processes of their own, with no interpreter.
"""

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from kvlock_fast.errors import InputError
from kvlock_fast.tools.compiler_process import SHARED_MEMORY, Row, compiled_row, keys, prepare
from kvlock_fast.units import text_table

ARCHITECTURES = tuple(SHARED_MEMORY)


def parse_architectures(text: str) -> list[int]:
    """Read "sm_80,sm_90" as [80, 90]. Raises InputError for one that nothing ships for."""
    found = []
    for name in (part.strip() for part in text.split(",")):
        number = name.removeprefix("sm_").removesuffix("a")
        if not number.isascii() or not number.isdecimal() or int(number) not in ARCHITECTURES:
            known = ", ".join(f"sm_{arch}" for arch in ARCHITECTURES)
            raise InputError(f"--arch must be of {known}, got '{name}'")
        if int(number) not in found:
            found.append(int(number))
    return found


def kernel_modules() -> list[str]:
    """Names of the kernel files that ship kernels."""
    folder = Path(__file__).parents[1] / "kernels"
    return sorted(path.stem for path in folder.glob("*.py") if "\ndef launch_shipped(" in path.read_text())


def parse_modules(names: Iterable[str]) -> list[str]:
    """Turn names of kernel files (none: all) into modules. Raises InputError for one that ships no kernel."""
    known = kernel_modules()
    for name in names:
        if name not in known:
            raise InputError(f"--only must be one of {', '.join(known)}, got '{name}'")
    return [f"kvlock_fast.kernels.{name}" for name in dict.fromkeys(names or known)]


@contextmanager
def compiler_processes(count: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Start processes for `compile_kernels`, by default one for each CPU. Raises InputError without Triton."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise InputError("kernels: Triton is not installed, so nothing can be compiled") from None
    pool = ProcessPoolExecutor(count or len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"), prepare)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def compile_kernels(
    pool: ProcessPoolExecutor,
    architectures: Iterable[int],
    modules: Iterable[str],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Row]:
    """Compile every kernel variant that the modules ship for each architecture, in order, each once.

    Args:
        pool: processes of `compiler_processes`.
        architectures: numbers like 90.
        modules: kernel files, as modules to import.
        report: called with how many are done, of how many.
    """
    tasks = list(product(architectures, modules))
    listings = [pool.submit(keys, *task) for task in tasks]
    jobs: dict[tuple[int, str], tuple[str, Future]] = {}
    for (arch, module), listing in zip(tasks, listings, strict=True):
        shipped = _result(listing, arch, module)
        if isinstance(shipped, Row):
            yield shipped
            continue
        for key in shipped:
            jobs.setdefault((arch, key), (module, pool.submit(compiled_row, arch, module, key)))
    names: Counter[tuple[str, ...]] = Counter()
    report(0, len(jobs))
    for done, ((arch, _), (module, future)) in enumerate(jobs.items(), 1):
        row = _result(future, arch, module)
        report(done, len(jobs))
        # Alignments alone tell some variants apart.
        names[row.kernel, row.variant, row.arch] += 1
        count = names[row.kernel, row.variant, row.arch]
        yield row if count == 1 else replace(row, variant=f"{row.variant} ({count})")


def _result(future: Future, arch: int, module: str) -> Any:
    """The process's answer, or a row that says that it died."""
    try:
        return future.result()
    except BrokenProcessPool:
        return Row(module, "", f"sm_{arch}", problems=("the compiler died on it or on a kernel compiled beside it",))


def as_json(row: Row) -> dict[str, Any]:
    """Give a row as plain values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(row).items()}


def table(rows: Iterable[Row]) -> str:
    """Write a line for each kernel and architecture: its variants, and the most that one of them takes."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.arch, row.kernel), []).append(row)
    lines = [["arch", "kernel", "variants", "registers", "spills", "shared memory", "matrix instructions", "problems"]]
    for (arch, kernel), group in groups.items():
        most = (str(max(getattr(row, name) for row in group)) for name in ("registers", "spills", "shared_memory"))
        mma = ", ".join(sorted({row.mma for row in group} - {""})) or "-"
        lines.append([arch, kernel, str(len(group)), *most, mma, str(sum(bool(row.problems) for row in group))])
    return text_table(lines)


def compiler_versions() -> dict[str, str]:
    """Versions of Triton and of its assemblers."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    assemblers = {f"ptxas for sm_{arch}": get_ptxas(arch).version for arch in ARCHITECTURES}
    return {"triton": triton.__version__} | assemblers
