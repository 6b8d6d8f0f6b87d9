"""One source from files to a cache: what `kvlock-fast invert` does, and what an edit takes over from such a cache."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvlock_fast.cache.manifest import NAME, DamagedCache
from kvlock_fast.config import CacheConfig
from kvlock_fast.edit import EditSettings
from kvlock_fast.errors import InputError
from kvlock_fast.media.clip import Clip
from kvlock_fast.units import parse_bytes

Progress = Callable[[str, int, int], None]


def cache_config(quota: str | None = None, **values: Any) -> CacheConfig:
    """Of what was typed; InputError naming what is wrong."""
    limit = None if quota is None else parse_bytes(quota, "--cache-quota")
    try:
        return CacheConfig(quota=limit, **values)
    except ValueError as error:
        raise InputError(f"cache {error}") from error


@dataclass(frozen=True)
class CacheNotes:
    """What the manifest of a cache that the user named says of how it was made; nothing without such a cache."""

    folder: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, cache: CacheConfig) -> "CacheNotes":
        """Raises InputError if the cache's manifest cannot be read."""
        if cache.path is None:
            return cls()
        from kvlock_fast.cache.entry import Entry

        return cls(str(cache.path), Entry.read_meta(cache.path))

    def or_given(self, name: str, given: Any, option: str, default: Any = ...) -> Any:
        """The value that was typed, or else the cache's, or else the default.

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


def run_invert(
    pipe: Any, clip: Clip, output: Path, settings: EditSettings, max_frames: int | None, progress: Progress | None
) -> dict[str, Any]:
    """Run a source into a cache; the figures of it."""
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
        generator=torch.Generator().manual_seed(settings.seed),
        frames_policy=settings.frames_policy,
        lock=settings.lock,
        cache=settings.cache,
        processors=settings.processors,
        notes={"seed": settings.seed, "num_inference_steps": settings.steps, "max_frames": max_frames},
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
