"""`kvlock-fast mask`: its options."""

from pathlib import Path
from typing import Annotated

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import (
    FramesPolicy,
    JsonFile,
    Mask,
    MaskFeather,
    MaskGrow,
    MaskInvert,
    MaskThreshold,
    MaxFrames,
    Policy,
    Size,
    Source,
    option,
    parse_size,
)


@app.command("mask")
def show_mask(
    source: Source,
    mask: Mask,
    output: Annotated[Path, option("The picture of it: a video, as for edit.")],
    model: Annotated[str, option("Whose tokens: a known size like wan-1.3b, a config file, or as for edit.")] = "demo",
    mask_threshold: MaskThreshold = 0.5,
    mask_invert: MaskInvert = False,
    mask_grow: MaskGrow = 0,
    mask_feather: MaskFeather = 0,
    size: Size = None,
    max_frames: MaxFrames = None,
    frames_policy: Policy = FramesPolicy.pad,
    json_file: JsonFile = None,
) -> None:
    """Show a mask as the model sees it: its tokens over the video. Needs the model's configs only."""
    from kvlock_fast.edit import working_size
    from kvlock_fast.files import check_json, write_json
    from kvlock_fast.media import MaskShape, check_video_output
    from kvlock_fast.media.clip import read_clip, refuse_same
    from kvlock_fast.report.token_preview import geometry_of, view_tokens, write_preview

    shape = MaskShape(mask_threshold, mask_invert, mask_grow, mask_feather)
    sides = parse_size(size)
    check_video_output(output)
    check_json(json_file)
    refuse_same([("--source", source), ("--mask", mask), ("--output", output), ("--json", json_file)])
    clip = read_clip(source, mask, max_frames, shape)
    check_video_output(output, len(clip.video))
    geometry = geometry_of(model)
    view = view_tokens(clip.video, clip.mask, geometry, working_size(model, clip.video, sides), frames_policy.value)
    write_preview(output, view, clip.fps)
    facts = view.facts()
    write_json(json_file, {"output": str(output), **facts})
    if json_file != "-":
        (height, width), (t, h, w) = facts["size"], facts["tokens"]
        print(
            f"{output}: {facts['foreground_tokens']} of {t * h * w} tokens ({t}x{h}x{w}) may change, "
            f"{facts['foreground_share']:.1%}, for {facts['pixel_share']:.1%} of the pixels of {height}x{width}"
        )
