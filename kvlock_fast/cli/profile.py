"""`kvlock-fast profile`."""

import sys
from typing import Annotated

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import Given, Quiet, option, takes
from kvlock_fast.errors import InputError
from kvlock_fast.parameters import OUTPUT, declared
from kvlock_fast.settings import ProfileSettings


@app.command()
@takes(*declared(ProfileSettings), "json")
def profile(
    given: Given,
    nsys: Annotated[bool, option("Also run it under Nsight Systems", "--nsys", panel=OUTPUT)] = False,
    ncu: Annotated[bool, option("Also run it under Nsight Compute", "--ncu", panel=OUTPUT)] = False,
    ranges_only: Annotated[
        bool, option("Run only, for a profiler that is attached; write no files", "--ranges-only", panel=OUTPUT)
    ] = False,
    quiet: Quiet = False,
) -> int:
    """Show where the time of a locked edit goes: a table by range, a trace, and the commands for Nsight."""
    from kvlock_fast.files import check_json, write_json
    from kvlock_fast.profiling import command
    from kvlock_fast.progress import progress_bar

    config, json_file = given["config"], given["json"]
    if (config is None) == (given["model"] is None):
        raise InputError(f"one of --config and --model must be given, not {'both' if config else 'neither'}")
    wanted = command.checked(**given.values(ProfileSettings))
    check_json(json_file)
    with progress_bar(quiet) as progress:
        if ranges_only:
            command.ranges_only(wanted, progress)
            return 0
        made, data = command.profile(wanted, progress)
    if json_file != "-":
        print(command.render(data, made))
        print(
            f"open {wanted.output / 'profile.png'} to see it, {wanted.output / 'trace.json'} in https://ui.perfetto.dev"
        )
    write_json(json_file, data)
    problems = command.run_tools([name for name, asked in (("nsys", nsys), ("ncu", ncu)) if asked], data["commands"])
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0
