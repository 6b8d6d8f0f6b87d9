"""The commands that only show: a mask as the model sees it, and the page of an edit that was made before."""

from pathlib import Path

from kvlock_fast.commands import check_json, refuse_same, write_json
from kvlock_fast.edit import working_size
from kvlock_fast.files import check_writable
from kvlock_fast.media import MaskShape, check_video_output
from kvlock_fast.media.clip import read_clip
from kvlock_fast.report.token_preview import geometry_of, view_tokens, write_preview


def show_mask(
    source: str,
    mask: str,
    output: Path,
    model: str,
    size: tuple[int, int] | None,
    max_frames: int | None,
    frames_policy: str,
    shape: MaskShape,
    json_file: str | None,
) -> None:
    """`kvlock-fast mask`: the tokens of a mask over its video."""
    check_video_output(output)
    check_json(json_file)
    refuse_same([("--source", source), ("--mask", mask), ("--output", output), ("--json", json_file)])
    clip = read_clip(source, mask, max_frames, shape)
    check_video_output(output, len(clip.video))
    geometry = geometry_of(model)
    view = view_tokens(clip.video, clip.mask, geometry, working_size(model, clip.video, size), frames_policy)
    write_preview(output, view, clip.fps)
    facts = view.facts()
    write_json(json_file, {"output": str(output), **facts})
    if json_file != "-":
        (height, width), (t, h, w) = facts["size"], facts["tokens"]
        print(
            f"{output}: {facts['foreground_tokens']} of {t * h * w} tokens ({t}x{h}x{w}) may change, "
            f"{facts['foreground_share']:.1%}, for {facts['pixel_share']:.1%} of the pixels of {height}x{width}"
        )


def report(
    trace: Path,
    output: Path,
    sheet: Path | None,
    source: str | None,
    mask: str | None,
    edited: list[str],
) -> None:
    """`kvlock-fast report`: the page of an edit, made again from its trace."""
    from kvlock_fast.report.from_trace import remake_report

    for path in (output, sheet):
        if path is not None:
            check_writable(path)
    inputs = [("the trace", trace), ("--source", source), ("--mask", mask), *(("--edited", path) for path in edited)]
    refuse_same([*inputs, ("--output", output), ("--sheet", sheet)])
    remake_report(trace, output, sheet, source, mask, edited)
    print(f"open {output} to see it" + (f", {sheet} for one picture" if sheet is not None else ""))
