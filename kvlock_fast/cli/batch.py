"""`kvlock-fast batch`: its options."""

from pathlib import Path
from typing import Annotated

import typer

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import Device, Dtype, JsonFile, Quiet, command_line, option
from kvlock_fast.errors import InputError


@app.command()
def batch(
    manifest: Annotated[Path | None, typer.Argument(help="The jobs: .jsonl or .csv; see --schema.")] = None,
    output: Annotated[Path | None, option("The folder for results, ledger and index; files in it stay.")] = None,
    model: Annotated[str | None, option("A folder, a hub id, or demo; for jobs that name none.")] = None,
    defaults: Annotated[Path | None, option("A .yaml or .toml file of fields for jobs that lack them.")] = None,
    settings: Annotated[list[str] | None, option("NAME=VALUE: any other field for such jobs.", "--set")] = None,
    steps: Annotated[int | None, option("Denoising steps of such jobs.")] = None,
    guidance: Annotated[float | None, option("Their guidance scale.")] = None,
    seed: Annotated[int | None, option("Of their noise.")] = None,
    size: Annotated[str | None, option("Their HEIGHTxWIDTH.")] = None,
    preset: Annotated[str | None, option("Their lock's preset.")] = None,
    check: Annotated[bool, option("Only look: files, masks, memory. Nothing is loaded or run.", "--check")] = False,
    schema: Annotated[bool, option("Print the JSON Schema of a job.", "--schema")] = False,
    retry_failed: Annotated[bool, option("Also run what failed before.", "--retry-failed")] = False,
    overwrite: Annotated[bool, option("Replace files that no batch in this folder made.", "--overwrite")] = False,
    edits_per_pass: Annotated[int, option("Jobs that share a pass of their source at most.", min=1, max=1000)] = 8,
    reports: Annotated[bool, option("A page about each job.", "--reports/--no-reports")] = True,
    results: Annotated[str | None, option("Where videos go instead: a folder or URL, like s3://bucket/run.")] = None,
    metrics_file: Annotated[Path | None, option("Keep figures there in the text format of Prometheus.")] = None,
    engine: Annotated[str, option("Who runs it: local, or ray.")] = "local",
    address: Annotated[str | None, option("The Ray cluster: auto, ray://HOST:PORT; else one is started.")] = None,
    workers: Annotated[int | None, option("Ray actors; else as many as fit.", min=1)] = None,
    cpus_per_worker: Annotated[int | None, option("Cores of an actor, without a GPU.", min=1)] = None,
    graph: Annotated[str, option("As for edit, of every job.")] = "off",
    compile: Annotated[str, option("As for edit, of every job.")] = "off",
    processors: Annotated[str, option("As for edit, of every job.")] = "auto",
    json_file: JsonFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> int:
    """Run the edits of a manifest, none lost: the same command again does what is missing."""
    from kvlock_fast.batch import command
    from kvlock_fast.batch.editor import Speed

    if schema:
        command.print_schema()
        return 0
    for name, value in (("argument 'MANIFEST'", manifest), ("option '--output'", output)):
        if value is None:
            raise InputError(f"missing {name}")
    given = {"model": model, "steps": steps, "guidance": guidance, "seed": seed, "size": size, "preset": preset}
    asked = command.BatchSettings(
        manifest, output, defaults, {name: value for name, value in given.items() if value is not None},
        tuple(settings or ()), results, device, dtype, Speed(graph, compile, processors), edits_per_pass, reports,
        retry_failed, overwrite, engine, address, workers, cpus_per_worker, metrics_file, json_file, command_line(),
        quiet,
    )  # fmt: skip
    return command.check(asked) if check else command.run(asked)
