"""`kvlock-fast mask`: its options."""

from pathlib import Path
from typing import Annotated

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import Given, option, takes
from kvlock_fast.parameters import EDIT
from kvlock_fast.settings import EditSettings, Inputs, MaskShape

SHAPE = "mask_threshold mask_invert mask_grow mask_feather".split()


@app.command("mask")
@takes("source", "mask", *SHAPE, "size", "max_frames", "frames_policy", "json")
def show_mask(
    given: Given,
    output: Annotated[Path, option("The picture of it: a video, as for edit", panel=EDIT)],
    model: Annotated[
        str, option("Model whose tokens are shown: a size like wan-1.3b, a config file, or as for edit", panel=EDIT)
    ] = "demo",
) -> None:
    """Show a mask as the model sees it: its tokens over the video. Needs the model's configs only."""
    from kvlock_fast.edit import working_size
    from kvlock_fast.files import check_json, write_json
    from kvlock_fast.media import check_video_output
    from kvlock_fast.media.clip import read_clip, refuse_same
    from kvlock_fast.report.token_preview import geometry_of, view_tokens, write_preview

    shape, inputs, json_file = given.make(MaskShape), given.make(Inputs), given["json"]
    asked = given.make(EditSettings, source_prompt="", prompts=[])
    check_video_output(output)
    check_json(json_file)
    refuse_same([("--source", inputs.source), ("--mask", inputs.mask), ("--output", output), ("--json", json_file)])
    clip = read_clip(inputs.source, inputs.mask, asked.max_frames, shape)
    check_video_output(output, len(clip.video))
    geometry = geometry_of(model)
    view = view_tokens(
        clip.video, clip.mask, geometry, working_size(model, clip.video, asked.size), asked.frames_policy
    )
    write_preview(output, view, clip.fps)
    facts = view.facts()
    write_json(json_file, {"output": str(output), **facts})
    if json_file != "-":
        (height, width), (t, h, w) = facts["size"], facts["tokens"]
        print(
            f"{output}: {facts['foreground_tokens']} of {t * h * w} tokens ({t}x{h}x{w}) may change, "
            f"{facts['foreground_share']:.1%}, for {facts['pixel_share']:.1%} of the pixels of {height}x{width}"
        )
