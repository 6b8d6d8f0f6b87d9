"""What a cache of the source's keys and values costs in quality: error of its formats, and edits of the demo world.

Only the demo model is measured, as only its weights are at hand: random weights have no keys worth a measurement.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench.quality.demo_model import SEEDS, Rows, background_scores, interval
from bench.quality.judge import edit_is_right
from kvlock_fast.cache.layout import Key, KVShape, StepLayout
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.demo import GUIDANCE, STEPS
from kvlock_fast.demo.world import EDIT_KINDS, EditCase, sample_edit
from kvlock_fast.kernels.blend import as_heads
from kvlock_fast.kernels.quantize import quantize_kv
from kvlock_fast.locking.lock import Mode, kv_sizes
from kvlock_fast.loop import stored_source
from kvlock_fast.loop.stored_source import steps_to_store, thinned_steps
from kvlock_fast.loop.trace import Recorder
from kvlock_fast.media.metrics import psnr
from kvlock_fast.open_scene import Wanted, open_scene

BITS = ("bf16", "fp8_e4m3", "int8", "int4")
FORMATS = ("native", *BITS)
SMALL, STRIDES = ("fp8_e4m3", "int4"), (1, 2, 4)
PACKINGS = {format: (format, 1) for format in BITS} | {"fp8_e4m3, a scale per 128": ("fp8_e4m3", 128)}
STAGES = {"K before RoPE": "k", "K after RoPE": "k", "V": "v"}


@dataclass(frozen=True)
class Setting:
    """How the demo world is edited. kappa: 8 of 20 steps, as the paper's 20 of 50; with 20 all would be dynamic."""

    steps: int = STEPS
    kappa: int = 8
    guidance: float = GUIDANCE


@dataclass(frozen=True)
class Variant:
    """One way to edit.

    latents: the lock's background_latents; format: None in lockstep, where nothing is stored; stands: which of a run
    of steps is stored for it, by index, None for the code's own choice; last: which of the last run, None for the same.
    """

    latents: str
    format: str | None = None
    stride: int = 1
    steps: str = "all"
    stands: int | None = None
    last: int | None = None

    @property
    def name(self) -> str:
        """Like "model/fp8_e4m3/2/all"."""
        if self.format is None:
            return f"{self.latents}/lockstep"
        which = [str(i) for i in (self.stands, self.last) if i is not None]
        return "/".join([self.latents, self.format, str(self.stride), self.steps, *which])

    def lock(self, setting: Setting) -> LockConfig:
        """The preset kvlock, its background as `latents` says; by the paper's tau alpha is 1 nearly always, so that all
        that is stored is used in full."""
        return LockConfig.preset("kvlock", background_latents=self.latents, kappa=setting.kappa, tau=0.01)

    @property
    def cache(self) -> CacheConfig:
        if self.format is None:
            return CacheConfig(tier="lockstep")
        return CacheConfig(tier="resident", format=self.format, step_stride=self.stride, steps=self.steps)

    def stored_steps(self, setting: Setting) -> list[int]:
        """The steps whose K and V are kept."""
        if self.format is None:
            return []
        with neighbour(self.stands, self.last):
            slots = steps_to_store(self.lock(setting), self.cache, setting.steps, lambda k: 0)
        return sorted(set(slots.values()))


def variants(quick: bool = False) -> list[Variant]:
    """The rows, what matters most first; locked by K/V alone ("model") is where an error of the cache shows."""
    model, source, fp8 = "model", "source", "fp8_e4m3"
    if quick:
        return [Variant(model), Variant(model, "int4", 4, "dynamic"), Variant(source)]
    rows = [Variant(model), *(Variant(model, format) for format in FORMATS)]
    rows += [Variant(model, format, stride) for stride, format in product((2, 4), SMALL)]
    rows += [Variant(model, format, 1, "dynamic") for format in SMALL]
    rows += [Variant(source), *(Variant(source, format, stride) for stride, format in product((1, 4), SMALL))]
    rows += [Variant(model, fp8, 4, "all", i) for i in (0, 3, 2)] + [Variant(model, fp8, 2, "all", 1)]
    rows += [Variant(model, fp8, 2, "all", 1, 0), Variant(model, fp8, 4, "all", 1, 2)]
    rows += [Variant(model, fp8, 4, "all", 2, 1), Variant(model, fp8, 4, "all", 3, 2)]
    rows += [Variant(model, format, stride, "dynamic") for stride, format in product((4, 2), SMALL)]
    everything = (Variant(*v) for v in product((model, source), FORMATS, STRIDES, ("all", "dynamic")))
    return rows + [variant for variant in everything if variant not in rows]


