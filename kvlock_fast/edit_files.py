"""One edit from files to files: read, edit, write. What `kvlock-fast edit` and `demo` do."""

import json
import math
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kvlock_fast.edit import EditResult, find_device, load_pipeline, run_edit, working_size
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.files import check_writable, write_json, write_text
from kvlock_fast.masks import Geometry
from kvlock_fast.media import check_video_output, write_video
from kvlock_fast.media.clip import Clip, read_clip, refuse_same
from kvlock_fast.nvtx import span
from kvlock_fast.progress import progress_bar
from kvlock_fast.report.contact_sheet import write_sheet
from kvlock_fast.report.token_preview import geometry_of, is_local, view_tokens, write_preview
from kvlock_fast.settings import EditFiles, EditSettings
from kvlock_fast.version import __version__


def edit_files(files: EditFiles, settings: EditSettings, command: str, quiet: bool) -> None:
    """Edit as `kvlock-fast edit` does. Outputs are checked before any work is done, and appear whole.

    Args:
        files: Paths of inputs and outputs.
        settings: How to edit.
        command: Command line, for the page and the trace.
        quiet: Whether progress is not shown.
    """
    check_texts(settings)
    _check_stretches(settings)
    outputs = output_names(str(files.output), len(settings.prompts))
    _check_outputs(outputs, files, settings.model, settings.cache.path)
    find_device(settings.device)
    clip = read_clip(files.source, files.mask, settings.max_frames, settings.mask_shape, settings.audio)
    for path in [*outputs, *([] if files.mask_preview is None else [files.mask_preview])]:
        check_video_output(path, len(clip.video))
    settings = replace(settings, size=working_size(settings.model, clip.video, settings.size))
    with progress_bar(quiet) as progress:
        show_mask = partial(preview_mask, files.mask_preview, clip, settings)
        configs_first = files.mask_preview is not None and is_local(settings.model)
        if configs_first:
            show_mask(geometry_of(settings.model))
        progress("load", 0, 1)
        pipe = load_pipeline(settings.model, settings.device, settings.dtype)
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
            print(f"{path}: {prompt}{metrics_text(metrics)}")


def preview_mask(path: Path | None, clip: Clip, settings: EditSettings, geometry: Geometry) -> None:
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
    """Write trace, page and sheet, as asked for."""
    if files.trace is not None:
        inputs = {"source": files.source, "mask": files.mask, "max_frames": settings.max_frames}
        made = {**inputs, "outputs": [str(path) for path in outputs]}
        write_text(files.trace, trace_json(result, settings, command, made))
    if files.report is not None:
        write_page(files.report, clip, result, settings, command)
    if files.sheet is not None:
        write_sheet(files.sheet, result.source, result.mask, result.videos)


def _check_stretches(settings: EditSettings) -> None:
    """Refuse stretches that no model could take, before one is loaded."""
    if (settings.clip_frames, settings.clip_overlap) != (None, None):
        from kvlock_fast.loop.windows import asked_for

        asked_for(settings.clip_frames, settings.clip_overlap)


def check_texts(settings: EditSettings) -> None:
    """Refuse texts that no file can hold: bytes of the command line that are not UTF-8."""
    named = [("--source-prompt", settings.source_prompt), ("--negative-prompt", settings.negative_prompt or "")]
    for option, text in [*named, *(("--prompt", prompt) for prompt in settings.prompts)]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{option} is not valid UTF-8 text: {text!a}") from error


def _check_outputs(outputs: list[Path], files: EditFiles, model: str, cache: Any) -> None:
    """Refuse outputs that cannot be written, or that would replace each other, an input, the model or the cache."""
    previews = [] if files.mask_preview is None else [files.mask_preview]
    others = [("--trace", files.trace), ("--report", files.report), ("--sheet", files.sheet)]
    others.append(("--json", None if files.json in (None, "-") else Path(files.json)))
    written = [
        *(("--output", path) for path in outputs),
        *(("--mask-preview", path) for path in previews),
        *others,
    ]
    refuse_same([("--source", files.source), ("--mask", files.mask), *written])
    for path in (*outputs, *previews):
        check_video_output(path)
    for _, path in others:
        if path is not None:
            check_writable(path)
    for option, path in written:
        if path is None:
            continue
        place = path.resolve()
        if Path(model).is_dir() and place.is_relative_to(Path(model).resolve()):
            raise InputError(f"{option} '{path}' lies in the model's folder '{model}'")
        if cache is not None and place.is_relative_to(Path(cache).resolve()):
            raise InputError(f"{option} '{path}' lies in the folder of the cache '{cache}'")


def output_names(output: str, prompts: int) -> list[Path]:
    """One path a prompt: the output itself, or NAME-1.EXT, NAME-2.EXT, ... for several."""
    path = Path(output)
    if path.name in ("", ".", ".."):
        raise InputError(f"--output must name a file, got '{output}'")
    if prompts == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, prompts + 1)]


def write_page(path: Path, clip: Clip, result: EditResult, settings: EditSettings, command: str) -> None:
    """The HTML page about an edit."""
    from kvlock_fast.report.page import write_report

    write_report(
        path,
        source=result.source,
        mask=result.mask,
        edited=result.videos,
        trace=result.trace,
        settings=settings_table(settings),
        command=command,
        metrics=result.metrics,
        fps=clip.fps,
    )


def settings_table(settings: EditSettings) -> dict[str, Any]:
    """Every setting by name, the mask's, the lock's and the cache's beside the rest."""
    elsewhere = ("lock", "cache", "mask_shape", "model", "dtype", "device", "max_frames", "audio")
    table = {name: value for name, value in vars(settings).items() if name not in elsewhere}
    table["feather"] = settings.composite_feather
    cache = {f"cache_{name}": value for name, value in settings.cache.as_dict().items() if value is not None}
    return {**table, **settings.mask_shape.as_dict(), **settings.lock.as_dict(), **cache}


def figures(result: EditResult, settings: EditSettings) -> dict[str, Any]:
    """The trace, the settings and the metrics as plain values; None for a PSNR that is infinite."""
    finite = [{k: v if v is not None and math.isfinite(v) else None for k, v in m.items()} for m in result.metrics]
    return {**result.trace, "settings": settings_table(settings), "metrics": finite}


def trace_json(result: EditResult, settings: EditSettings, command: str, files: dict[str, Any]) -> str:
    """All that a page about the edit can be made of again, as JSON text.

    files: source, mask, outputs and max_frames; paths as they were typed, or relative to the trace's own folder.
    """
    record = {**figures(result, settings), "command": command, "version": __version__, "files": files}
    return json.dumps(record, indent=1)


def metrics_text(metrics: dict[str, float | None]) -> str:
    """The background in the file and in the model's own frames, for the line about an edit; "" where there is none."""
    delivered, raw = (
        "background unchanged" if found == math.inf else None if found is None else f"background {found:.1f} dB"
        for found in (metrics["delivered_psnr"], metrics["background_psnr"])
    )
    if delivered is None or raw is None:
        return ""
    step, error = metrics["delivered_seam"], metrics["seam"]
    delivered += "" if step is None else f", a step of {step:.1f} levels at the mask's edge"
    raw += "" if error is None else f", {error:.1f} levels off around the mask"
    return f" (delivered: {delivered}; raw, by the model: {raw})"
