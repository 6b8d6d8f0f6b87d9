"""How large a run `kvlock-fast profile` makes, and whether this machine can make it."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch

from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.loop.inputs import nearest_size
from kvlock_fast.planning import extent as planning
from kvlock_fast.planning.extent import Extent
from kvlock_fast.planning.machine import Machine
from kvlock_fast.planning.model_size import ModelSize
from kvlock_fast.planning.plan_edit import Edits, plan_edit
from kvlock_fast.units import text_bytes

FOREGROUND = 0.2
"""Share of the frame that the mask covers."""
LONGEST, SHORT = 900, 120
"""Seconds: a run on a CPU that would take longer is refused, and a shorter one is named."""


def extent_text(extent: Extent) -> str:
    """The model's name and depth, and the clip's size."""
    model, frames = extent.model, extent.frames
    depth = f"{model.layers} layer{'s' * (model.layers > 1)}"
    return f"{model.name} with {depth}, {frames} frame{'s' * (frames > 1)} of {extent.height}x{extent.width}"


def flops(extent: Extent, rows: int) -> float:
    """Operations of a forward of so many rows: attention's two products, and the other matrices."""
    model, tokens = extent.model, extent.tokens
    return rows * model.layers * (4 * tokens**2 * model.dim + 2 * tokens * model.matrix_weights)


def find_extent(model: ModelSize, frames: int | None, size: tuple[int, int] | None, layers: int | None) -> Extent:
    """Fit a run to a model, with a warning for each number that is changed.

    Args:
        model: the sizes of the model.
        frames: how many frames, None for the model's usual number.
        size: height and width in pixels, None for the model's usual ones.
        layers: how many of the first layers, None for all.

    Raises:
        InputError: a number out of range, naming the option.
    """
    if layers is not None:
        if not 1 <= layers <= model.layers:
            raise InputError(f"--layers must be a whole number from 1 to {model.layers}, got {layers}")
        model = with_layers(model, layers)
    return planning.find_extent(model, frames, size, "profiling")


def with_layers(model: ModelSize, layers: int) -> ModelSize:
    """Cut a model to so many layers; what is outside of them counts as if it were in them."""
    return replace(model, layers=layers, parameters=math.ceil(model.parameters * layers / model.layers))


def refuse_too_large(
    extent: Extent,
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
    lock: LockConfig,
    cache: CacheConfig,
    encoders: bool,
) -> None:
    """Raise InputError for a run without the memory for it, or on a CPU for much longer than anyone waits.

    Args:
        extent: the size of the run.
        steps: denoising steps.
        device: where it would run.
        dtype: of the weights.
        lock: the lock's config.
        cache: the cache's config, with a tier.
        encoders: whether text encoder and autoencoder are there as well.
    """
    machine = Machine.here(device)
    rate = _matrix_rate() if device.type == "cpu" else math.inf

    def seconds(e: Extent) -> float:
        return steps * flops(e, rows=3) / rate

    def memory(e: Extent) -> tuple[bool, str]:
        asked = Edits(lock, cache, steps, max(1, round(FOREGROUND * e.tokens)), guided=True)
        rows = plan_edit(e, asked, machine, dtype=dtype, encoders=encoders).rows
        row = next(row for row in rows if row.tier == cache.tier)
        on_gpu = f"{text_bytes(row.needed.gpu)} on the GPU and " * bool(row.needed.gpu)
        return row.fits, f"{on_gpu}{text_bytes(row.needed.host)} of memory"

    fits, place = memory(extent)
    if fits and seconds(extent) <= LONGEST:
        return
    smaller = _largest(extent, lambda e: memory(e)[0] and seconds(e) <= SHORT)
    why = f"{steps} steps of it take about {_long(seconds(extent))} on this CPU" if fits else f"it needs {place}"
    advice = _advice(extent, smaller, seconds)
    raise InputError(f"{extent_text(extent)}: {why}; {advice}--force runs it all the same")


def _advice(extent: Extent, smaller: Extent | None, seconds: Callable[[Extent], float]) -> str:
    """The options that make it fit, or nothing where none do."""
    if smaller is None:
        return ""
    options = []
    if smaller.model.layers != extent.model.layers:
        options.append(f"--layers {smaller.model.layers}")
    if smaller.frames != extent.frames:
        options.append(f"--frames {smaller.frames}")
    if (smaller.height, smaller.width) != (extent.height, extent.width):
        options.append(f"--size {smaller.height}x{smaller.width}")
    takes = f" (about {_long(seconds(smaller))})" if seconds(smaller) else ""
    return f"{' '.join(options)}{takes} would fit, "


def _largest(extent: Extent, fits: Callable[[Extent], bool]) -> Extent | None:
    """The most work that fits when depth, length and size are cut."""
    model, stride = extent.model, extent.model.geometry.frame_step
    depths = sorted({model.layers, *(n for n in (1, 2, 4, 8, 16) if n < model.layers)})
    lengths = sorted({extent.frames, *(n for n in (1 + i * stride for i in (0, 1, 4, 8)) if n < extent.frames)})
    sizes = {nearest_size(model.geometry, extent.height // n, extent.width // n) for n in (1, 2, 4)}
    smaller = (Extent(with_layers(model, d), f, *size) for d, f, size in product(depths, lengths, sizes))
    return max(filter(fits, smaller), key=lambda e: flops(e, 1), default=None)


def _matrix_rate() -> float:
    """FLOP/s of this CPU's matrix products in fp32, the best of a few."""
    a, best = torch.ones(768, 768), math.inf
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * 768**3 / best


def _long(seconds: float) -> str:
    for name, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(1, seconds):.0f} s"
