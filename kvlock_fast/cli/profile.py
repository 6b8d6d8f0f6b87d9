"""`kvlock-fast profile`."""

import sys
from pathlib import Path
from typing import Annotated

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import Given, Quiet, option, parse_size, takes
from kvlock_fast.config import TIERS
from kvlock_fast.errors import InputError
from kvlock_fast.parameters import MEMORY, OUTPUT

RUN = "What to run"


@app.command()
@takes("preset", "cache_format", "json", "device", "dtype")
def profile(
    given: Given,
    output: Annotated[Path, option("The folder for the results; files in it stay", panel=RUN)] = Path("out/profile"),
    config: Annotated[
        str | None, option("A known size like wan-1.3b, or a config file: random weights", panel=RUN)
    ] = None,
    model: Annotated[
        str | None, option("A folder, a hub id, or demo (the bundled model): its own weights", panel=RUN)
    ] = None,
    frames: Annotated[int | None, option("Frames of the video (default: the model's usual)", panel=RUN)] = None,
    size: Annotated[
        str | None, option("Size of the video (default: the model's usual)", panel=RUN, metavar="HEIGHTxWIDTH")
    ] = None,
    steps: Annotated[int, option("Denoising steps", panel=RUN)] = 4,
    layers: Annotated[int | None, option("Layers to run, from the first on (default: all)", panel=RUN)] = None,
    cache_tier: Annotated[
        str, option("Where the source's K and V are", panel=MEMORY, metavar="|".join(TIERS))
    ] = "lockstep",
    nsys: Annotated[bool, option("Also run it under Nsight Systems", "--nsys", panel=OUTPUT)] = False,
    ncu: Annotated[bool, option("Also run it under Nsight Compute", "--ncu", panel=OUTPUT)] = False,
    ranges_only: Annotated[
        bool, option("Run only, for a profiler that is attached; write no files", "--ranges-only", panel=OUTPUT)
    ] = False,
    force: Annotated[bool, option("Run even what looks too large", "--force", panel=RUN)] = False,
    quiet: Quiet = False,
) -> int:
    """Show where the time of a locked edit goes: a table by range, a trace, and the commands for Nsight."""
    from kvlock_fast.files import check_json, write_json
    from kvlock_fast.profiling import command
    from kvlock_fast.progress import progress_bar

    if (config is None) == (model is None):
        raise InputError(f"one of --config and --model must be given, not {'both' if config else 'neither'}")
    json_file, shared = (
        given["json"],
        given.named(preset="preset", format="cache_format", dtype="dtype", device="device"),
    )
    wanted = command.checked(
        config=config,
        model=model,
        frames=frames,
        size=parse_size(size),
        layers=layers,
        tier=cache_tier,
        force=force,
        steps=steps,
        output=output,
        **shared,
    )
    check_json(json_file)
    with progress_bar(quiet) as progress:
        if ranges_only:
            command.ranges_only(wanted, progress)
            return 0
        made, data = command.profile(wanted, progress)
    if json_file != "-":
        print(command.render(data, made))
        print(f"open {output / 'profile.png'} to see it, {output / 'trace.json'} in https://ui.perfetto.dev")
    write_json(json_file, data)
    problems = command.run_tools([name for name, asked in (("nsys", nsys), ("ncu", ncu)) if asked], data["commands"])
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0
