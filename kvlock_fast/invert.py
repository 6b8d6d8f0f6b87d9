"""One source from files to a cache: what `kvlock-fast invert` does, and what an edit takes over from such a cache."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvlock_fast.cache.manifest import NAME, DamagedCache
from kvlock_fast.config import CacheConfig
from kvlock_fast.edit import find_device, load_pipeline, working_size
from kvlock_fast.edit_files import check_texts, preview_mask
from kvlock_fast.errors import InputError
from kvlock_fast.files import check_json, check_writable, output_folder, write_json
from kvlock_fast.media import check_video_output
from kvlock_fast.media.clip import Clip, read_clip, refuse_same
from kvlock_fast.progress import Report, progress_bar
from kvlock_fast.settings import EditFiles, EditSettings
from kvlock_fast.units import text_bytes


@dataclass(frozen=True)
class CacheNotes:
    """Facts from the manifest of the cache that the user named; empty without one."""

    folder: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, cache: CacheConfig) -> "CacheNotes":
        """Read the manifest of a cache. Raises InputError if it cannot be read."""
        if cache.path is None:
            return cls()
        from kvlock_fast.cache.entry import Entry

        return cls(str(cache.path), Entry.read_meta(cache.path))

    def or_given(self, name: str, given: Any, option: str, default: Any = ...) -> Any:
        """Choose the value that was typed, or else the cache's, or else the default.

        Raises InputError if the cache was made with another value, or if there is none at all.
        """
        made = self.facts.get(name)
        if given is None:
            if made is None and default is ...:
                raise InputError(f"missing option '{option}'")
            return default if made is None else made
        if made is not None and made != given:
            raise InputError(f"{option} is {given!r}, but the cache '{self.folder}' was made with {made!r}")
        return given

    @property
    def steps(self) -> int | None:
        """Denoising steps of its schedule."""
        scheduler = self.facts.get("scheduler")
        return scheduler.get("steps") if isinstance(scheduler, dict) else None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels."""
        size = self.facts.get("size")
        if size is None:
            return None
        if not (isinstance(size, list) and len(size) == 3 and all(isinstance(n, int) for n in size)):
            raise DamagedCache(Path(self.folder) / NAME, f"its size is {size!r}")
        return size[1], size[2]


def run_invert(pipe: Any, clip: Clip, output: Path, settings: EditSettings, progress: Report | None) -> dict[str, Any]:
    """Run a source into a cache.

    Args:
        pipe: The loaded `KVLockPipeline`.
        clip: The source and its mask.
        output: Folder of the cache.
        settings: How edits will be made from it.
        progress: Called with a stage, steps done and steps in all.

    Returns:
        Figures of the cache as plain values: bytes, steps stored, seconds, ...
    """
    import torch

    start = time.perf_counter()
    height, width = settings.size or (None, None)
    facts = pipe.invert(
        clip.video,
        clip.mask,
        output,
        height=height,
        width=width,
        source_prompt=settings.source_prompt,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator().manual_seed(settings.seed or 0),
        frames_policy=settings.frames_policy,
        lock=settings.lock,
        cache=settings.cache,
        processors=settings.processors,
        notes={"seed": settings.seed, "num_inference_steps": settings.steps, "max_frames": settings.max_frames},
        progress=progress,
    )
    seconds = time.perf_counter() - start
    shards = output.glob("data-*/*.safetensors")
    stored = {stored for _, stored in facts["slots"]}
    return {
        "output": str(output),
        "bytes": sum(path.stat().st_size for path in shards),
        "format": facts["format"],
        "steps_stored": len(stored),
        "background_tokens": facts["kv"]["tokens"],
        "seed": settings.seed,
        "seconds": seconds,
    }


def invert_files(files: EditFiles, settings: EditSettings, quiet: bool) -> None:
    """Run a source once and keep its K and V in the folder `files.output`, as `kvlock-fast invert` does."""
    check_texts(settings)
    folder, preview = files.output, files.mask_preview
    _check_cache_folder(folder, settings.model, files.json)
    check_json(files.json)
    if preview is not None:
        check_video_output(preview)
        named = [("--source", files.source), ("--mask", files.mask), ("--json", files.json)]
        refuse_same([*named, ("--mask-preview", preview)])
    find_device(settings.device)
    clip = read_clip(files.source, files.mask, settings.max_frames, settings.mask_shape, audio=False)
    if preview is not None:
        check_video_output(preview, len(clip.video))
    settings = replace(settings, size=working_size(settings.model, clip.video, settings.size))
    with progress_bar(quiet) as progress:
        progress("load", 0, 1)
        pipe = load_pipeline(settings.model, settings.device, settings.dtype)
        progress("load", 1, 1)
        preview_mask(preview, clip, settings, pipe.model.geometry)
        made = run_invert(pipe, clip, folder, settings, progress)
    write_json(files.json, made)
    if files.json != "-":
        print(
            f"{folder}: {made['steps_stored']} steps of {made['background_tokens']} background tokens in "
            f"{made['format']}, {text_bytes(made['bytes'])}; edit it with: kvlock-fast edit --cache {folder} ..."
        )


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
