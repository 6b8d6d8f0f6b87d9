"""`kvlock-fast batch`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import ALL, Given, Quiet, command_line, option, parsed, takes
from kvlock_fast.errors import InputError
from kvlock_fast.parameters import declared
from kvlock_fast.settings import JOB, JOBS, BatchSettings, Speed

DEFAULTS = [one.name for one in declared(*JOB[1:]) if one.manifest and one.name != "source_prompt"]
"""Fields of a job that an option can give for all."""


@app.command()
@takes(*declared(BatchSettings, Speed), *DEFAULTS, optional=["output"])
def batch(
    given: Given,
    manifest: Annotated[Path | None, typer.Argument(help="The jobs: .jsonl or .csv; see --schema")] = None,
    check: Annotated[
        bool, option("Check files, masks and memory; load and run nothing", "--check", panel=JOBS)
    ] = False,
    schema: Annotated[bool, option("Print the JSON Schema of a job", "--schema", panel=JOBS)] = False,
    quiet: Quiet = False,
) -> int:
    """Run the edits of a manifest; the same command again does what is missing.

    Options of an edit are defaults for jobs that do not give the field themselves.
    """
    from kvlock_fast.batch import command
    from kvlock_fast.batch.manifest import check_flags

    if schema:
        command.print_schema()
        return 0
    if manifest is None or given["output"] is None:
        raise InputError("missing " + ("argument 'MANIFEST'" if manifest is None else "option '--output'"))
    flags = {name: _as_field(name, given[name]) for name in DEFAULTS if given[name] is not None}
    check_flags(flags)
    try:
        speed = given.make(Speed)
    except InputError as error:
        raise InputError(f"--{error}") from error
    asked = given.make(BatchSettings, manifest=manifest, flags=flags, speed=speed, command=command_line(), quiet=quiet)
    return command.check(asked) if check else command.run(asked)


def _as_field(name: str, value: Any) -> Any:
    """A typed option as a field of a job has it: sizes as text, layers as a list."""
    made = value if name == "size" else parsed(ALL[name], value)
    return list(made) if isinstance(made, tuple) else made