def case_of(i: int) -> tuple[EditCase, int]:
    """The i-th held-out edit and its seed; every kind in turn, every source once."""
    seed = SEEDS["edit"] + i
    return sample_edit(seed, EDIT_KINDS[i % len(EDIT_KINDS)]), seed


@contextmanager
def neighbour(index: int | None, last: int | None = None) -> Iterator[None]:
    """Of every run of steps the `index`-th is stored for it, of the last run the `last`-th; of shorter runs the last.

    index None: as the code chooses; last None: as of the others.
    """

    def chosen(*arguments: Any) -> dict[int, int]:
        runs = defaultdict(list)
        for k, stored in thinned_steps(*arguments).items():
            runs[stored].append(k)
        slots = {k: run[min(index, len(run) - 1)] for run in runs.values() for k in run}
        final = list(runs.values())[-1]
        return slots if last is None else slots | dict.fromkeys(final, final[min(last, len(final) - 1)])

    if index is None:
        yield
        return
    with mock.patch.object(stored_source, "thinned_steps", chosen):
        yield


def sqnr(x: Tensor, out: Tensor) -> float:
    """10 log10(|x|^2 / |x - out|^2) in dB, in fp64; inf where nothing was lost."""
    x, out = x.double(), out.double()
    noise = (x - out).square().sum().item()
    return 10 * math.log10(x.square().sum().item() / noise) if noise else math.inf


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [B, S, H, D] as diffusers' Wan attention has it: channels in pairs; cos, sin [1, S, 1, D]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)


@torch.no_grad()
def capture(
    editor: Any, case: EditCase, seed: int, steps: tuple[int, ...], setting: Setting
) -> Iterator[tuple[int, str, int, Tensor]]:
    """(step, stage, layer, [1, N, H, D]) of the source's background tokens, as the source's pass sees them."""
    recorder, model, variant = Recorder(editor.model.device), editor.model, Variant("model")
    wanted = Wanted(
        video=case.source.video, mask=case.mask, source_prompt=case.source_prompt, num_inference_steps=setting.steps,
        guidance_scale=setting.guidance, generator=torch.Generator().manual_seed(seed), latents=None, height=None,
        width=None, frames_policy="pad", lock=variant.lock(setting), cache=variant.cache, processors="auto",
    )  # fmt: skip
    with (
        open_scene(model, wanted, recorder, lambda *_: None) as scene,
        scene.predictor(recorder) as predict,
    ):
        text = model.condition_source([case.source_prompt], scene.given_source)
        path, background = scene.path(predict, text, None, recorder), scene.background()
        cos, sin = (part[:, background] for part in model.transformers[0].rope(path.at(0)))
        heads, _ = kv_sizes(model.transformers[0], model.arch)
        for step in steps:
            kept: dict[Key, Tensor] = {}
            predict(step, path.at(step), text, Mode.CAPTURE, kept=kept)
            for (layer, kind), x in kept.items():
                x = as_heads(x, model.arch.token_dim if kind == "k" else 1, heads)
                yield step, "V" if kind == "v" else "K before RoPE", layer, x
                if kind == "k":
                    yield step, "K after RoPE", layer, rotate(x, cos, sin)


def measure_errors(editor: Any, clips: range, steps: tuple[int, ...], setting: Setting) -> list[dict[str, Any]]:
    """SQNR (dB) of every format by step, stage and layer: mean and interval over the clips."""
    found: dict[tuple, list[float]] = defaultdict(list)
    for i in clips:
        for step, stage, layer, x in capture(editor, *case_of(i), steps, setting):
            for name, (format, tokens) in PACKINGS.items():
                packed = quantize_kv(x, format, STAGES[stage], tokens_per_scale=tokens)
                found[name, stage, layer, step].append(sqnr(x, packed.dequantize(torch.float32)))
    names = ("format", "stage", "layer", "step")
    return [dict(zip(names, key, strict=True)) | {"sqnr_db": interval(values)} for key, values in found.items()]


