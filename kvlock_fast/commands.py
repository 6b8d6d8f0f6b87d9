"""What the commands do, given checked arguments: each reads, runs, writes and says where the results are."""

import json
import math
import sys
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kvlock_fast.config import LockConfig
from kvlock_fast.edit import (
    EditResult,
    EditSettings,
    figures,
    find_device,
    load_pipeline,
    output_names,
    run_edit,
    trace_json,
    working_size,
    write_demo_files,
    write_page,
)
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.files import check_writable, output_folder, write_text
from kvlock_fast.invert import CacheNotes, cache_config, run_invert
from kvlock_fast.masks import Geometry
from kvlock_fast.media import MaskShape, check_video_output, is_box, write_video
from kvlock_fast.media.clip import Clip, read_clip
from kvlock_fast.nvtx import span
from kvlock_fast.progress import progress_bar
from kvlock_fast.report.contact_sheet import write_sheet
from kvlock_fast.report.token_preview import geometry_of, is_local, view_tokens, write_preview
from kvlock_fast.units import text_bytes

__all__ = [
    "CacheNotes",
    "EditFiles",
    "EditSettings",
    "MaskShape",
    "cache_config",
    "demo",
    "demo_world",
    "doctor",
    "edit",
    "invert",
    "kernels",
    "lock_config",
    "plan",
    "profile",
    "refuse_same",
]


@dataclass(frozen=True)
class EditFiles:
    """The files of one edit. trace, report, sheet and mask_preview are optional; json: a file for the figures, "-" for
    stdout, or None; audio: whether the source's sound is kept.
    """

    source: str
    mask: str
    output: Path
    trace: Path | None = None
    report: Path | None = None
    json: str | None = None
    max_frames: int | None = None
    sheet: Path | None = None
    mask_preview: Path | None = None
    audio: bool = True


def lock_config(preset: str, overrides: dict[str, Any]) -> LockConfig:
    """The preset with some values changed; InputError naming the bad one."""
    try:
        return LockConfig.preset(preset, **overrides)
    except ValueError as error:
        raise InputError(str(error)) from error


def edit(
    files: EditFiles, settings: EditSettings, model: str, device: str, dtype: str, command: str, quiet: bool
) -> None:
    """`kvlock-fast edit`. Outputs are checked before any work is done, and appear whole."""
    _check_texts(settings)
    _check_window(settings)
    outputs = output_names(str(files.output), len(settings.prompts))
    _check_outputs(outputs, files, model, settings.cache.path)
    find_device(device)
    clip = read_clip(files.source, files.mask, files.max_frames, settings.mask_shape, files.audio)
    for path in [*outputs, *([] if files.mask_preview is None else [files.mask_preview])]:
        check_video_output(path, len(clip.video))
    settings = replace(settings, size=working_size(model, clip.video, settings.size))
    with progress_bar(quiet) as progress:
        show_mask = partial(_preview_edit, files.mask_preview, clip, settings)
        configs_first = files.mask_preview is not None and is_local(model)
        if configs_first:
            show_mask(geometry_of(model))
        progress("load", 0, 1)
        pipe = load_pipeline(model, device, dtype)
        progress("load", 1, 1)
        if not configs_first:
            show_mask(pipe.model.geometry)
        result = run_edit(pipe, clip, settings, progress)
        progress("write", 0, 1)
        with span("write"):
            for path, video in zip(outputs, result.videos, strict=True):
                write_video(path, video, clip.fps, audio=clip.audio)
        _write_about(files, outputs, clip, result, settings, command)
        write_json(files.json, {"outputs": [str(path) for path in outputs], **figures(result, settings)})
        progress("write", 1, 1)
    if files.json != "-":
        for path, prompt, metrics in zip(outputs, settings.prompts, result.metrics, strict=True):
            print(f"{path}: {prompt}{_metrics_text(metrics)}")


def _preview_edit(path: Path | None, clip: Clip, settings: EditSettings, geometry: Geometry) -> None:
    """Write the preview of an edit's mask, if one is wanted; what is changed to fit is said by the edit itself."""
    if path is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        view = view_tokens(clip.video, clip.mask, geometry, settings.size, settings.frames_policy)
    write_preview(path, view, clip.fps)


def _write_about(
    files: EditFiles, outputs: list[Path], clip: Clip, result: EditResult, settings: EditSettings, command: str
) -> None:
    """What is said about an edit beside the videos: trace, page, sheet."""
    if files.trace is not None:
        inputs = {"source": files.source, "mask": files.mask, "max_frames": files.max_frames}
        made = {**inputs, "outputs": [str(path) for path in outputs]}
        write_text(files.trace, trace_json(result, settings, command, made))
    if files.report is not None:
        write_page(files.report, clip, result, settings, command)
    if files.sheet is not None:
        write_sheet(files.sheet, result.source, result.mask, result.videos)


