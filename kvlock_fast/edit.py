"""One edit of a clip in memory: settings, the call of the pipeline, composite, metrics.

No file of an edit is read or written here; edit_files.py does that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvlock_fast.errors import InputError, warn
from kvlock_fast.media import resize_mask, resize_video
from kvlock_fast.media.clip import Clip
from kvlock_fast.media.metrics import measure_delivered, measure_edit
from kvlock_fast.media.paste import composite
from kvlock_fast.nvtx import span
from kvlock_fast.progress import Report
from kvlock_fast.settings import EditSettings

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EditResult:
    """Result of an edit.

    Args:
        videos: One uint8 [F, h, w, 3] per prompt, as it is delivered.
        source: The clip's video at that size.
        mask: The clip's mask at that size.
        trace: Record of every step, as plain values.
        metrics: Quality of each video as plain values: of the model's frames, and as delivered (`delivered_...`).
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
    down, across = (8 * max(1, round(side * shrink / 8)) for side in (height, width))  # its tokens are 8 pixels wide
    warn(f"the bundled model is small: working at {down}x{across}, not the source's {height}x{width} (--size)")
    return down, across


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


def run_edit(pipe: Any, clip: Clip, settings: EditSettings, progress: Report | None = None) -> EditResult:
    """Edit a clip in memory."""
    out = call_pipeline(pipe, clip, settings, progress)
    return finish_edit(clip, out.frames, out.trace.as_dict(), settings)


def call_pipeline(pipe: Any, clip: Clip, settings: EditSettings, progress: Report | None = None, **more: Any) -> Any:
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
        clip_frames=settings.clip_frames,
        clip_overlap=settings.clip_overlap,
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
    count, *size = videos[0].shape[:3]
    whole, allowed = clip.video[:count], clip.mask[:count]
    source, mask = resize_video(whole, *size), resize_mask(allowed, *size)
    metrics = [measure_edit(source, mask, video) for video in videos]
    if settings.composite:
        source, mask = whole, allowed
        solid = allowed if clip.solid is None else clip.solid[:count]
        fade = (settings.composite_feather, settings.paste, settings.mask_shape.feather)
        with span("composite"):
            videos = [composite(source, edited, solid, *fade) for edited in videos]
    metrics = [{**raw, **measure_delivered(source, mask, video)} for raw, video in zip(metrics, videos, strict=True)]
    return EditResult(videos, source, mask, trace, metrics)
