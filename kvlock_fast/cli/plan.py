"""`kvlock-fast plan`."""

from typing import Annotated

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import Given, option, takes
from kvlock_fast.errors import InputError
from kvlock_fast.parameters import EDIT, declared
from kvlock_fast.settings import PlanSettings


@app.command()
@takes(
    *declared(PlanSettings),
    *"preset alpha kappa warmup_alpha lock_interval guidance_interval layers edit_path skip_share compute json".split(),
    optional=["model"],
    also={"cache_stride": "--step-stride"},
)
def plan(
    given: Given,
    config: Annotated[str | None, option("A known size like wan-1.3b, a config file or a folder", panel=EDIT)] = None,
) -> None:
    """Plan what an edit needs in memory and time, and how the source's keys and values are best kept."""
    from kvlock_fast.files import check_json, write_json
    from kvlock_fast.planning.command import make_plan
    from kvlock_fast.planning.render import as_json, render

    model, json_file = given["model"], given["json"]
    if (config is None) == (model is None):
        raise InputError(f"one of --config and --model must be given, not {'both' if config else 'neither'}")
    settings = given.make(PlanSettings, model=config or model or "", lock=given.lock())
    check_json(json_file)
    made = make_plan(settings)
    if json_file != "-":
        print(render(made))
    write_json(json_file, as_json(made))
