"""Options that several commands take, and how what was typed becomes a value."""

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kvlock_fast.config import LockConfig
from kvlock_fast.errors import InputError


class FramesPolicy(StrEnum):
    pad = "pad"
    trim = "trim"
    error = "error"


MOST_SEED = 2**63 - 1

FORMATS = "How the source's K and V are packed: native, bf16, fp8_e4m3, int8, int4."
STRIDE = "Of so many steps in a row one is stored, and stands for the others."
STEPS = "'all' locked steps are stored, or those that are 'dynamic' (the last kappa)."
JsonFile = Annotated[str | None, typer.Option("--json", help="Write the figures as JSON; - for stdout.")]


def option(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, **more)


# What several commands take.
Quiet = Annotated[bool, option("No progress.", "--quiet", "-q")]
Device = Annotated[str, option("cuda, cpu, ... or auto.")]
Dtype = Annotated[str, option("bf16, fp16, fp32, or auto (bf16 on a GPU).")]
Kappa = Annotated[int | None, option("How many last steps follow the variance.")]
Preset = Annotated[str, option("The lock's preset.")]
Model = Annotated[str, option("A folder, a hub id, or demo (the bundled model).")]
Source = Annotated[str, option("The video: a file, a folder of images, or an image.")]
ModelFrames = Annotated[int | None, option("Frames of the video; else the model's usual number.")]
ModelSize = Annotated[str | None, option("HEIGHTxWIDTH; else the model's usual size.")]
Steps = Annotated[int, option("Denoising steps.")]
CacheSteps = Annotated[str, option(STEPS)]
CacheFormat = Annotated[str, option(FORMATS)]
InversionSolver = Annotated[str | None, option("'euler' or 'heun'.")]
SourcePath = Annotated[str | None, option("'renoise' or 'invert'.")]
Alpha = Annotated[str | None, option("'dynamic' or a fixed ratio of the source's K and V, 0 to 1.")]
Processors = Annotated[
    str, option("Locked attention: 'generic', 'fast' by one kernel, or 'auto': fast on a GPU where the model has it.")
]

Policy = Annotated[FramesPolicy, option("For a frame count the model cannot take.")]
MaxFrames = Annotated[int | None, option("Use only the first so many frames.", min=1)]
Size = Annotated[str | None, option("Work at HEIGHTxWIDTH; else the source's size (demo: small).")]
Mask = Annotated[
    str,
    option(
        "Where it may change: video, image, folder, .npy, .npz, or box:x,y,w,h, which moves as "
        "'box:0=x,y,w,h;24=x,y,w,h' (at frame 0, at frame 24, straight in between)."
    ),
]

_GROW = "Grow it by so many pixels of the source in every direction; a negative number shrinks it."
_SOFT = "A soft edge around it: so many more pixels that may change, over which --composite fades to the source."
MaskThreshold = Annotated[float, option("Marked is what is brighter than this share, 0 to 1.")]
MaskInvert = Annotated[bool, option("What is marked stays, the rest may change.", "--mask-invert")]
MaskGrow = Annotated[int, option(_GROW, min=-1024, max=1024)]
MaskFeather = Annotated[int, option(_SOFT, min=0, max=256)]
MaskPreview = Annotated[
    Path | None, option("Write a video of what the model sees of the mask: its tokens. Before any step is run.")
]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """HEIGHTxWIDTH as (height, width)."""
    if text is None:
        return None
    height, cross, width = text.lower().partition("x")
    if not (cross and _is_number(height, 5) and _is_number(width, 5) and int(height) and int(width)):
        raise InputError(f"--size must be HEIGHTxWIDTH in pixels, like 480x832, got '{_short(text)}'")
    return int(height), int(width)


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Layers as 0,1,5-9."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (_is_number(first, 4) and _is_number(last, 4) and int(first) <= int(last)):
            raise InputError(f"--layers must be numbers and ranges like 0,1,5-9, got '{_short(text)}'")
        layers += range(int(first), int(last) + 1)
    if len(set(layers)) < len(layers):
        raise InputError(f"--layers names a layer twice: '{_short(text)}'")
    return tuple(layers)


def _is_number(text: str, digits: int) -> bool:
    """Whether it is a whole number that is not absurdly long."""
    return text.isascii() and text.isdecimal() and len(text) <= digits


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def number_or(word: str, text: str | None, option: str) -> float | str | None:
    """A number, or the one word that is allowed instead."""
    if text is None or text == word:
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option} must be a number or '{word}', got '{text}'") from None


def command_line() -> str:
    return shlex.join(["kvlock-fast", *sys.argv[1:]])


def lock_config(preset: str, **overrides: Any) -> LockConfig:
    """The preset with the values changed that were given (not None); InputError naming the bad one."""
    try:
        return LockConfig.preset(preset, **{name: value for name, value in overrides.items() if value is not None})
    except ValueError as error:
        raise InputError(str(error)) from error
