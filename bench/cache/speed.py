"""How small a cache of the source's keys and values is, and how fast: packing ratios, edits from a cache, the disk."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.cache.quality import BITS, Setting, Variant, case_of, edit
from bench.kernels.measure import relative_error
from kvlock_fast.cache.entry import Entry, EntryWriter
from kvlock_fast.cache.layout import KVShape, StepLayout
from kvlock_fast.config import CacheConfig
from kvlock_fast.planning.job import DEVICE_SLOTS
from kvlock_fast.planning.known_models import MODELS

SHAPES = (("wan-1.3b", 81), ("wan-1.3b", 33), ("cogvideox-2b", 49), ("cogvideox-5b", 49))
FOREGROUND, STEPS, KEPT_STEPS = 0.2, 50, 20
TIERS, HIT_FORMATS = ("resident", "host", "disk"), ("native", "fp8_e4m3")
NATIVE_ERROR = 1e-3  # of an edit's latents against lockstep: the order of sums in another batch


@dataclass(frozen=True)
class Shape:
    """What locking stores of a model and a video: names and sizes of a step."""

    name: str
    tokens: int
    background: int
    layout: StepLayout

    @property
    def naive(self) -> int:
        """K and V of one step, in bf16, of all tokens of the video."""
        kv = self.layout.shape
        return 2 * 2 * self.tokens * kv.heads * kv.dim * len(kv.layers)


def shape_of(model: str, frames: int, format: str) -> Shape:
    """A known model's at its usual size, in bf16, with a foreground of 20 %."""
    size = MODELS[model]
    grid = size.geometry.token_grid(frames, size.height, size.width)
    tokens = grid[0] * grid[1] * grid[2]
    background = tokens - round(FOREGROUND * tokens)
    kv = KVShape(tuple(range(size.layers)), background, size.heads, size.head_dim)
    return Shape(f"{model} {frames}f", tokens, background, StepLayout.usual(kv, format, torch.bfloat16))


