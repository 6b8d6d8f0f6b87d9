"""`kvlock-fast profile`: its options."""

import sys
from pathlib import Path
from typing import Annotated

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import (
    CacheFormat,
    Device,
    Dtype,
    JsonFile,
    ModelFrames,
    ModelSize,
    Preset,
    Quiet,
    Steps,
    option,
    parse_size,
)
from kvlock_fast.errors import InputError


@app.command()
def profile(
    output: Annotated[Path, option("The folder for the results; files in it stay.")] = Path("out/profile"),
    config: Annotated[str | None, option("A known size like wan-1.3b, or a config file: random weights.")] = None,
    model: Annotated[str | None, option("A folder, a hub id, or demo (the bundled model): its own weights.")] = None,
    frames: ModelFrames = None,
    size: ModelSize = None,
    steps: Steps = 4,
    layers: Annotated[int | None, option("Only the first so many layers; else all.")] = None,
    preset: Preset = "kvlock",
    cache_tier: Annotated[str, option("Where the source's K and V are: lockstep, resident, host, disk.")] = "lockstep",
    cache_format: CacheFormat = "fp8_e4m3",
    nsys: Annotated[bool, option("Also run it under Nsight Systems.", "--nsys")] = False,
    ncu: Annotated[bool, option("Also run it under Nsight Compute.", "--ncu")] = False,
    ranges_only: Annotated[bool, option("Only run, for a profiler that looks on; no files.", "--ranges-only")] = False,
    force: Annotated[bool, option("Run what looks too large as well.", "--force")] = False,
    json_file: JsonFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> int:
    """Where the time of a locked edit goes: a table by range, a trace, and the commands for Nsight."""
    from kvlock_fast.files import check_json, write_json
    from kvlock_fast.profiling import command
    from kvlock_fast.progress import progress_bar

    if (config is None) == (model is None):
        raise InputError(f"one of --config and --model must be given, not {'both' if config else 'neither'}")
    wanted = command.checked(
        config=config, model=model, frames=frames, size=parse_size(size), layers=layers, tier=cache_tier,
        format=cache_format, preset=preset, dtype=dtype, force=force,
    )  # fmt: skip
    settings = command.ProfileSettings(wanted, steps, output, device)
    check_json(json_file)
    with progress_bar(quiet) as progress:
        if ranges_only:
            command.ranges_only(settings, progress)
            return 0
        made, data = command.profile(settings, progress)
    if json_file != "-":
        print(command.render(data, made))
        print(f"open {output / 'profile.png'} to see it, {output / 'trace.json'} in https://ui.perfetto.dev")
    write_json(json_file, data)
    problems = command.run_tools([name for name, asked in (("nsys", nsys), ("ncu", ncu)) if asked], data["commands"])
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0
