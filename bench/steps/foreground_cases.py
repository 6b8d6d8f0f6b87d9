"""What bench/steps/foreground.py runs: one edit in full, by its foreground alone, and unlocked by diffusers itself.

Locked edits read the source's K and V from a cache, alpha is 1 in every step; so the pass of the source is in neither.
`ModelEdits` are whole edits by a pipeline (text, steps, decoding); `RandomEdits` the steps of a size with random
weights, for a GPU.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.steps.cases import SHAPES, Steps
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.loop.trace import Clock
from kvlock_fast.masks import project_mask

FULL, FOREGROUND, UNLOCKED = "full", "foreground", "diffusers"
SEED, GUIDANCE = 3, 3.0


@dataclass(frozen=True)
class Run:
    """steps: seconds of each but the first; edit: of all, None where there are steps only; latents: at the end."""

    steps: list[float]
    edit: float | None
    latents: torch.Tensor | None


def saturated(compute: str) -> LockConfig:
    """The preset kvlock with alpha 1 in every step: what foreground-only computation can do at its best."""
    return LockConfig.preset("kvlock", alpha=1.0, s_star_region="foreground", compute=compute)


def box(frames: int, height: int, width: int, share: float, cell: int) -> np.ndarray:
    """A mask of about this share in the middle of every frame, whole cells of pixels: bool [F, H, W]."""
    rows, columns = height // cell, width // cell
    high = min(rows, max(1, round(rows * math.sqrt(share))))
    wide = min(columns, max(1, round(share * rows * columns / high)))
    top, left = (rows - high) // 2, (columns - wide) // 2
    mask = np.zeros((frames, height, width), bool)
    mask[:, top * cell : (top + high) * cell, left * cell : (left + wide) * cell] = True
    return mask


@contextmanager
def _counted(device: torch.device) -> Iterator[FlopCounterMode]:
    """torch's count of FLOPs, attention included: our operator's, and on a CPU by plain products."""

    def ours(q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
        batch, queries, heads, dim = q
        return 4 * batch * queries * k[1] * heads * dim

    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with plain, FlopCounterMode(display=False, custom_mapping={torch.ops.kvlock_fast.attention: ours}) as counter:
        yield counter


class ModelEdits:
    """Edits of a clip of the demo's world, enlarged, by a model in diffusers' format."""

    def __init__(self, model: str, size: tuple[int, int], share: float, device: torch.device, folder: Path):
        from kvlock_fast.demo import demo_case
        from kvlock_fast.edit import load_pipeline
        from kvlock_fast.media import resize_video

        self.pipe, self.device = load_pipeline(model, device.type), device
        self.pipe.pipe.set_progress_bar_config(disable=True)
        case = demo_case()
        self.video = resize_video(case.source.video, *size)
        geometry = self.pipe.model.geometry
        self.mask = box(*self.video.shape[:3], share, math.lcm(*geometry.size_multiple()))
        self.texts = case.source_prompt, case.prompt
        projected = project_mask(torch.from_numpy(self.mask), geometry)
        self.share, self.tokens = projected.share, projected.tokens.shape[1]
        self.folder = folder
        self.made: set[int] = set()

    def _cache(self, steps: int) -> CacheConfig:
        folder = self.folder / str(steps)
        if steps not in self.made:
            self.pipe.invert(
                self.video, self.mask, folder, source_prompt=self.texts[0], num_inference_steps=steps,
                generator=torch.Generator().manual_seed(SEED), lock=saturated(FULL),
            )  # fmt: skip
            self.made.add(steps)
        return CacheConfig(path=str(folder))

    def run(self, contender: str, steps: int, prompts: int = 1, output: str = "frames") -> Run:
        """One edit of so many prompts."""
        if contender == UNLOCKED:
            return self._unlocked(steps, prompts, output)
        cache = self._cache(steps)
        start = time.perf_counter()
        out = self.pipe(
            self.video, self.mask, source_prompt=self.texts[0], prompt=[self.texts[1]] * prompts, cache=cache,
            num_inference_steps=steps, guidance_scale=GUIDANCE, lock=saturated(contender), output=output,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        taken = [record.seconds for record in out.trace if record.sample == 0]
        return Run(taken[1:] or taken, seconds, out.latents)

    def _unlocked(self, steps: int, prompts: int, output: str) -> Run:
        clock = Clock(self.device)
        frames, height, width = self.mask.shape
        start = time.perf_counter()
        self.pipe.pipe(
            prompt=[self.texts[1]] * prompts, height=height, width=width, num_frames=frames, guidance_scale=GUIDANCE,
            num_inference_steps=steps, generator=torch.Generator().manual_seed(SEED),
            max_sequence_length=self.pipe.model.text_length, output_type="np" if output == "frames" else "latent",
            callback_on_step_end=lambda pipe, k, t, kwargs: (clock.mark(), kwargs)[1],
        )  # fmt: skip
        clock.wait()
        return Run(clock.intervals(), time.perf_counter() - start, None)

    def flops(self, contender: str) -> float:
        """Of the transformer, in one step."""
        if contender != UNLOCKED:
            self._cache(1)
        with _counted(self.device) as counter:
            self.run(contender, 1, output="latent")
        counts = counter.get_flop_counts()
        encoder = type(self.pipe.pipe.text_encoder).__name__
        return float(sum(counts["Global"].values()) - sum(counts.get(encoder, {}).values()))


class RandomEdits:
    """Steps of a known size with random weights."""

    def __init__(self, shape: str, share: float, device: torch.device, dtype: torch.dtype):
        self.steps = Steps(SHAPES[shape], device, dtype)
        extent, self.device = self.steps.extent, device
        geometry = extent.model.geometry
        mask = box(extent.frames, extent.height, extent.width, share, math.lcm(*geometry.size_multiple()))
        self.steps.mask = project_mask(torch.from_numpy(mask).to(device), geometry)
        self.share, self.tokens = self.steps.mask.share, extent.tokens

    def run(self, contender: str, steps: int, prompts: int = 1, output: str = "latent") -> Run:
        """As ModelEdits', but there is no text and nothing to decode."""
        clock, made = Clock(self.device), self.steps
        if contender == UNLOCKED:
            work: Callable[..., Any] = made.diffusers
        else:
            work = made.ours(CacheConfig(tier="resident"), lock=saturated(contender), prompts=prompts)
        latents = work(steps, clock.mark)
        return Run(clock.intervals(), None, latents)

    def flops(self, contender: str) -> float:
        """Of the transformer in one step, from the difference of two runs' counts."""
        counts = []
        for steps in (1, 2):
            with _counted(self.device) as counter:
                self.run(contender, steps)
            counts.append(float(counter.get_total_flops()))
        source = counts[1] - counts[0]
        return source if contender == UNLOCKED else source - self._source_flops()

    def _source_flops(self) -> float:
        """Of the source's own forward, which each stored step costs once."""
        made = self.steps
        with _counted(self.device) as counter, torch.no_grad():
            family = made.family(1)
            family.forward(made.noise, family.scheduler.timesteps[0], made.source_prompt, made.transformer)
        return float(counter.get_total_flops())
