"""The model that comes with the package: what `--model demo` stands for."""

from pathlib import Path

PIXELS = 96 * 96
"""The most pixels a frame of the bundled model's input has by default: a little beyond what it was trained on."""


def model_path() -> Path:
    """The folder of the bundled model, in diffusers format: what `--model demo` stands for."""
    return Path(__file__).resolve().parents[1] / "demo" / "model"
