"""A source in a folder: its K and V by step, its latents and predictions, and the facts of what they were made of."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.cache.entry import Entry, EntryWriter
from kvlock_fast.cache.layout import KVShape, StepLayout, shard_name
from kvlock_fast.cache.manifest import DamagedCache
from kvlock_fast.cache.store import Packed
from kvlock_fast.kernels.quantize import FORMATS, TOKENS_PER_SCALE

SOURCE_SHARD = "source"
K_STAGE = "normed"
"""The stage that keys are kept at: after their norm and before RoPE, which bench.cache found the better of the two."""


@dataclass(frozen=True)
class SavedSource:
    """An open entry that holds a source. Making one raises DamagedCache if it does not hold what it says."""

    entry: Entry
    folder: Path

    def __post_init__(self):
        try:
            self._check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, DamagedCache):
                raise
            raise DamagedCache(self.folder / "manifest.json", f"it does not describe a source: {error!r}") from error

    def _check(self) -> None:
        facts = self.facts
        if facts["k_stage"] != K_STAGE or facts["format"] not in FORMATS:
            raise ValueError(f"keys {facts['k_stage']!r} in format {facts['format']!r}")
        if not self.latents or self.background.shape != (self.layout.shape.tokens,):
            raise ValueError("its latents or its background are missing")
        wanted = {part.name: (part.shape, part.dtype) for part in self.layout.parts}
        for step in self.steps:
            held = self.entry.tensors(shard_name(step))
            if {name: (tuple(x.shape), x.dtype) for name, x in held.items()} != wanted:
                raise ValueError(f"the tensors of step {step} are not those of its format")

    @classmethod
    def open(cls, folder: str | Path) -> "SavedSource":
        """Read and verify a folder that the user named. Raises InputError saying what is wrong with it."""
        entry = Entry.open(Path(folder))
        try:
            return cls(entry, Path(folder))
        except BaseException:
            entry.close()
            raise

    @property
    def facts(self) -> dict[str, Any]:
        return self.entry.meta

    @cached_property
    def layout(self) -> StepLayout:
        kv = self.facts["kv"]
        shape = KVShape(tuple(self.facts["layers"]), kv["tokens"], kv["heads"], kv["dim"])
        shares, dtype = kv.get("tokens_per_scale", 1), getattr(torch, kv["dtype"])
        if shares not in TOKENS_PER_SCALE:
            raise ValueError(f"{shares!r} tokens share a scale")
        return StepLayout(shape, self.facts["format"], dtype, shares)

    @cached_property
    def slots(self) -> dict[int, int]:
        """Steps whose K and V are there, with the stored step that stands for each."""
        return {int(step): int(stored) for step, stored in self.facts["slots"]}

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The stored steps."""
        return tuple(sorted(set(self.slots.values())))

    @property
    def _source(self) -> dict[str, Tensor]:
        return self.entry.tensors(SOURCE_SHARD)

    @property
    def background(self) -> Tensor:
        """Indices [N] of the tokens that are stored."""
        return self._source["background"]

    @property
    def latents(self) -> dict[str, Tensor]:
        """The source's path: clean and noise, or path."""
        return {name: x for name, x in self._source.items() if name in ("clean", "noise", "path")}

    @property
    def inverted(self) -> bool:
        """Whether the source's path was integrated up from the clean source."""
        return "path" in self.latents

    @property
    def start(self) -> Tensor:
        """Latents [1, C, T, h, w] fp32 that the edit starts from: the noise, or the end of the inverted path."""
        return self.latents["path"][0] if self.inverted else self.latents["noise"][:1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels that it was made at."""
        _, height, width = self.facts["size"]
        return height, width

    @property
    def predictions(self) -> dict[int, Tensor]:
        """The source's velocities by step."""
        return {
            int(name.removeprefix("prediction.")): x
            for name, x in self._source.items()
            if name.startswith("prediction.")
        }

    def packed(self, step: int) -> Packed:
        """The K and V of a stored step, in the file's own memory."""
        return self.layout.from_tensors(self.entry.tensors(shard_name(step)))


def save_source(
    writer: EntryWriter,
    facts: dict[str, Any],
    latents: dict[str, Tensor],
    background: Tensor,
    predictions: dict[int, Tensor],
) -> None:
    """Add what a source has beside its steps, which are written already, and publish the entry.

    Args:
        writer: of the entry.
        facts: what the source was made of, as plain values.
        latents: its path, by name: clean and noise, or path.
        background: indices [N] of the tokens that are stored.
        predictions: its velocities by step.
    """
    named = {f"prediction.{k:05d}": x for k, x in predictions.items()}
    writer.add_shard(SOURCE_SHARD, {"background": background, **latents, **named})
    writer.publish(facts)
