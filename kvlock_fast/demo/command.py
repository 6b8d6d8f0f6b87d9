"""The command `kvlock-fast demo`: one edit of the demo's world, or clips of that world."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from kvlock_fast.demo import GUIDANCE, STEPS, demo_case
from kvlock_fast.demo.gallery import contact_sheet
from kvlock_fast.demo.scene import sample_scene
from kvlock_fast.demo.world import render
from kvlock_fast.edit import EditResult, find_device, load_pipeline, run_edit
from kvlock_fast.edit_files import figures, metrics_text, trace_json, write_page
from kvlock_fast.errors import InputError
from kvlock_fast.files import check_json, output_folder, write_json, write_text
from kvlock_fast.media import write_video
from kvlock_fast.media.clip import Clip
from kvlock_fast.nvtx import span
from kvlock_fast.progress import progress_bar
from kvlock_fast.report.contact_sheet import write_sheet
from kvlock_fast.report.drawing import as_pictures
from kvlock_fast.settings import EditSettings


def run_demo(
    output: Path,
    steps: int | None,
    settings: EditSettings,
    command: str,
    json_file: str | None,
    quiet: bool,
) -> None:
    """Edit a clip of the demo's world with the bundled model, as `kvlock-fast demo` does.

    Args:
        output: folder for the files.
        steps: denoising steps, None for STEPS.
        settings: the lock, the noise's seed, the device and how frames are finished; the rest is the demo's.
        command: the command line, for the report.
        json_file: where figures go, "-" for stdout, None for nowhere.
        quiet: whether to show no progress.
    """
    find_device(settings.device)
    folder = output_folder(output)
    check_json(json_file)
    case = demo_case()
    clip = Clip(case.source.video, case.mask, Fraction(8))
    settings = replace(
        settings,
        source_prompt=case.source_prompt,
        prompts=[case.prompt],
        steps=STEPS if steps is None else steps,
        guidance=GUIDANCE,
    )
    with progress_bar(quiet) as progress:
        progress("load", 0, 1)
        pipe = load_pipeline("demo", settings.device, "fp32")
        progress("load", 1, 1)
        result = run_edit(pipe, clip, settings, progress)
        progress("write", 0, 1)
        with span("write"):
            written = write_demo_files(folder, clip, result, settings, command)
        write_json(json_file, {"outputs": [str(path) for path in written], **figures(result, settings)})
        progress("write", 1, 1)
    if json_file != "-":
        print(f"source: {case.source_prompt}")
        print(f"edit:   {case.prompt}{metrics_text(result.metrics[0])}")
        print(f"open {folder / 'report.html'} to see it, {folder / 'sheet.png'} for one picture")


def write_demo_files(folder: Path, clip: Clip, result: EditResult, settings: EditSettings, command: str) -> list[Path]:
    """Write the six files of a demo: source, mask, edit, report, sheet, trace.

    Args:
        folder: where to; it exists.
        clip: the source and its mask.
        result: the edit of it.
        settings: how it was edited.
        command: the command line, for the report.
    """
    write_video(folder / "source.mp4", clip.video, clip.fps)
    write_video(folder / "mask.mp4", as_pictures(clip.mask), clip.fps)
    write_video(folder / "edited.mp4", result.videos[0], clip.fps)
    write_page(folder / "report.html", clip, result, settings, command)
    write_sheet(folder / "sheet.png", result.source, result.mask, result.videos)
    files = {"source": "source.mp4", "mask": "mask.mp4", "outputs": ["edited.mp4"]}
    write_text(folder / "trace.json", trace_json(result, settings, command, files))
    names = ("edited.mp4", "mask.mp4", "report.html", "sheet.png", "source.mp4", "trace.json")
    return [folder / name for name in names]


def write_clips(clips: int, output: Path, seed: int) -> None:
    """Write clips of the demo's world, as `kvlock-fast demo --world N` does."""
    if clips < 1:
        raise InputError(f"--world must be at least 1, got {clips}")
    folder = output_folder(output)
    drawn = [render(sample_scene(seed + i)) for i in range(clips)]
    for i, clip in enumerate(drawn):
        write_video(folder / f"world_{i:03d}.mp4", clip.video, 8)
    contact_sheet(drawn).save(folder / "world.png")
    print(f"{clips} clips and a sheet in {folder}")
