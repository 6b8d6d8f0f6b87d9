"""The demo: a procedural world, and an edit of it by a small bundled model.

Importing this package loads numpy at most when a name below is used; torch and diffusers only where a model runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvlock_fast.models.bundled import model_path

if TYPE_CHECKING:
    from kvlock_fast.demo.world import EditCase

__all__ = ["GUIDANCE", "STEPS", "demo_case", "model_path"]

STEPS = 20
GUIDANCE = 3.0
"""Denoising steps and guidance scale of `kvlock-fast demo`."""

# Seed and kind of the edit that `kvlock-fast demo` shows; held out, picked by eye among those the model edits well.
_DEMO_SEED = 2**31 + 6_000_050
_DEMO_KIND = "both"


def demo_case() -> EditCase:
    """The edit which `kvlock-fast demo` shows: 17 frames of 64x64 pixels, with mask, prompts and the true answer."""
    from kvlock_fast.demo.world import sample_edit

    return sample_edit(_DEMO_SEED, _DEMO_KIND)
