"""The work of `kvlock-fast batch`: read, check, run, index, say what failed."""

import json
import signal
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvlock_fast.batch.check import Checker, check_files, model_size
from kvlock_fast.batch.clashes import enter_clashes
from kvlock_fast.batch.editor import ModelEditor, enter_uncaptured
from kvlock_fast.batch.engine import Engine, LocalEngine
from kvlock_fast.batch.fields import JobFields
from kvlock_fast.batch.index import Index
from kvlock_fast.batch.jobs import Decision, Job
from kvlock_fast.batch.ledger import Changes, Ledger
from kvlock_fast.batch.manifest import Reading, parse_settings, read_defaults, read_manifest
from kvlock_fast.batch.places import LEDGER, OWN_FILES, Results, held, is_remote, local_path, remove_litter
from kvlock_fast.batch.runner import Runner, Watcher, stopped_by_signals
from kvlock_fast.batch.watching import MetricsFile, all_of, failures_table, shown
from kvlock_fast.batch.worker import Worker
from kvlock_fast.edit import find_device
from kvlock_fast.errors import InputError, InputWarning, OutputError
from kvlock_fast.files import check_writable, output_folder, user_cache_folder, write_json
from kvlock_fast.parameters import declared
from kvlock_fast.planning.machine import Machine
from kvlock_fast.progress import progress_bar
from kvlock_fast.settings import BatchSettings

MOST_SHOWN = 50
"""Rows of the table of failures; the ledger has all."""


def print_schema() -> None:
    """Print the JSON Schema of a line of the manifest."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **JobFields.model_json_schema()}
    print(json.dumps(schema, indent=1))


def check(settings: BatchSettings) -> int:
    """`--check`: every file decoded once, every group planned, nothing loaded, nothing written."""
    _check_settings(settings)
    reading = _read(settings)
    base = settings.manifest.parent
    check_files(reading, base)
    _refuse(reading)
    with progress_bar(settings.quiet) as progress:
        machine = Machine.here(find_device(settings.device), user_cache_folder())
        checker = Checker(reading, base, machine, settings.edits_per_pass, progress)
        groups = checker.run()
    _refuse(reading)
    _print_check(reading, groups, checker.decoded, settings.json_file)
    return 0


def run(settings: BatchSettings) -> int:
    """Run the batch; return the exit status: 1 if a job failed, 128 and the signal's number if one stopped it."""
    try:
        return _batch(settings)
    except sqlite3.Error as error:
        raise OutputError(f"the ledger '{settings.output / LEDGER}' cannot be used: {error}") from error


def _batch(settings: BatchSettings) -> int:
    _check_settings(settings)
    reading = _read(settings)
    for model in dict.fromkeys(job.setup.model for job in reading.jobs):
        model_size(model)
    if settings.engine == "local":
        find_device(settings.device)
    # What is done already may have lost its source since.
    check_files(reading, settings.manifest.parent, _done(settings.output))
    _refuse(reading)
    folder = output_folder(settings.output)
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger(folder))
        remove_litter(folder)
        results = Results(settings.results or str(folder))
        if results.system is None and not results.folder.samefile(folder):
            stack.callback(held(results.folder, f"another batch has its results in '{results.folder}'").release)
        changes = ledger.take(reading.jobs, results.size, settings.retry_failed, settings.overwrite)
        _say_changes(changes, len(reading.jobs), settings.quiet)
        index = Index(folder, ledger, results, settings.manifest.name)
        came, runner = _run(settings, reading.jobs, index)
        with suppress(OutputError) if runner.fatal is not None else nullcontext():
            index.write()
        return _report(settings, runner, ledger, came)


def _run(settings: BatchSettings, jobs: list[Job], index: Index) -> tuple[list[int], Runner]:
    with ExitStack() as running:
        watchers: list[Watcher] = [index]
        if settings.metrics_file is not None:
            watchers.append(MetricsFile(settings.metrics_file))
        running.enter_context(_warnings_once())
        pending = index.ledger.counts([job.id for job in jobs])["pending"]
        engine = make_engine(settings if pending else replace(settings, engine="local"))  # which loads nothing
        running.callback(engine.close)
        runner = Runner(index.ledger, engine, index.results, jobs, settings.edits_per_pass)
        # After the engine: Ray sets handlers of its own when it is imported.
        came = running.enter_context(stopped_by_signals(runner.stop))
        watchers.insert(0, running.enter_context(shown(settings.quiet)))
        runner.watch = all_of(watchers)
        runner.run()
    return came, runner


def make_engine(settings: BatchSettings) -> Engine:
    """Make the engine that is asked for; the local one loads nothing before its first pass."""
    editor = ModelEditor(settings.device, settings.speed, Path.cwd())
    worker = (editor, settings.manifest.parent.resolve(), settings.reports, settings.command)
    if settings.engine == "local":
        return LocalEngine(Worker(*worker))
    from kvlock_fast.batch.ray_engine import RayEngine

    return RayEngine(*worker, address=settings.address, workers=settings.workers, cpus=settings.cpus_per_worker)


def _check_settings(settings: BatchSettings) -> None:
    if settings.engine not in ("local", "ray"):
        raise InputError(f"--engine must be local or ray, got '{settings.engine}'")
    problem = next(one for one in declared(BatchSettings) if one.attribute == "dtype").problem(settings.dtype)
    if problem is not None:
        raise InputError(f"--dtype {problem}, got '{settings.dtype}'")
    for option, value in (("--address", settings.address), ("--workers", settings.workers),
                          ("--cpus-per-worker", settings.cpus_per_worker)):  # fmt: skip
        if value is not None and settings.engine != "ray":
            raise InputError(f"{option} is for --engine ray only, got '{value}'")
    if settings.speed.graph == "on":
        _refuse_no_graphs(settings)
    if settings.output.exists() and not settings.output.is_dir():
        raise InputError(f"--output '{settings.output}' is not a folder")
    if settings.metrics_file is not None:
        check_writable(settings.metrics_file)
    if settings.json_file not in (None, "-"):
        check_writable(settings.json_file)