def invert(
    source: str,
    mask: str,
    output: Path,
    settings: EditSettings,
    model: str,
    max_frames: int | None,
    device: str,
    dtype: str,
    json_file: str | None,
    quiet: bool,
    mask_preview: Path | None = None,
) -> None:
    """`kvlock-fast invert`: run a source once, keep its K and V."""
    _check_texts(settings)
    folder = Path(output)
    _check_cache_folder(folder, model, json_file)
    check_json(json_file)
    if mask_preview is not None:
        check_video_output(mask_preview)
        refuse_same([("--source", source), ("--mask", mask), ("--json", json_file), ("--mask-preview", mask_preview)])
    find_device(device)
    clip = read_clip(source, mask, max_frames, settings.mask_shape, audio=False)
    if mask_preview is not None:
        check_video_output(mask_preview, len(clip.video))
    settings = replace(settings, size=working_size(model, clip.video, settings.size))
    with progress_bar(quiet) as progress:
        progress("load", 0, 1)
        pipe = load_pipeline(model, device, dtype)
        progress("load", 1, 1)
        _preview_edit(mask_preview, clip, settings, pipe.model.geometry)
        made = run_invert(pipe, clip, folder, settings, max_frames, progress)
    write_json(json_file, made)
    if json_file != "-":
        print(
            f"{folder}: {made['steps_stored']} steps of {made['background_tokens']} background tokens in "
            f"{made['format']}, {text_bytes(made['bytes'])}; edit it with: kvlock-fast edit --cache {folder} ..."
        )


def demo(
    output: Path,
    steps: int | None,
    preset: str,
    seed: int,
    device: str,
    command: str,
    json_file: str | None,
    quiet: bool,
) -> None:
    """`kvlock-fast demo`: an edit of a clip of the demo's world by the bundled model."""
    from fractions import Fraction

    from kvlock_fast import demo as bundled

    lock = lock_config(preset, {})
    find_device(device)
    folder = output_folder(output)
    check_json(json_file)
    case = bundled.demo_case()
    clip = Clip(case.source.video, case.mask, Fraction(8))
    settings = EditSettings(
        case.source_prompt,
        [case.prompt],
        steps=bundled.STEPS if steps is None else steps,
        guidance=bundled.GUIDANCE,
        seed=seed,
        lock=lock,
    )
    with progress_bar(quiet) as progress:
        progress("load", 0, 1)
        pipe = load_pipeline("demo", device, "fp32")
        progress("load", 1, 1)
        result = run_edit(pipe, clip, settings, progress)
        progress("write", 0, 1)
        with span("write"):
            written = write_demo_files(folder, clip, result, settings, command)
        write_json(json_file, {"outputs": [str(path) for path in written], **figures(result, settings)})
        progress("write", 1, 1)
    if json_file != "-":
        print(f"source: {case.source_prompt}")
        print(f"edit:   {case.prompt}{_metrics_text(result.metrics[0])}")
        print(f"open {folder / 'report.html'} to see it, {folder / 'sheet.png'} for one picture")


def doctor(json_file: str | None) -> None:
    """`kvlock-fast doctor`: what is installed, what will be used, what is missing."""
    from kvlock_fast.tools.doctor import render, report

    check_json(json_file)
    facts = report()
    if json_file != "-":
        print(render(facts))
    write_json(json_file, facts)


def plan(json_file: str | None, **settings: Any) -> None:
    """`kvlock-fast plan`: what an edit needs, and how the source is best kept; `settings`: of `PlanSettings`."""
    from kvlock_fast.planning.command import PlanSettings, make_plan
    from kvlock_fast.planning.render import as_json, render

    check_json(json_file)
    made = make_plan(PlanSettings(**settings))
    if json_file != "-":
        print(render(made))
    write_json(json_file, as_json(made))


def profile(
    output: Path,
    steps: int,
    device: str,
    tools: list[str],
    ranges_only: bool,
    json_file: str | None,
    quiet: bool,
    **wanted: Any,
) -> int:
    """`kvlock-fast profile`: the table, the files, Nsight where asked for; `wanted`: of `profile_subjects.Wanted`.

    The exit status: 1 if one of the tools is missing or failed.
    """
    from kvlock_fast.profiling import command as nsight
    from kvlock_fast.profiling import command as profiling

    settings = profiling.ProfileSettings(profiling.checked(**wanted), steps, output, device)
    check_json(json_file)
    if ranges_only:
        with progress_bar(quiet) as progress:
            profiling.ranges_only(settings, progress)
        return 0
    with progress_bar(quiet) as progress:
        made, data = profiling.profile(settings, progress)
    if json_file != "-":
        print(profiling.render(data, made))
        print(f"open {output / 'profile.png'} to see it, {output / 'trace.json'} in https://ui.perfetto.dev")
    write_json(json_file, data)
    problems = nsight.run_tools(tools, data["commands"])
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def kernels(arch: str, only: list[str], json_file: str | None, quiet: bool) -> int:
    """`kvlock-fast kernels`: compile what ships for each architecture; the exit status, 1 if anything may not ship."""
    from kvlock_fast.tools import compile_report as compiled

    architectures, modules = compiled.parse_architectures(arch), compiled.parse_modules(only)
    check_json(json_file)
    with progress_bar(quiet) as progress, compiled.compiler_processes() as pool:
        report = partial(progress, "compiling")
        rows = list(compiled.compile_kernels(pool, architectures, modules, report))
    if json_file != "-":
        print(compiled.table(rows))
    figures = [compiled.as_json(row) for row in rows]
    write_json(json_file, {"versions": compiled.compiler_versions(), "kernels": figures})
    faulty = [(row, problem) for row in rows for problem in row.problems]
    for row, problem in faulty:
        print(f"{row.arch} {row.kernel} [{row.variant}]: {problem}", file=sys.stderr)
    return 1 if faulty else 0