def packing() -> list[dict[str, Any]]:
    """How many times fewer bytes than bf16 of all tokens and steps: arithmetic by `StepLayout`.

    equal_steps: as many steps; kept_steps: 20 of 50; stride_2: every other step of 50; host_tier: the slots on the GPU
    against 50 steps.
    """
    rows = []
    stored = {"equal_steps": STEPS, "kept_steps": KEPT_STEPS, "stride_2": STEPS // 2, "host_tier": DEVICE_SLOTS}
    for (model, frames), format in product(SHAPES, BITS):
        shape = shape_of(model, frames, format)
        about = {"shape": shape.name, "format": format, "tokens": shape.tokens, "background": shape.background}
        sizes = {"bytes_per_step": shape.layout.nbytes, "naive_bytes_per_step": shape.naive}
        ratios = {name: STEPS * shape.naive / (count * shape.layout.nbytes) for name, count in stored.items()}
        rows.append(about | sizes | ratios)
    return rows


def interleaved(
    work: dict[str, Callable[[], Any]],
    rounds: int,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
    warm_up: int = 1,
) -> dict[str, dict[str, float]]:
    """Every piece of work `rounds` times in mixed order, after the rounds of `warm_up`, which do not count; nor do
    `before` and `after` each piece.

    seconds: the median on the wall, low and high the extremes; cpu_seconds: the process's own median, which other
    programs on the machine disturb less.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    names, mixed = list(work), random.Random(0)
    for turn in range(-warm_up, rounds):
        mixed.shuffle(names)
        for name in names:
            before()
            wall, cpu = time.perf_counter(), time.process_time()
            work[name]()
            taken = time.perf_counter() - wall, time.process_time() - cpu
            after()
            if turn >= 0:
                times[name].append(taken)
    return {name: _summary(found) for name, found in times.items()}


def _summary(found: list[tuple[float, float]]) -> dict[str, float]:
    wall, cpu = ([*column] for column in zip(*found, strict=True))
    spread = {"low": min(wall), "high": max(wall), "rounds": len(found)}
    return {"seconds": statistics.median(wall), **spread, "cpu_seconds": statistics.median(cpu)}


def measure_hits(editor: Any, rounds: int, setting: Setting, formats: tuple[str, ...] = HIT_FORMATS) -> dict[str, dict]:
    """Whole edits by a stored cache, encoding, verification and decoding included, against lockstep.

    ratio: lockstep's median by theirs; error: of the latents against lockstep's, |a - b| / |b|.
    """
    variant, (case, seed) = Variant("source"), case_of(0)
    lock = variant.lock(setting)
    with TemporaryDirectory() as temporary:
        caches = {"lockstep": CacheConfig(tier="lockstep")}
        for format in formats:
            folder = Path(temporary) / format
            editor.invert(
                case.source.video, case.mask, folder, source_prompt=case.source_prompt, lock=lock,
                num_inference_steps=setting.steps, generator=torch.Generator().manual_seed(seed),
                cache=CacheConfig(format=format),
            )  # fmt: skip
            caches |= {f"{tier} {format}": CacheConfig(tier=tier, path=str(folder)) for tier in TIERS}
        runs = {name: partial(edit, editor, case, seed, lock, cache, setting) for name, cache in caches.items()}
        outs = {name: run() for name, run in runs.items()}
        timed = interleaved(runs, rounds, warm_up=0)
    for name, out in outs.items():
        timed[name]["forwards"] = out.trace.as_dict()["forwards"]
        timed[name]["error"] = relative_error(out.latents, outs["lockstep"].latents)
        for column in ("seconds", "cpu_seconds"):
            timed[name][column.replace("seconds", "ratio")] = timed["lockstep"][column] / timed[name][column]
    return timed


def disk_layout(megabytes: int, shards: int) -> StepLayout:
    """A step of Wan-1.3B in fp8, of as many tokens as make a shard of that size."""
    size = MODELS["wan-1.3b"]
    token = StepLayout(KVShape(tuple(range(size.layers)), 1000, size.heads, size.head_dim), "fp8_e4m3", torch.bfloat16)
    tokens = max(1, 1000 * megabytes * 10**6 // (shards * token.nbytes))
    return StepLayout(KVShape(tuple(range(size.layers)), tokens, size.heads, size.head_dim), "fp8_e4m3", torch.bfloat16)


class Disk:
    """The ways to write and to read the same tensors, in a temporary folder."""

    def __init__(self, folder: Path, megabytes: int, shards: int):
        self.folder, self.layout, self.count = folder, disk_layout(megabytes, shards), 0
        seeded = torch.Generator().manual_seed(0)
        size = (self.layout.nbytes,)
        self.tensors = {
            f"step-{i:05d}": self.layout.tensors(torch.randint(0, 256, size, dtype=torch.uint8, generator=seeded))
            for i in range(shards)
        }
        self.nbytes = shards * (self.layout.payload_bytes + self.layout.scale_bytes)
        self.target = self.layout.tensors(self.layout.new_arena("cpu"))
        self.entry, self.plain = folder / "entry", folder / "plain"
        self.write_entry(self.entry)
        self.write_plain(self.plain, sync=True)
        self.opened = Entry.open(self.entry)

    def write_entry(self, folder: Path) -> None:
        with EntryWriter(folder) as writer:
            for name, tensors in self.tensors.items():
                writer.add_shard(name, tensors)
            writer.publish({})

    def write_plain(self, folder: Path, sync: bool) -> None:
        folder.mkdir()
        for name, tensors in self.tensors.items():
            path = folder / f"{name}.safetensors"
            save_file(tensors, path)
            if sync:
                _sync(path)

    def read(self, tensors_of: Callable[[str], dict[str, Tensor]]) -> None:
        """Every shard into memory that is there already."""
        for name in self.tensors:
            for part, held in tensors_of(name).items():
                self.target[part].copy_(held)

    def read_entry(self) -> None:
        with Entry.open(self.entry) as entry:
            self.read(entry.tensors)

    def load(self, name: str) -> dict[str, Tensor]:
        return load_file(self.plain / f"{name}.safetensors")

    def writes(self) -> dict[str, Callable[[], None]]:
        """Ours, hashed and on the disk for certain; safetensors' own, with and without waiting for the disk."""
        return {
            "ours": lambda: self.write_entry(self._fresh()),
            "save_file, synced": lambda: self.write_plain(self._fresh(), sync=True),
            "save_file": lambda: self.write_plain(self._fresh(), sync=False),
        }

    def reads(self) -> dict[str, Callable[[], None]]:
        """Every byte compared with its hash first; from an entry that was verified when it was opened; plain."""
        return {
            "ours, verified": self.read_entry,
            "ours, opened": lambda: self.read(self.opened.tensors),
            "load_file": lambda: self.read(self.load),
        }

    def settle(self) -> None:
        """Remove what the last write left, so that nothing on its way to the disk delays the next."""
        for folder in self.folder.glob("new-*"):
            shutil.rmtree(folder)

    def forget(self) -> None:
        """Ask the kernel to drop the files' pages, so that the next read is of the disk."""
        for path in self.folder.rglob("*.safetensors"):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def wrong(self) -> list[str]:
        """The ways that do not give back what was written, bit for bit."""
        ways = {"ours": self.opened.tensors, "load_file": self.load}
        return [way for way, tensors_of in ways.items() if not all(self._same(tensors_of, n) for n in self.tensors)]

    def _same(self, tensors_of: Callable[[str], dict[str, Tensor]], name: str) -> bool:
        held = tensors_of(name)
        return all(
            torch.equal(held[part].view(torch.uint8), x.view(torch.uint8)) for part, x in self.tensors[name].items()
        )

    def _fresh(self) -> Path:
        self.count += 1
        return self.folder / f"new-{self.count}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def measure_disk(megabytes: int, shards: int, rounds: int) -> dict[str, Any]:
    """GB/s of each way, and its ratio to safetensors' own that does as much: a write that is synced, a plain read.

    warm: the files are in the page cache; cold: they were dropped from it before each read.
    """
    with TemporaryDirectory() as temporary:
        disk = Disk(Path(temporary), megabytes, shards)
        found = {
            "write": interleaved(disk.writes(), rounds, after=disk.settle),
            "read, warm": interleaved(disk.reads(), rounds),
        }
        wrong, opened = disk.wrong(), disk.opened
        opened.close()
        del disk.opened, opened  # its mapping would keep the pages
        reads = {name: read for name, read in disk.reads().items() if name != "ours, opened"}
        found["read, cold"] = interleaved(reads, rounds, before=disk.forget)
        nbytes = disk.nbytes
    for what, plain in (("write", "save_file, synced"), ("read, warm", "load_file"), ("read, cold", "load_file")):
        for figures in found[what].values():
            figures["gbps"] = nbytes / figures["seconds"] / 1e9
            figures["ratio"] = found[what][plain]["seconds"] / figures["seconds"]
    return {"bytes": nbytes, "shards": shards, "tensors": shards * len(disk.layout.parts), "wrong": wrong, **found}
