"""`kvlock-fast edit`."""

from dataclasses import replace

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import ALL, Given, Quiet, command_line, takes
from kvlock_fast.settings import EditFiles


@app.command()
@takes(*ALL, optional=["source_prompt"])
def edit(given: Given, quiet: Quiet = False) -> None:
    """Edit the masked region of a video by text."""
    from kvlock_fast.edit_files import edit_files
    from kvlock_fast.invert import CacheNotes

    settings = given.settings(prompts=given["prompt"], source_prompt=given["source_prompt"] or "")
    made = CacheNotes.of(settings.cache)
    settings = replace(
        settings,
        source_prompt=made.or_given("source_prompt", given["source_prompt"], "--source-prompt"),
        steps=made.or_given("num_inference_steps", given["steps"], "--steps", made.steps or settings.steps),
        seed=made.or_given("seed", given["seed"], "--seed", settings.seed if not made.folder else None),
        size=settings.size or made.size,
        max_frames=made.or_given("max_frames", given["max_frames"], "--max-frames", None),
    )
    edit_files(given.make(EditFiles), settings, command_line(), quiet)