def _refuse_no_graphs(settings: BatchSettings) -> None:
    """Raise InputError where no step could be captured, for --graph on."""
    if settings.cpus_per_worker is not None:
        raise InputError(f"--graph is 'on', but --cpus-per-worker {settings.cpus_per_worker} gives the actors no GPU")
    if settings.engine == "local" and (device := find_device(settings.device)).type != "cuda":
        raise InputError(f"--graph is 'on', but the steps cannot be captured: the device is {device.type}, not cuda")


def _read(settings: BatchSettings) -> Reading:
    typed = parse_settings(list(settings.settings))
    defaults = {**read_defaults(settings.defaults), **settings.flags, **typed}
    results = settings.results or str(settings.output)
    folder = settings.output if is_remote(results) else local_path(results, Path())
    reading = read_manifest(settings.manifest, folder, defaults, settings.dtype)
    own = [("the batch's own file", settings.output / name) for name in OWN_FILES]
    named = (("--json", settings.json_file), ("--metrics-file", settings.metrics_file))
    own += [(option, Path(path)) for option, path in named if path not in (None, "-")]
    others = [("the manifest", settings.manifest)]
    others += [] if settings.defaults is None else [("the defaults", settings.defaults)]
    enter_clashes(reading, settings.manifest.parent, results, own, others)
    if settings.speed.graph == "on":
        enter_uncaptured(reading)
    return reading


def _done(folder: Path) -> frozenset[str]:
    if not (folder / LEDGER).exists():
        return frozenset()
    with Ledger(folder) as ledger:
        return frozenset(row["id"] for row in ledger.rows() if row["state"] == "done")


def _refuse(reading: Reading) -> None:
    """Say every problem, and raise InputError if there is one."""
    sentences = reading.sentences()
    if not sentences:
        return
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    lines = len({line for line, _, _ in reading.problems})
    wrong = f"{lines} wrong line{'s' if lines > 1 else ''}"
    raise InputError(f"the manifest '{reading.path}' has {wrong}, listed above: nothing was run")


def _print_check(
    reading: Reading, groups: list[tuple[list[Job], Decision | None]], decoded: int, json_file: str | None
) -> None:
    ways: dict[str, int] = {}
    for group, decision in groups:
        way = "planned when the model is loaded"
        if decision is not None:
            kept = "lockstep" if decision.tier == "lockstep" else f"{decision.tier} {decision.format}"
            way = f"{kept}, {decision.at_once} at once"
        ways[way] = ways.get(way, 0) + len(group)
    figures = {"jobs": len(reading.jobs), "passes": len(groups), "files_read": decoded, "ways": ways}
    if json_file != "-":
        print(f"{figures['jobs']} jobs in {figures['passes']} passes; {decoded} files read; nothing is wrong")
        for way, count in ways.items():
            print(f"  {way}: {count} job{'s' if count > 1 else ''}")
    write_json(json_file, figures)


def _say_changes(changes: Changes, total: int, quiet: bool) -> None:
    if quiet:
        return
    known = total - changes.new
    if known:
        said = [f"{changes.changed} read otherwise now and are done again"] if changes.changed else []
        said += [f"{changes.gone} results are gone and are made again"] if changes.gone else []
        print(f"{known} of {total} jobs are known here{''.join(f'; {s}' for s in said)}", file=sys.stderr, flush=True)


def _report(settings: BatchSettings, runner: Runner, ledger: Ledger, came: list[int]) -> int:
    """Figures and failures to the user; the exit status."""
    ids = {job.id for job in runner.jobs}
    counts = ledger.counts(ids)
    failures = [(r["id"], r["tries"], r["error"]) for r in ledger.rows() if r["state"] == "failed" and r["id"] in ids]
    if settings.json_file != "-":
        print(f"{counts['done']} of {len(ids)} jobs done; open {settings.output / 'index.html'}")
    write_json(settings.json_file, {"counts": counts, "output": str(settings.output), "stopped": bool(came)})
    if failures:
        print(failures_table(failures[:MOST_SHOWN]), file=sys.stderr)
        if len(failures) > MOST_SHOWN:
            print(f"and {len(failures) - MOST_SHOWN} more, in {settings.output / 'results.jsonl'}", file=sys.stderr)
        print(f"error: {len(failures)} of {len(ids)} jobs failed (--retry-failed tries them again)", file=sys.stderr)
    if runner.fatal is not None:
        print(f"error: {runner.fatal}; the same command goes on from here", file=sys.stderr)
        return 1
    if came:
        left = counts["pending"]
        print(f"stopped by {signal.Signals(came[0]).name}: {left} jobs are left", file=sys.stderr)
        return 128 + came[0] if left else int(bool(failures))
    return int(bool(failures))


@contextmanager
def _warnings_once() -> Iterator[None]:
    """Show each warning about input once, however many jobs bring it; they come from several threads."""
    said: set[str] = set()
    before: Callable[..., Any] = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *more: Any) -> None:
        if not issubclass(category, InputWarning):
            before(message, category, *more)
        elif str(message) not in said:
            said.add(str(message))
            before(message, category, *more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
