"""One edit from files to files: read, run, composite, write. What `kvlock-fast edit` and `demo` do."""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.files import output_folder, write_text
from kvlock_fast.media import (
    MaskShape,
    resize_mask,
    resize_video,
    write_video,
)
from kvlock_fast.media.clip import Clip
from kvlock_fast.media.fitting import composite
from kvlock_fast.media.metrics import measure_edit
from kvlock_fast.nvtx import span
from kvlock_fast.version import __version__

Progress = Callable[[str, int, int], None]

FEATHER = 8
"""Pixels over which a composite mixes, where nothing else was asked for."""


@dataclass(frozen=True)
class EditSettings:
    """How to edit.

    size: (height, width) to work at, None for the source's; seed: None for that of the cache, where it knows none;
    feather: pixels over which a composite mixes, None for the soft edge of the mask, or 8 where it has none.
    """

    source_prompt: str
    prompts: list[str]
    negative_prompt: str | None = None
    steps: int = 50
    guidance: float = 5.0
    guidance_2: float | None = None
    seed: int | None = 0
    size: tuple[int, int] | None = None
    frames_policy: str = "pad"
    lock: LockConfig = field(default_factory=lambda: LockConfig.preset("kvlock"))
    composite: bool = False
    feather: int | None = None
    cache: CacheConfig = field(default_factory=CacheConfig)
    graph: str = "off"
    compile: str = "off"
    processors: str = "auto"
    mask_shape: MaskShape = field(default_factory=MaskShape)
    window_frames: int | None = None
    window_overlap: int | None = None

    @property
    def composite_feather(self) -> int:
        """Pixels outside the mask over which a composite mixes."""
        if self.feather is not None:
            return self.feather
        return self.mask_shape.feather or FEATHER


@dataclass(frozen=True)
class EditResult:
    """videos: one uint8 [F, h, w, 3] a prompt; source, mask: the clip at the videos' size; trace and metrics as plain
    values.
    """

    videos: list[np.ndarray]
    source: np.ndarray
    mask: np.ndarray
    trace: dict[str, Any]
    metrics: list[dict[str, float | None]]


def working_size(model: str, video: np.ndarray, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """The size asked for; if none is, a small one for the bundled model (it warns), else None: the video's own."""
    from kvlock_fast.models.bundled import PIXELS, model_path

    height, width = video.shape[1:3]
    bundled = model == "demo" or Path(model).resolve() == model_path()
    if size is not None or not bundled or height * width <= PIXELS:
        return size
    shrink = math.sqrt(PIXELS / (height * width))
    small = tuple(8 * max(1, round(side * shrink / 8)) for side in (height, width))  # its tokens are 8 pixels wide
    message = (
        f"the bundled model is small: working at {small[0]}x{small[1]}, not the source's {height}x{width} (--size)"
    )
    warnings.warn(message, InputWarning, stacklevel=2)
    return small


def load_pipeline(model: str, device: str = "auto", dtype: str = "auto") -> Any:
    """The model on its device: CUDA where there is one, in bf16; else the CPU, in fp32."""
    import torch

    from kvlock_fast.pipeline import KVLockPipeline

    place = find_device(device)
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    names["auto"] = torch.float32 if place.type == "cpu" else torch.bfloat16
    if dtype not in names:
        raise InputError(f"dtype '{dtype}' is not one of {', '.join(names)}")
    _quieten_libraries()
    return KVLockPipeline.from_pretrained(model, torch_dtype=names[dtype]).to(place)


def find_device(name: str) -> Any:
    """The torch.device of a name; "auto": CUDA where there is one, else the CPU. InputError where it cannot be used."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps", "xpu"):
            raise RuntimeError("it is not one of cpu, cuda, mps, xpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _quieten_libraries() -> None:
    """Keep the libraries' bars and notes off the terminal; this program reports for itself."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def run_edit(pipe: Any, clip: Clip, settings: EditSettings, progress: Progress | None = None) -> EditResult:
    """Edit a clip in memory."""
    out = call_pipeline(pipe, clip, settings, progress)
    return finish_edit(clip, out.frames, out.trace.as_dict(), settings)


def call_pipeline(pipe: Any, clip: Clip, settings: EditSettings, progress: Progress | None = None, **more: Any) -> Any:
    """The part of an edit that the model does: its `EditOutput`. more: further arguments of the pipeline."""
    import torch

    height, width = settings.size or (None, None)
    return pipe(
        clip.video,
        clip.mask,
        height=height,
        width=width,
        source_prompt=settings.source_prompt,
        prompt=settings.prompts,
        negative_prompt=settings.negative_prompt,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        guidance_scale_2=settings.guidance_2,
        generator=None if settings.seed is None else torch.Generator().manual_seed(settings.seed),
        frames_policy=settings.frames_policy,
        window=settings.window_frames,
        overlap=settings.window_overlap,
        lock=settings.lock,
        cache=settings.cache,
        graph=settings.graph,
        compile=settings.compile,
        processors=settings.processors,
        progress=progress,
        **more,
    )


def finish_edit(clip: Clip, videos: list[np.ndarray], trace: dict[str, Any], settings: EditSettings) -> EditResult:
    """The part that the model is not needed for: composite and metrics. videos: uint8 [F, h, w, 3], one a prompt."""
    count = len(videos[0])
    source, shown_mask = clip.video[:count], clip.mask[:count]
    if settings.composite:
        solid = shown_mask if clip.solid is None else clip.solid[:count]
        with span("composite"):
            videos = [composite(source, edited, solid, settings.composite_feather) for edited in videos]
    else:
        size = videos[0].shape[1:3]
        source, shown_mask = resize_video(source, *size), resize_mask(shown_mask, *size)
    metrics = [measure_edit(source, shown_mask, edited) for edited in videos]
    return EditResult(videos, source, shown_mask, trace, metrics)


def output_names(output: str, prompts: int) -> list[Path]:
    """One path a prompt: the output itself, or NAME-1.EXT, NAME-2.EXT, ... for several."""
    path = Path(output)
    if not path.name:
        raise InputError(f"--output must name a file, got '{output}'")
    if prompts == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, prompts + 1)]


def write_demo_files(folder: Path, clip: Clip, result: EditResult, settings: EditSettings, command: str) -> list[Path]:
    """The six files of a demo: source, mask, edit, report, sheet, trace."""
    from kvlock_fast.report.contact_sheet import write_sheet
    from kvlock_fast.report.drawing import as_pictures

    folder = output_folder(folder)
    write_video(folder / "source.mp4", clip.video, clip.fps)
    write_video(folder / "mask.mp4", as_pictures(clip.mask), clip.fps)
    write_video(folder / "edited.mp4", result.videos[0], clip.fps)
    write_page(folder / "report.html", clip, result, settings, command)
    write_sheet(folder / "sheet.png", result.source, result.mask, result.videos[0])
    files = {"source": "source.mp4", "mask": "mask.mp4", "outputs": ["edited.mp4"]}
    write_text(folder / "trace.json", trace_json(result, settings, command, files))
    return sorted(folder / name for name in
                  ("source.mp4", "mask.mp4", "edited.mp4", "report.html", "sheet.png", "trace.json"))  # fmt: skip


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
    table = {name: value for name, value in vars(settings).items() if name not in ("lock", "cache", "mask_shape")}
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
