"""`kvlock-fast invert`."""

from pathlib import Path
from typing import Annotated

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import Given, Quiet, option, takes
from kvlock_fast.parameters import EDIT
from kvlock_fast.settings import EditFiles


@app.command()
@takes(
    *"source mask source_prompt model steps guidance seed size preset".split(),
    *"mask_threshold mask_invert mask_grow mask_feather mask_preview".split(),
    *"max_frames frames_policy dtype device alpha kappa warmup_alpha lock_interval layers".split(),
    *"source_path edit_path source_noise skip_share inversion_solver".split(),
    *"cache_format cache_stride cache_steps processors json".split(),
    also={"cache_format": "--format", "cache_stride": "--stride", "cache_steps": "--store"},
)
def invert(
    given: Given,
    output: Annotated[Path, option("The folder of the cache; other files in it stay", panel=EDIT)],
    quiet: Quiet = False,
) -> None:
    """Run a source through the model once and keep its K and V in a folder, for edit --cache.

    An edit's mask may be larger than the mask given here, not smaller.
    """
    from kvlock_fast.invert import invert_files

    invert_files(given.make(EditFiles, output=output), given.settings(prompts=[]), quiet)
