"""How large a run `kvlock-fast profile` makes, and whether this machine can make it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch

from kvlock_fast.config import CacheConfig
from kvlock_fast.errors import InputError, warn
from kvlock_fast.loop.inputs import nearest_size
from kvlock_fast.planning.job import Job
from kvlock_fast.planning.machine import Machine
from kvlock_fast.planning.model_size import ModelSize
from kvlock_fast.planning.planner import short_of
from kvlock_fast.units import text_bytes

FOREGROUND = 0.2
"""Share of the frame that the mask covers."""
LONGEST, SHORT = 900, 120
"""Seconds: a run on a CPU that would take longer is refused, and a shorter one is named."""
MOST_FRAMES = 100_000


@dataclass(frozen=True)
class Extent:
    """What is run: frames and size as the model takes them, layers of each transformer, tokens of the video."""

    model: ModelSize
    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return math.prod(self.model.geometry.token_grid(self.frames, self.height, self.width))

    @property
    def text(self) -> str:
        layers, frames = f"layer{'s' * (self.model.layers > 1)}", f"frame{'s' * (self.frames > 1)}"
        size = f"{self.height}x{self.width}"
        return f"{self.model.name} with {self.model.layers} {layers}, {self.frames} {frames} of {size}"

    def flops(self, rows: int) -> float:
        """Of a forward of so many rows: attention's two products, and the other matrices."""
        model = self.model
        return rows * model.layers * (4 * self.tokens**2 * model.dim + 2 * self.tokens * model.matrix_weights)


def find_extent(model: ModelSize, frames: int | None, size: tuple[int, int] | None, layers: int | None) -> Extent:
    """The model's own numbers where none are given. Raises InputError naming the option; warns where one is changed."""
    if layers is not None:
        if not 1 <= layers <= model.layers:
            raise InputError(f"--layers must be a whole number from 1 to {model.layers}, got {layers}")
        model = with_layers(model, layers)
    frames = model.frames if frames is None else frames
    if not 1 <= frames <= MOST_FRAMES:
        raise InputError(f"--frames must be a whole number from 1 to {MOST_FRAMES}, got {frames}")
    wanted = size or (model.height, model.width)
    fitting = nearest_size(model.geometry, *wanted)
    if fitting != wanted:
        warn(f"{model.name} cannot take the size {wanted[0]}x{wanted[1]}: profiling {fitting[0]}x{fitting[1]}")
    whole = model.geometry.whole_frames(frames)
    if whole != frames:
        warn(f"{frames} frames are not {model.geometry.frame_words}: profiling {whole}, as an edit would pad them")
    if not model.geometry.knows(whole, *fitting):
        raise InputError(
            f"{whole} frames of {fitting[0]}x{fitting[1]} are too many for {model.name}: "
            f"it takes at most {model.geometry.limits_text}"
        )
    return Extent(model, whole, *fitting)


def with_layers(model: ModelSize, layers: int) -> ModelSize:
    """Cut to so many layers; what is outside of them counts as if it were in them."""
    return replace(model, layers=layers, parameters=math.ceil(model.parameters * layers / model.layers))


def refuse_too_large(
    extent: Extent, steps: int, device: torch.device, dtype: torch.dtype, cache: CacheConfig, encoders: bool
) -> None:
    """Raise InputError for a run without the memory for it, or on a CPU for much longer than anyone waits.

    encoders: whether text encoder and autoencoder are there as well.
    """
    machine = Machine.here(device)
    rate = _matrix_rate() if device.type == "cpu" else math.inf

    def seconds(e: Extent) -> float:
        return steps * e.flops(rows=3) / rate

    def memory(e: Extent) -> tuple[bool, str]:
        job = Job(e.model, e.frames, e.height, e.width, round((1 - FOREGROUND) * e.tokens), steps, steps, dtype=dtype,
                  encoders_on_device=encoders)  # fmt: skip
        format = None if cache.tier == "lockstep" else cache.format
        needed = job.needed(cache.tier, format, 1, gpu=machine.gpu_bytes is not None)
        place = f"{text_bytes(needed.gpu)} on the GPU and " * bool(needed.gpu) + f"{text_bytes(needed.host)} of memory"
        return not short_of(needed, machine), place

    fits, place = memory(extent)
    if fits and seconds(extent) <= LONGEST:
        return
    smaller = _largest(extent, lambda e: memory(e)[0] and seconds(e) <= SHORT)
    why = f"{steps} steps of it take about {_long(seconds(extent))} on this CPU" if fits else f"it needs {place}"
    raise InputError(f"{extent.text}: {why}; {_advice(extent, smaller, seconds)}--force runs it all the same")


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
    """Of what is left when depth, length and size are cut, the most work that fits."""
    model, stride = extent.model, extent.model.geometry.frame_step
    depths = sorted({model.layers, *(n for n in (1, 2, 4, 8, 16) if n < model.layers)})
    lengths = sorted({extent.frames, *(n for n in (1 + i * stride for i in (0, 1, 4, 8)) if n < extent.frames)})
    sizes = {nearest_size(model.geometry, extent.height // n, extent.width // n) for n in (1, 2, 4)}
    smaller = (Extent(with_layers(model, d), f, *size) for d, f, size in product(depths, lengths, sizes))
    return max(filter(fits, smaller), key=lambda e: e.flops(1), default=None)


def _matrix_rate() -> float:
    """FLOP/s of this CPU's matrix products in fp32, the best of a few."""
    a, best = torch.ones(768, 768), math.inf
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 768**3 / best


def _long(seconds: float) -> str:
    for name, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(1, seconds):.0f} s"
