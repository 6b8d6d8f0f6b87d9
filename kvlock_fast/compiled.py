"""What the kernels compile to, without a GPU: registers, spills, shared memory, matrix instructions, warnings.

Every kernel file lists what it ships for an architecture by calling its own launchers with `meta` tensors in a dry run
(`launch_shipped`). Each launch is then compiled by Triton's own launcher (offline.py), so a row here is what a GPU
would run, and stays in Triton's cache. All of that happens in processes of their own, with no interpreter.
"""

import multiprocessing
import os
import sys
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
from kvlock_fast.offline import SHARED_MEMORY, Row, compiled_row, keys, prepare

ARCHITECTURES = tuple(SHARED_MEMORY)


def parse_architectures(text: str) -> list[int]:
    """ "sm_80,sm_90" as [80, 90]. Raises InputError for one that nothing ships for."""
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
    """The kernel files that ship kernels, by name."""
    folder = Path(__file__).parent / "kernels"
    return sorted(path.stem for path in folder.glob("*.py") if "\ndef launch_shipped(" in path.read_text())


def parse_modules(names: Iterable[str]) -> list[str]:
    """The kernel files of these names, or all, as modules to import. Raises InputError for one that ships no kernel."""
    known = kernel_modules()
    for name in names:
        if name not in known:
            raise InputError(f"--only must be one of {', '.join(known)}, got '{name}'")
    return [f"kvlock_fast.kernels.{name}" for name in dict.fromkeys(names or known)]


@contextmanager
def compiler_processes(count: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Processes for `compile_kernels`; by default one for each CPU. Raises InputError without Triton."""
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
    """A row for every kernel variant that the modules ship for each architecture, in order, each once.

    `report` is told how many are done, of how many.
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
    """What the process returned, or a row that says that it died."""
    try:
        return future.result()
    except BrokenProcessPool:
        return Row(module, "", f"sm_{arch}", problems=("the compiler died on it or on a kernel compiled beside it",))


def as_json(row: Row) -> dict[str, Any]:
    """The row as plain values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(row).items()}


def table(rows: Iterable[Row]) -> str:
    """A line for each kernel and architecture: its variants, and the most that one of them takes."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.arch, row.kernel), []).append(row)
    lines = [("arch", "kernel", "variants", "registers", "spills", "shared memory", "matrix instructions", "problems")]
    for (arch, kernel), group in groups.items():
        most = (str(max(getattr(row, name) for row in group)) for name in ("registers", "spills", "shared_memory"))
        mma = ", ".join(sorted({row.mma for row in group} - {""})) or "-"
        lines.append((arch, kernel, str(len(group)), *most, mma, str(sum(bool(row.problems) for row in group))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def compiler_versions() -> dict[str, str]:
    """Of Triton, and of its assemblers."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    assemblers = {f"ptxas for sm_{arch}": get_ptxas(arch).version for arch in ARCHITECTURES}
    return {"triton": triton.__version__} | assemblers


# TEMPORARY, for scratch scripts: removed before the end.
import subprocess  # noqa
import tempfile  # noqa

from kvlock_fast.offline import MATRIX, _disassemble, _number  # noqa


def _specialise(launch: Any) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list]]:
    """The launch's signature, constants and alignments, by the rules of Triton's launcher."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments.get(parameter.name, parameter.default)
        kind, aligned = _type_of(value)
        if parameter.is_constexpr or value is None or kind == "one":
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = kind
            if aligned and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type_of(value: Any) -> tuple[str, bool]:
    """Triton's name of a value's type, and whether it is a multiple of 16 ("one" for the number 1)."""
    import torch

    names = {
        torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
        torch.bool: "i1", torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
    }  # fmt: skip
    if hasattr(value, "block_shape"):
        return f"tensordesc<{names[value.base.dtype]}{list(value.block_shape)}>", False
    if isinstance(value, torch.Tensor):
        # The allocator aligns to 512 bytes; only an offset view can be off.
        return f"*{names[value.dtype]}", value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        return ("one", False) if value == 1 else ("i32" if abs(value) < 2**31 else "i64", value % 16 == 0)
    return "fp32", False


def _variant_name(kernel: Any, signature: dict, constants: dict, options: dict) -> str:
    """The dtypes, constants and options that tell one variant from another."""
    names = kernel.arg_names
    dtypes = dict.fromkeys(kind[1:] for kind in signature.values() if kind.startswith("*"))
    meta = {names[i]: value for (i,), value in constants.items() if names[i].isupper()}
    absent = [names[i] for (i,), value in constants.items() if value is None]
    parts = [" ".join(dtypes), *(f"{k}={v}" for k, v in (meta | options).items())]
    return " ".join(parts + ([f"without {','.join(absent)}"] if absent else []))


def _assembler_log(ptx: str, arch: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}", str(source)]
        command += ["-o", str(source.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


if __name__ == "__main__":
    with compiler_processes() as pool:
        for row in compile_kernels(pool, parse_architectures(sys.argv[1]), parse_modules(sys.argv[2:])):
            print(f"{row.arch} {row.kernel} [{row.variant}] {row.registers} regs, {row.spills} B spilt,", end=" ")
            print(f"{row.shared_memory} B shared, {row.mma or '-'} {row.warnings} {row.problems or 'ok'}", flush=True)
