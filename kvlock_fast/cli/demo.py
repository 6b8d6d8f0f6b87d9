"""`kvlock-fast demo`."""

from pathlib import Path
from typing import Annotated

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import Given, Quiet, command_line, option, takes
from kvlock_fast.settings import EditSettings


@app.command()
@takes("preset", "seed", "device", "composite", "feather", "paste", "json")
def demo(
    given: Given,
    output: Annotated[Path, option("The folder for the results; files in it stay")] = Path("out/demo"),
    world: Annotated[int | None, option("Instead of an edit, write N clips of the demo's world", metavar="N")] = None,
    steps: Annotated[int | None, option("Denoising steps (default: a quick few)", min=1)] = None,
    quiet: Quiet = False,
) -> None:
    """Edit a procedurally made clip with the bundled model; writes videos, a report, a sheet and a trace."""
    from kvlock_fast.demo.command import run_demo, write_clips

    settings = given.make(EditSettings, source_prompt="", prompts=[], lock=given.lock())
    if world is not None:
        write_clips(world, output, settings.seed or 0)
    else:
        run_demo(output, steps, settings, command_line(), given["json"], quiet)
