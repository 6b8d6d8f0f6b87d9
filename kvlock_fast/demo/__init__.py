"""The demo: a procedural world, a judge that reads it from pixels, and a small bundled model.

Importing this package loads numpy at most when a name below is used; torch and diffusers only where a model runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvlock_fast.demo.world import EditCase

__all__ = ["GUIDANCE", "PIXELS", "STEPS", "demo_case", "model_path"]

STEPS = 20
GUIDANCE = 3.0
"""Denoising steps and guidance scale of `kvlock-fast demo`."""

PIXELS = 96 * 96
"""The most pixels a frame of the bundled model's input has by default: a little beyond what it was trained on."""

# Seed and kind of the edit shown by `kvlock-fast demo`; held out, picked by eye among those the model edits well.
_DEMO_SEED = 2**31 + 6_000_016
_DEMO_KIND = "both"


def model_path() -> Path:
    """The folder of the bundled model, in diffusers format: what `--model demo` stands for."""
    return Path(__file__).resolve().parent / "model"


def demo_case() -> EditCase:
    """The edit which `kvlock-fast demo` shows: 17 frames of 64x64 pixels, with mask, prompts and the true answer."""
    from kvlock_fast.demo.world import sample_edit

    return sample_edit(_DEMO_SEED, _DEMO_KIND)
