"""The rows of the table: presets of the lock and of the neighbours, and how one of them edits one case."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvlock_fast as kvf
from bench.quality_measures import PeakMemory
from kvlock_fast.config import PRESETS, CacheConfig, LockConfig

CEILING = "ceiling"
"""The true answer through the autoencoder and back: what no edit can be better than."""
OURS = ("paper", "kvlock", "variance-kv", "omega-only", "s-star-only", "fixed-alpha", "global-detection")
OTHERS = ("cfg", "cfg-zero-star", "kv-edit", "proedit", "flowedit", "tokenflow", "fatezero", "vace")
LATENTS = {"source": "model", "model": "source"}
"""By a preset's own background latents, the others. KV-Edit always takes the source's."""
BOTH = ("paper", "kvlock", "variance-kv", "fixed-alpha", "cfg", "cfg-zero-star", "proedit", "flowedit", "tokenflow",
        "fatezero", "vace")  # fmt: skip
"""Presets that have a second row, with the other background latents."""


def default_rows() -> tuple[str, ...]:
    """All of them, the ceiling first: a preset, or a preset and its background latents, "paper/source"."""
    rows = [CEILING]
    for preset in (*OURS, *OTHERS):
        rows.append(preset)
        if preset in BOTH:
            rows.append(f"{preset}/{LATENTS[LockConfig.preset(preset).background_latents]}")
    return tuple(rows)


def check_rows(rows: tuple[str, ...]) -> None:
    """Raises ValueError naming a row that there is not."""
    for row in rows:
        preset, _, latents = row.partition("/")
        if row != CEILING and (preset not in PRESETS or latents not in ("", "model", "source")):
            known = ", ".join((CEILING, *PRESETS))
            raise ValueError(f"--rows names {row!r}: one of {known}, or one of these with /model or /source")


def lock_of(row: str, **changes: Any) -> LockConfig:
    """The lock of a row."""
    preset, _, latents = row.partition("/")
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


def untrained_vace(pipe: Any) -> Any:
    """A diffusers `WanVACEPipeline` of a Wan pipeline's own weights, whose VACE blocks add nothing yet.

    It edits as the Wan model does, unlocked: the real class, not a trained one. Every second block has one of VACE.
    """
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    own = pipe.transformer
    config = {name: value for name, value in own.config.items() if not name.startswith("_")}
    channels = 2 * pipe.vae.config.z_dim + pipe.vae.config.scale_factor_spatial**2
    layers = list(range(0, own.config.num_layers, 2))
    random_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    transformer = WanVACETransformer3DModel(**config, vace_layers=layers, vace_in_channels=channels)
    torch.random.set_rng_state(random_state)
    missing, unexpected = transformer.load_state_dict(own.state_dict(), strict=False)
    if unexpected or not all(name.startswith("vace_") for name in missing):
        raise ValueError(f"a VACE of this model would lack {[name for name in missing if 'vace_' not in name]}")
    with torch.no_grad():
        for block in transformer.vace_blocks:
            block.proj_out.weight.zero_()
            block.proj_out.bias.zero_()
    parts = {name: pipe.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    made = WanVACEPipeline(**parts, transformer=transformer.to(own.device, own.dtype).eval())
    # The class takes it from the autoencoder's depth, which misses that this one begins with patches.
    made.vae_scale_factor_spatial = pipe.vae.config.scale_factor_spatial
    made.set_progress_bar_config(disable=True)
    return made
