"""`kvlock-fast demo`: its options."""

from pathlib import Path
from typing import Annotated

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import MOST_SEED, Device, JsonFile, Preset, Quiet, command_line, lock_config, option


@app.command()
def demo(
    output: Annotated[Path, option("The folder for the results; files in it stay.")] = Path("out/demo"),
    world: Annotated[int | None, option("Instead of an edit, write so many clips of the demo's world.")] = None,
    steps: Annotated[int | None, option("Denoising steps; a quick default if not given.", min=1)] = None,
    preset: Preset = "kvlock",
    seed: Annotated[int, option("Of the noise, or of the world.", min=0, max=MOST_SEED)] = 0,
    device: Device = "auto",
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Edit a procedurally made clip with the bundled model; writes videos, a report, a sheet and a trace."""
    from kvlock_fast.demo.command import run_demo, write_clips

    if world is not None:
        write_clips(world, output, seed)
    else:
        run_demo(output, steps, lock_config(preset), seed, device, command_line(), json_file, quiet)
