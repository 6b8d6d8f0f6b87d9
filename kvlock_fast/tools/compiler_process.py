"""One process of the kernels' compiler: Triton's own launcher in front of a make-believe driver.

`compile_report.py` starts such processes, each for many kernels, and gathers their rows.
"""

import io
import os
import re
import signal
import subprocess
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlock_fast.kernels.launch import Launch

# Bytes of shared memory a program may have: the CUDA programming guide's table of technical specifications.
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
MATRIX = re.compile(r"\b(HGMMA|QGMMA|IGMMA|UTC[A-Z]*MMA|OMMA|QMMA|HMMA|IMMA)\b")
WARP_GROUP = {"HGMMA", "QGMMA", "IGMMA"}
MATRIX_TYPES = {"f16", "bf16", "f8E4M3FN", "f8E5M2", "i8"}
SERIALISED = re.compile(r"C75\d\d")
LOG = "assembler.log"
_TENSOR = re.compile(r"(?:\*|tensordesc<)(\w+)")  # the type of a pointer or a descriptor, by what it points to


@dataclass(frozen=True)
class Row:
    """One kernel as compiled for one architecture."""

    kernel: str
    variant: str
    arch: str
    registers: int = 0
    spills: int = 0  # bytes stored and loaded
    shared_memory: int = 0  # bytes
    mma: str = ""  # matrix instructions found
    matrix: bool = False  # whether it multiplies 8- or 16-bit matrices
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class _OfflineDriver:
    """Stand-in for a GPU's driver, with what Triton asks it for in order to compile."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels keep what they compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def _use_offline_driver(arch: int) -> None:
    from triton.runtime import driver

    driver.set_active(_OfflineDriver(arch))  # pyright: ignore[reportArgumentType]  # the rest is for launches


def prepare() -> None:
    """Prepare a process before Triton is imported. The parent alone answers to Ctrl-C."""
    os.environ.pop("TRITON_INTERPRET", None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class _Variant:
    """A launch, and how Triton's launcher specialises it."""

    launch: "Launch"
    signature: dict[str, str]
    constants: dict[tuple[int], Any]

    def compile(self) -> Any:
        """Triton's compiled kernel; its launcher compiles, and does not launch."""
        return self.launch.kernel.run(
            grid=self.launch.grid, warmup=True, **self.launch.arguments, **self.launch.options
        )

    @property
    def name(self) -> str:
        """Dtypes, constants and options that distinguish it from the kernel's other variants."""
        names = self.launch.kernel.arg_names
        dtypes = dict.fromkeys(found[1] for found in map(_TENSOR.match, self.signature.values()) if found)
        meta = {names[i]: value for (i,), value in self.constants.items() if names[i].isupper()}
        absent = [names[i] for (i,), value in self.constants.items() if value is None]
        parts = [" ".join(dtypes), *(f"{k}={v}" for k, v in (meta | self.launch.options).items())]
        return " ".join(parts + ([f"without {','.join(absent)}"] if absent else []))


@cache
def _variants(arch: int, module: str) -> dict[str, _Variant]:
    """Variants that the module ships, each once, by a key that is the same in every process."""
    from triton import knobs

    from kvlock_fast.kernels.launch import recorded_launches

    found = {}

    def note(*, key: str, fn: Any, compile: Any, **_: Any) -> bool:
        name = f"{fn.module}.{fn.name}{key}"
        found.setdefault(name, _Variant(launch, compile["signature"], compile["constants"]))
        return True  # and Triton does not compile

    with recorded_launches(dry_run_for=arch) as launches:
        import_module(module).launch_shipped(arch)
    _use_offline_driver(arch)
    knobs.runtime.jit_cache_hook = note
    try:
        for launch in launches:  # what another module's launches have compiled already is noted here too
            launch.kernel.device_caches.clear()
        for launch in launches:
            _Variant(launch, {}, {}).compile()
    finally:
        knobs.runtime.jit_cache_hook = None
    return found


def keys(arch: int, module: str) -> list[str] | Row:
    """List the variants that `compiled_row` takes, or give a row with the reason why there are none."""
    try:
        return list(_variants(arch, module))
    except Exception as error:
        return Row(module, "", f"sm_{arch}", problems=(f"its dry launches fail: {_cause(error)}",))


def compiled_row(arch: int, module: str, key: str) -> Row:
    """Compile one variant and read the result."""
    variant = _variants(arch, module)[key]
    kernel = variant.launch.kernel.__name__
    _use_offline_driver(arch)
    try:
        compiled, log = _compile(variant)
    except Exception as error:
        return Row(kernel, variant.name, f"sm_{arch}", problems=(f"does not compile: {_cause(error)}",))
    multiplies = _multiplied(compiled.asm["ttir"])
    found = set(MATRIX.findall(_disassemble(compiled.asm["cubin"]))) if multiplies else set()
    row = Row(
        kernel,
        variant.name,
        f"sm_{arch}",
        registers=_number(r"Used (\d+) registers", log),
        spills=sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        shared_memory=int(compiled.metadata.shared),
        mma="+".join(sorted(found)),
        matrix=bool(multiplies & MATRIX_TYPES),
        warnings=tuple(
            line.strip() for line in log.splitlines() if "warning" in line.lower() or SERIALISED.search(line)
        ),
    )
    return replace(row, problems=tuple(_problems(row, arch, found)))


def _compile(variant: _Variant) -> tuple[Any, str]:
    """The compiled kernel, and its assembler's log, which is kept beside it in Triton's cache."""
    from triton import knobs
    from triton.runtime.cache import get_cache_manager

    with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(io.StringIO()) as said:
        knobs.nvidia.dump_ptxas_log = True
        compiled = variant.compile()
        kept = get_cache_manager(compiled.hash)
        if not said.getvalue() and kept.get_file(LOG) is None:
            knobs.compilation.always_compile = True
            variant.launch.kernel.device_caches.clear()
            compiled = variant.compile()
    if said.getvalue():
        kept.put(said.getvalue(), LOG, binary=False)
    log = kept.get_file(LOG)
    return compiled, "" if log is None else Path(log).read_text()


def _problems(row: Row, arch: int, found: set[str]) -> list[str]:
    """Reasons why a kernel must not ship."""
    problems = []
    if row.spills:
        problems.append(f"{row.spills} bytes of registers spill")
    problems += [f"the assembler warns: {line}" for line in row.warnings if SERIALISED.search(line)]
    if row.shared_memory > SHARED_MEMORY[arch]:
        problems.append(f"{row.shared_memory} bytes of shared memory, sm_{arch} has {SHARED_MEMORY[arch]}")
    if row.matrix and arch == 90 and not found & WARP_GROUP:
        problems.append(f"no HGMMA or QGMMA, but {row.mma or 'no matrix instruction'}")
    elif row.matrix and not found:
        problems.append("no matrix instruction")
    return problems


def _cause(error: BaseException) -> str:
    """The innermost error in a line: compilers wrap others around it, which only point into a source."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^\t")]
    told = [line for line in lines if re.match(r"ptxas .*\b(error|fatal)\b", line)] or lines[-1:]
    return f"{type(error).__name__}: {told[0] if told else ''}"[:300]


def _multiplied(ttir: str) -> set[str]:
    """The element types that the kernel's dots multiply."""
    return set(re.findall(r"tt\.dot(?:_scaled)? .*?: tensor<(?:\d+x)+(\w+)", ttir))


def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0
