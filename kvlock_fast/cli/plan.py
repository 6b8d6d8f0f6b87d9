"""`kvlock-fast plan`."""

from typing import Annotated

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import Given, option, parse_size, takes
from kvlock_fast.config import FORMATS
from kvlock_fast.errors import InputError
from kvlock_fast.parameters import EDIT, MEMORY


@app.command()
@takes(
    *"steps guidance preset alpha kappa warmup_alpha layers compute cache_stride cache_steps dtype json".split(),
    also={"cache_stride": "--step-stride"},
)
def plan(
    given: Given,
    config: Annotated[
        str | None, option("A known size like wan-1.3b, or a config file or model folder", panel=EDIT)
    ] = None,
    model: Annotated[str | None, option("The same; demo is the bundled model", panel=EDIT)] = None,
    frames: Annotated[int | None, option("Frames of the video (default: the model's usual)", panel=EDIT)] = None,
    size: Annotated[
        str | None, option("Size of the video (default: the model's usual)", panel=EDIT, metavar="HEIGHTxWIDTH")
    ] = None,
    mask_share: Annotated[
        float | None, option("Share of the video that may change (default: 0.2)", panel=EDIT, metavar="0..1")
    ] = None,
    mask: Annotated[str | None, option("A mask's file or folder, to count that share", panel=EDIT)] = None,
    prompts: Annotated[int, option("Edits of one source, made together", panel=EDIT)] = 1,
    edits: Annotated[int, option("Edits made one after another with the same cache", panel=EDIT)] = 1,
    format: Annotated[
        list[str] | None,
        option("Plan only this format; can be given several times", panel=MEMORY, metavar="|".join(FORMATS)),
    ] = None,
    gpu_memory: Annotated[
        str | None, option("GPU memory to plan for (default: this machine's)", panel=MEMORY, metavar="24GB")
    ] = None,
    host_memory: Annotated[
        str | None, option("Host memory to plan for (default: this machine's)", panel=MEMORY, metavar="64GB")
    ] = None,
    disk: Annotated[
        str | None, option("Free disk space to plan for (default: this machine's)", panel=MEMORY, metavar="1TB")
    ] = None,
) -> None:
    """Plan what an edit needs in memory and time, and how the source's keys and values are best kept."""
    from kvlock_fast.files import check_json, write_json
    from kvlock_fast.planning.command import PlanSettings, make_plan
    from kvlock_fast.planning.render import as_json, render

    if (config is None) == (model is None):
        raise InputError(f"one of --config and --model must be given, not {'both' if config else 'neither'}")
    lock, sides, json_file = given.lock(), parse_size(size), given["json"]
    shared = given.named(
        steps="steps", guidance="guidance", step_stride="cache_stride", cache_steps="cache_steps", dtype="dtype"
    )
    check_json(json_file)
    made = make_plan(
        PlanSettings(
            model=config or model or "",
            frames=frames,
            size=sides,
            mask_share=mask_share,
            mask=mask,
            lock=lock,
            prompts=prompts,
            edits=edits,
            formats=tuple(format or ()),
            memory=(gpu_memory, host_memory, disk),
            **shared,
        )
    )
    if json_file != "-":
        print(render(made))
    write_json(json_file, as_json(made))