def check_json(target: str | None) -> None:
    """Raise OutputError unless figures can be written there."""
    if target is not None and target != "-":
        check_writable(target)


def write_json(target: str | None, data: dict[str, Any]) -> None:
    """Write figures to a file, or to stdout for "-"; nothing for None."""
    if target == "-":
        print(json.dumps(data, indent=1))
    elif target is not None:
        write_text(target, json.dumps(data, indent=1))


def _check_cache_folder(folder: Path, model: str, json_file: str | None) -> None:
    """Refuse a folder that cannot be written, one of the model, and figures in the place of the manifest."""
    if folder.exists():
        output_folder(folder)
    else:  # nothing is made before the source is read
        parent = next(place for place in folder.absolute().parents if place.exists())
        check_writable(parent / folder.name)
    if Path(model).is_dir() and folder.resolve().is_relative_to(Path(model).resolve()):
        raise InputError(f"--output '{folder}' lies in the model's folder '{model}'")
    if json_file not in (None, "-") and Path(json_file).resolve() == (folder / "manifest.json").resolve():
        raise InputError(f"--json '{json_file}' is the manifest of --output '{folder}'")


def _check_window(settings: EditSettings) -> None:
    """Refuse a window that no model could take, before one is loaded."""
    if (settings.window_frames, settings.window_overlap) != (None, None):
        from kvlock_fast.loop.windows import asked_for

        asked_for(settings.window_frames, settings.window_overlap)


def _check_texts(settings: EditSettings) -> None:
    """Refuse texts that no file can hold: bytes of the command line that are not UTF-8."""
    named = [("--source-prompt", settings.source_prompt), ("--negative-prompt", settings.negative_prompt or "")]
    for option, text in [*named, *(("--prompt", prompt) for prompt in settings.prompts)]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{option} is not valid UTF-8 text: {text!a}") from error


def _check_outputs(outputs: list[Path], files: EditFiles, model: str, cache: Any) -> None:
    """Refuse outputs that cannot be written, or that would replace each other, an input, the model or the cache."""
    for path in outputs:
        check_video_output(path)
    others = [("--trace", files.trace), ("--report", files.report), ("--sheet", files.sheet)]
    others.append(("--json", None if files.json in (None, "-") else Path(files.json)))
    for _, path in others:
        if path is not None:
            check_writable(path)
    previews = [] if files.mask_preview is None else [files.mask_preview]
    for path in previews:
        check_video_output(path)
    written = [
        *(("--output", path) for path in outputs),
        *(("--mask-preview", path) for path in previews),
        *others,
    ]
    refuse_same([("--source", files.source), ("--mask", files.mask), *written])
    for option, path in written:
        if path is None:
            continue
        place = path.resolve()
        if Path(model).is_dir() and place.is_relative_to(Path(model).resolve()):
            raise InputError(f"{option} '{path}' lies in the model's folder '{model}'")
        if cache is not None and place.is_relative_to(Path(cache).resolve()):
            raise InputError(f"{option} '{path}' lies in the folder of the cache '{cache}'")


def refuse_same(files: list[tuple[str, str | Path | None]]) -> None:
    """Raise InputError where a file is named twice. (option, path) of inputs, which may be one, then of outputs."""
    taken: dict[Path, str] = {}
    for option, path in files:
        if path is None or path == "-" or is_box(str(path)):
            continue
        place = Path(path).resolve()
        if place in taken and option not in ("--mask", "--edited"):
            raise InputError(f"{option} '{path}' is the same file as {taken[place]}: nothing is overwritten")
        taken.setdefault(place, option)


def demo_world(clips: int, output: Path, seed: int) -> None:
    """`kvlock-fast demo --world N`: clips of the demo's world to look at."""
    from kvlock_fast.demo.gallery import write_world

    if clips < 1:
        raise InputError(f"--world must be at least 1, got {clips}")
    folder = output_folder(output)
    write_world(clips, folder, seed=seed)
    print(f"{clips} clips and a sheet in {folder}")


def _metrics_text(metrics: dict[str, float | None]) -> str:
    decibels, similarity = metrics["background_psnr"], metrics["background_ssim"]
    if decibels is None:
        return ""
    return (
        f" (background {decibels:.1f} dB, SSIM {similarity:.3f})" if decibels < math.inf else " (background unchanged)"
    )
