"""`kvlock-fast batch`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import ALL, Given, Quiet, command_line, option, parsed, takes
from kvlock_fast.errors import InputError
from kvlock_fast.parameters import OUTPUT, Declared, declared
from kvlock_fast.settings import EditFiles, Place, Speed

JOBS, MACHINES = "Jobs", "Machines"
_FOR_ALL = [one.name for kind in (Speed, Place) for one in declared(kind)]
_OF_A_JOB = {"source_prompt", "prompt", *(one.name for one in declared(EditFiles))}
DEFAULTS = [name for name, one in ALL.items() if one.about.manifest and name not in _OF_A_JOB]
"""Fields of a job that an option can give for all."""


@app.command()
@takes(*DEFAULTS, *_FOR_ALL, "dtype", "json")
def batch(
    given: Given,
    manifest: Annotated[Path | None, typer.Argument(help="The jobs: .jsonl or .csv; see --schema")] = None,
    output: Annotated[
        Path | None, option("The folder for results, ledger and index; files in it stay", panel=JOBS)
    ] = None,
    defaults: Annotated[
        Path | None, option("A .yaml or .toml file of fields for jobs that lack them", panel=JOBS)
    ] = None,
    settings: Annotated[
        list[str] | None, option("Any field for jobs that lack it", "--set", panel=JOBS, metavar="NAME=VALUE")
    ] = None,
    check: Annotated[
        bool, option("Check files, masks and memory only; load and run nothing", "--check", panel=JOBS)
    ] = False,
    schema: Annotated[bool, option("Print the JSON Schema of a job", "--schema", panel=JOBS)] = False,
    retry_failed: Annotated[bool, option("Also run what failed before", "--retry-failed", panel=JOBS)] = False,
    overwrite: Annotated[
        bool, option("Replace files that no batch in this folder made", "--overwrite", panel=JOBS)
    ] = False,
    edits_per_pass: Annotated[
        int, option("Most jobs that share a pass of their source", min=1, max=1000, panel=JOBS)
    ] = 8,
    reports: Annotated[bool, option("Write a page about each job", "--reports/--no-reports", panel=OUTPUT)] = True,
    results: Annotated[
        str | None, option("Write videos elsewhere: a folder or URL, like s3://bucket/run", panel=OUTPUT)
    ] = None,
    metrics_file: Annotated[
        Path | None, option("Keep figures there in the text format of Prometheus", panel=OUTPUT)
    ] = None,
    engine: Annotated[str, option("What runs the jobs", panel=MACHINES, metavar="local|ray")] = "local",
    address: Annotated[
        str | None,
        option("Ray cluster: auto, or ray://HOST:PORT (default: one is started)", panel=MACHINES),
    ] = None,
    workers: Annotated[
        int | None, option("Number of Ray actors (default: as many as fit)", min=1, panel=MACHINES)
    ] = None,
    cpus_per_worker: Annotated[
        int | None, option("CPU cores of an actor, without a GPU", min=1, panel=MACHINES)
    ] = None,
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
    if manifest is None or output is None:
        raise InputError("missing " + ("argument 'MANIFEST'" if manifest is None else "option '--output'"))
    flags = {name: _as_field(ALL[name], given[name]) for name in DEFAULTS if given[name] is not None}
    check_flags(flags)
    asked = command.BatchSettings(
        manifest,
        output,
        defaults=defaults,
        flags=flags,
        settings=tuple(settings or ()),
        results=results,
        **given.named(device="device", dtype="dtype", json_file="json"),
        speed=_speed(given),
        edits_per_pass=edits_per_pass,
        reports=reports,
        retry_failed=retry_failed,
        overwrite=overwrite,
        engine=engine,
        address=address,
        workers=workers,
        cpus_per_worker=cpus_per_worker,
        metrics_file=metrics_file,
        command=command_line(),
        quiet=quiet,
    )
    return command.check(asked) if check else command.run(asked)


def _speed(given: Given) -> Speed:
    """Raises InputError naming the option."""
    try:
        return given.make(Speed)
    except InputError as error:
        raise InputError(f"--{error}") from error


def _as_field(one: Declared, value: Any) -> Any:
    """A typed option as a field of a job has it: sizes as text, layers as a list."""
    if one.attribute == "size":
        return value
    made = parsed(one, value)
    return list(made) if isinstance(made, tuple) else made