def cache_bytes(layout: StepLayout, stored_steps: int, all_tokens: int, num_steps: int) -> dict[str, float]:
    """Bytes of the stored steps, and how many times fewer than bf16 of all tokens and steps."""
    shape = layout.shape
    naive = 2 * 2 * all_tokens * shape.heads * shape.dim * len(shape.layers) * num_steps
    stored = layout.nbytes * stored_steps
    return {"bytes": stored, "naive_bytes": naive, "ratio": naive / stored if stored else None}


def finite_psnr(video: np.ndarray, truth: np.ndarray) -> float:
    """dB between uint8 videos, 100 where they are the same."""
    return min(psnr(video, truth), 100.0)


def edit(editor: Any, case: EditCase, seed: int, lock: LockConfig, cache: CacheConfig, setting: Setting) -> Any:
    """An edit as `kvlock-fast demo` makes it; a cache with a path brings its noise along."""
    return editor(
        case.source.video,
        case.mask,
        source_prompt=case.source_prompt,
        prompt=case.prompt,
        num_inference_steps=setting.steps,
        guidance_scale=setting.guidance,
        generator=None if cache.path is not None else torch.Generator().manual_seed(seed),
        lock=lock,
        cache=cache,
    )


class Edits:
    """Edits of the held-out cases; finished ones are found again in `rows`, lockstep's videos beside them."""

    def __init__(self, editor: Any, rows: Rows, setting: Setting):
        self.editor, self.rows, self.setting = editor, rows, setting
        self.folder = rows.path.with_suffix("")
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, variant: Variant, cases: range) -> dict[str, Any]:
        """The row of a variant: mean and interval of each figure over the cases, and of its changes."""
        figures = [self.rows.once(f"{variant.name}/{i}", self.one, variant, i) for i in cases]
        means = {name: interval([f[name] for f in figures]) for name in figures[0] if name != "key"}
        stored = variant.stored_steps(self.setting)
        about = {"name": variant.name, **vars(variant), "stored_steps": stored, "cases": len(cases)}
        return about | means | {"change": self.changes(variant, cases)}

    def finished(self, variant: Variant, cases: range) -> bool:
        """Whether `run` has nothing left to do."""
        return all(f"{variant.name}/{i}" in self.rows.rows for i in cases)

    def one(self, variant: Variant, i: int) -> dict[str, Any]:
        case, seed = case_of(i)
        with neighbour(variant.stands, variant.last):
            out = edit(self.editor, case, seed, variant.lock(self.setting), variant.cache, self.setting)
        video, tokens = np.asarray(out.frames[0]), out.mask.tokens[0]
        scores, right = background_scores(video, case.source.video, case.mask), edit_is_right(case, video)
        if variant.format is None:
            np.save(self.reference(variant, i), video)
        lockstep = np.load(self.reference(variant, i))
        return (
            scores | {"right": right, "psnr_to_lockstep": finite_psnr(video, lockstep)} | self._bytes(variant, tokens)
        )

    def reference(self, variant: Variant, i: int) -> Path:
        """Where lockstep's video of a case is."""
        return self.folder / f"{variant.latents}-{i}.npy"

    def _bytes(self, variant: Variant, foreground: Tensor) -> dict[str, float]:
        transformer = self.editor.model.transformers[0]
        heads, dim = kv_sizes(transformer, self.editor.model.arch)
        layers = tuple(range(len(self.editor.model.arch.attentions(transformer))))
        shape = KVShape(layers, int((~foreground).sum()), heads, dim)
        if variant.format is None:
            return {}
        layout = StepLayout.usual(shape, variant.format, transformer.dtype)
        stored = len(variant.stored_steps(self.setting))
        return cache_bytes(layout, stored, len(foreground), self.setting.steps)

    def changes(self, variant: Variant, cases: range) -> dict[str, dict[str, float]]:
        """Against lockstep, case by case: mean and interval of the differences."""
        lockstep = Variant(variant.latents)
        pairs = [(self.rows.rows[f"{variant.name}/{i}"], self.rows.rows[f"{lockstep.name}/{i}"]) for i in cases]
        names = ("psnr", "psnr_locked", "right")
        return {name: interval([float(a[name]) - float(b[name]) for a, b in pairs]) for name in names}
