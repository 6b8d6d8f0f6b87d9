"""`kvlock-fast kernels`: its options."""

import sys
from functools import partial
from typing import Annotated

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import JsonFile, Quiet, option


@app.command()
def kernels(
    arch: Annotated[str, option("Architectures, like sm_80,sm_90.")] = "sm_90",
    only: Annotated[list[str] | None, option("Only this kernel file; can be given several times.")] = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> int:
    """Compile every kernel that ships, without a GPU, and check what came out."""
    from kvlock_fast.files import check_json, write_json
    from kvlock_fast.progress import progress_bar
    from kvlock_fast.tools import compile_report

    architectures, modules = compile_report.parse_architectures(arch), compile_report.parse_modules(only or [])
    check_json(json_file)
    with progress_bar(quiet) as progress, compile_report.compiler_processes() as pool:
        report = partial(progress, "compiling")
        rows = list(compile_report.compile_kernels(pool, architectures, modules, report))
    if json_file != "-":
        print(compile_report.table(rows))
    figures = [compile_report.as_json(row) for row in rows]
    write_json(json_file, {"versions": compile_report.compiler_versions(), "kernels": figures})
    faulty = [(row, problem) for row in rows for problem in row.problems]
    for row, problem in faulty:
        print(f"{row.arch} {row.kernel} [{row.variant}]: {problem}", file=sys.stderr)
    return 1 if faulty else 0
