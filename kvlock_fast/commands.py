"""What the commands do, given checked arguments: each reads, runs, writes and says where the results are."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvlock_fast.config import LockConfig
from kvlock_fast.edit import (
    Clip,
    EditSettings,
    load_pipeline,
    output_names,
    read_clip,
    run_edit,
    settings_table,
    trace_json,
    working_size,
    write_demo_files,
)
from kvlock_fast.errors import InputError
from kvlock_fast.files import check_writable, output_folder, write_text
from kvlock_fast.media import check_video_output, write_video
from kvlock_fast.progress import progress_bar


@dataclass(frozen=True)
class EditFiles:
    """The files of one edit; trace and report are optional."""

    source: str
    mask: str
    output: Path
    trace: Path | None = None
    report: Path | None = None
    max_frames: int | None = None


def lock_config(preset: str, overrides: dict[str, Any]) -> LockConfig:
    """The preset with some values changed; InputError naming the bad one."""
    try:
        return LockConfig.preset(preset, **overrides)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def edit(
    files: EditFiles, settings: EditSettings, model: str, device: str, dtype: str, command: str, quiet: bool
) -> None:
    """`kvlock-fast edit`. Outputs are checked before any work is done, and appear whole."""
    outputs = output_names(str(files.output), len(settings.prompts))
    for path in outputs:
        check_video_output(path)
    for path in (files.trace, files.report):
        if path is not None:
            check_writable(path)
    clip = read_clip(files.source, files.mask, files.max_frames)
    settings = replace(settings, size=working_size(model, clip.video, settings.size))
    with progress_bar(quiet) as progress:
        progress("load", 0, 1)
        pipe = load_pipeline(model, device, dtype)
        progress("load", 1, 1)
        result = run_edit(pipe, clip, settings, progress)
        progress("write", 0, 1)
        for path, video in zip(outputs, result.videos, strict=True):
            write_video(path, video, clip.fps)
        if files.trace is not None:
            write_text(files.trace, trace_json(result, settings))
        if files.report is not None:
            _write_report(files.report, clip, result, settings, command)
        progress("write", 1, 1)
    for path, prompt, metrics in zip(outputs, settings.prompts, result.metrics, strict=True):
        print(f"{path}: {prompt}{_metrics_text(metrics)}")


def demo(output: Path, steps: int | None, preset: str, seed: int, device: str, command: str, quiet: bool) -> None:
    """`kvlock-fast demo`: an edit of a clip of the demo's world by the bundled model."""
    from fractions import Fraction

    from kvlock_fast import demo as demo_world

    folder = output_folder(output)
    case = demo_world.demo_case()
    clip = Clip(case.source.video, case.mask, Fraction(8))
    settings = EditSettings(
        case.source_prompt, [case.prompt], steps=steps or demo_world.STEPS, guidance=demo_world.GUIDANCE, seed=seed,
        lock=lock_config(preset, {}),
    )  # fmt: skip
    with progress_bar(quiet) as progress:
        progress("load", 0, 1)
        pipe = load_pipeline("demo", device, "fp32")
        progress("load", 1, 1)
        result = run_edit(pipe, clip, settings, progress)
        progress("write", 0, 1)
        write_demo_files(folder, clip, result, settings, command)
        progress("write", 1, 1)
    print(f"source: {case.source_prompt}")
    print(f"edit:   {case.prompt}{_metrics_text(result.metrics[0])}")
    print(f"open {folder / 'report.html'} to see it, {folder / 'sheet.png'} for one picture")


def demo_world(clips: int, output: Path, seed: int) -> None:
    """`kvlock-fast demo --world N`: clips of the demo's world to look at."""
    from kvlock_fast.demo.world import write_world

    if clips < 1:
        raise InputError(f"--world must be at least 1, got {clips}")
    folder = output_folder(output)
    write_world(clips, folder, seed=seed)
    print(f"{clips} clips and a sheet in {folder}")


def _write_report(path: Path, clip: Clip, result: Any, settings: EditSettings, command: str) -> None:
    from kvlock_fast.report import write_report

    write_report(
        path, source=result.source, mask=result.mask, edited=result.videos, trace=result.trace,
        settings=settings_table(settings), command=command, metrics=result.metrics, fps=clip.fps,
    )  # fmt: skip


def _metrics_text(metrics: dict[str, float | None]) -> str:
    decibels, similarity = metrics["background_psnr"], metrics["background_ssim"]
    if decibels is None:
        return ""
    return (
        f" (background {decibels:.1f} dB, SSIM {similarity:.3f})" if decibels < math.inf else " (background unchanged)"
    )
