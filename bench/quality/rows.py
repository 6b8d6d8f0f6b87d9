"""The rows of the table: presets of the lock and of the neighbours, and how one of them edits one case."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvlock_fast as kvf
from bench.quality.measures import PeakMemory
from kvlock_fast.config import PRESETS, CacheConfig, LockConfig

CEILING = "ceiling"
"""The true answer through the autoencoder and back: what no edit can be better than."""
OURS = ("paper", "kvlock", "free-path", "variance-kv", "omega-only", "s-star-only", "s-star-omega", "fixed-alpha",
        "global-detection")  # fmt: skip
OTHERS = ("cfg", "cfg-zero-star", "apg", "kv-edit", "kv-edit-inversion-free", "proedit", "flowedit", "uniedit-flow",
          "rf-solver", "tokenflow", "fatezero", "vace")  # fmt: skip
LATENTS = {"source": "model", "model": "source"}
"""By a preset's own background latents, the others. KV-Edit always takes the source's."""
BOTH = ("paper", "kvlock", "variance-kv", "fixed-alpha", "cfg", "cfg-zero-star", "apg", "proedit", "flowedit",
        "uniedit-flow", "rf-solver", "tokenflow", "fatezero", "vace")  # fmt: skip
"""Presets that have a second row, with the other background latents."""
FACTORS: dict[str, dict[str, Any]] = {
    "fixed-alpha": {"alpha": 1.0},
    "constant-omega": {"omega": "constant"},
    "constant": {"alpha": 1.0, "omega": "constant"},
    "intervals": {
        "alpha": 1.0, "omega": "constant", "lock_interval": (0.0, 0.55), "guidance_interval": (0.0, 0.55)
    },
    "no-lock": {"alpha": 0.0},
    "no-s-star": {"s_star": False},
    "free": {"edit_path": "free"},
    "at-once": {"min_predictions": 2},
}  # fmt: skip
"""One factor of `kvlock` at a time, by name: the row "kvlock+NAME" has these values, and "factors" is all such rows."""


CLIP = "clip"
BY_CLIP = ("kvlock", "paper", "proedit/source", "flowedit/source", "vace/source")
"""Rows that have another one with captions of the whole clip in place of those of the mask."""


def base_of(row: str) -> str:
    """The row with captions of what the mask shows."""
    return row.removesuffix(f"/{CLIP}")


def default_rows() -> tuple[str, ...]:
    """All of them, the ceiling first: a preset, or a preset and its background latents, "paper/source".

    The last ones have captions of the whole clip, "kvlock/clip": of edits beside a second object only.
    """
    rows = [CEILING]
    for preset in (*OURS, *OTHERS):
        rows.append(preset)
        if preset in BOTH:
            rows.append(f"{preset}/{LATENTS[LockConfig.preset(preset).background_latents]}")
    return (*rows, *(f"{row}/{CLIP}" for row in BY_CLIP if row in rows))


def factor_rows(latents: str = "") -> tuple[str, ...]:
    """The rows of one factor at a time, `kvlock` itself first; latents: "/model" or "/source", or as the preset."""
    return f"kvlock{latents}", *(f"kvlock+{name}{latents}" for name in FACTORS)


def asked_rows(text: str) -> tuple[str, ...]:
    """Row names from a text with commas between; "factors", "factors/model" and "factors/source" are several."""
    rows: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        some, _, latents = name.partition("/")
        rows += factor_rows(f"/{latents}" if latents else "") if some == "factors" else (name,)
    return tuple(dict.fromkeys(rows))


def check_rows(rows: tuple[str, ...]) -> None:
    """Raises ValueError naming a row that there is not."""
    for row in rows:
        named, _, latents = base_of(row).partition("/")
        preset, plus, factor = named.partition("+")
        there = preset in PRESETS and latents in ("", "model", "source") and (not plus or factor in FACTORS)
        if row != CEILING and not there:
            known, factors = ", ".join((CEILING, *PRESETS)), ", ".join(f"+{name}" for name in FACTORS)
            raise ValueError(
                f"--rows names {row!r}: one of {known}, or one with {factors}, with /model or /source, then /clip; or "
                "factors"
            )
        if base_of(row) not in rows:
            raise ValueError(f"--rows names {row!r} without {base_of(row)!r}, which it is compared with")


def lock_of(row: str, **changes: Any) -> LockConfig:
    """The lock of a row."""
    named, _, latents = base_of(row).partition("/")
    preset, _, factor = named.partition("+")
    changes = {**FACTORS.get(factor, {}), **changes}
    if latents:
        changes = {"background_latents": latents, **changes}
    return LockConfig.preset(preset, **changes)


@dataclass(frozen=True)
class Clip:
    """What is edited: uint8 [F, H, W, 3], bool [F, H, W], texts, and the seed of its noise."""

    video: np.ndarray
    mask: np.ndarray
    source_prompt: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Subject:
    """A case, ready to be edited.

    name: of its file; group: what it is summed up with beside the whole; answer: the true video, None where nobody
    knows it; is_right: says whether a video shows the edit, None where nobody can; path: where the edited object is, as
    `consistency` takes it, None where there is none; whole_captions: source prompt and prompt of all that the clip
    shows, where the mask shows less.
    """

    name: str
    group: str
    clip: Clip
    answer: np.ndarray | None
    is_right: Callable[[np.ndarray], bool] | None
    path: tuple[np.ndarray, float] | None
    whole_captions: tuple[str, str] | None = None

    def clip_of(self, row: str) -> Clip | None:
        """Choose a row's clip; None where captions of the whole clip are the same as those of the region."""
        if row == base_of(row):
            return self.clip
        if self.whole_captions is None:
            return None
        return replace(self.clip, source_prompt=self.whole_captions[0], prompt=self.whole_captions[1])


class Editors:
    """The model, and the one of VACE, which is made when a row first asks for it."""

    def __init__(self, pipe: kvf.KVLockPipeline, vace: Callable[[], kvf.KVLockPipeline] | None):
        self.plain, self._make_vace = pipe, vace
        self._vace: kvf.KVLockPipeline | None = None

    def of(self, lock: LockConfig) -> kvf.KVLockPipeline:
        """The one for a lock."""
        if lock.family is None:
            return self.plain
        if self._vace is None:
            if self._make_vace is None:
                return self.plain
            self._vace = self._make_vace()
        return self._vace


def edit(
    editors: Editors, clip: Clip, lock: LockConfig, steps: int, guidance: float, cache_root: Path, **more: Any
) -> tuple[np.ndarray, dict[str, float]]:
    """The edited video, and seconds and peak_bytes. Rows on one source share its K and V in `cache_root`."""
    pipe = editors.of(lock)
    shared = CacheConfig(tier="disk", format="native", root=str(cache_root)) if lock.locks else CacheConfig("lockstep")
    start = time.perf_counter()
    with PeakMemory(pipe.model.device) as memory:
        out = pipe(
            clip.video, clip.mask, source_prompt=clip.source_prompt, prompt=clip.prompt, num_inference_steps=steps,
            guidance_scale=guidance, generator=torch.Generator().manual_seed(clip.seed), lock=lock, cache=shared,
            **more,
        )  # fmt: skip
    seconds = time.perf_counter() - start - out.trace.stage_seconds.get("source pass", 0.0)
    return out.frames[0], {"seconds": seconds, "peak_bytes": memory.bytes}
