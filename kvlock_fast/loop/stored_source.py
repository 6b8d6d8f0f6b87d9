"""Where the K and V of a source come from: made in memory, made and found on disk, or read from a folder by name.

They are made by the source's own pass through the model; what it predicted is kept for the edits too.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.cache.entry import EntryWriter
from kvlock_fast.cache.fingerprint import digest, fingerprint, first_difference, key_of
from kvlock_fast.cache.layout import KVShape, StepLayout
from kvlock_fast.cache.root import CacheRoot
from kvlock_fast.cache.saved_source import K_STAGE, SavedSource, save_source
from kvlock_fast.cache.shard import PAGE
from kvlock_fast.cache.store import DiskStore, HostStore, KVStore, ResidentStore
from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.errors import InputError, OutputError
from kvlock_fast.locking.lock import Mode, kv_sizes
from kvlock_fast.loop.forwards import Predictor
from kvlock_fast.loop.schedule import asks_source, can_lock, first_dynamic_step, zeroed_steps
from kvlock_fast.loop.solver import Solver
from kvlock_fast.loop.source import SourcePath, StoredSource, renoise
from kvlock_fast.models.base import PipelineModel
from kvlock_fast.nvtx import span
from kvlock_fast.version import __version__


def thinned_steps(locked: Iterable[int], stride: int, stage: Callable[[int], int]) -> dict[int, int]:
    """For each locked step the step that is stored for it: of every `stride` in a row, in one stage, the middle one.

    Of two in the middle the earlier. By bench.cache the first or last of four costs ten times the error; the later
    of the middle ones may be a little better, and the last step of all should not stand for others.
    """
    slots, run = {}, []
    for k in (*locked, None):
        if run and (k is None or len(run) == stride or k != run[-1] + 1 or stage(k) != stage(run[0])):
            slots |= dict.fromkeys(run, run[(len(run) - 1) // 2])
            run = []
        run.append(k)
    return slots


def run_source(
    predict: Predictor,
    source: SourcePath,
    source_prompt: Conditioning,
    store: KVStore,
    watched: frozenset[int],
    progress: Callable[[int, int], None],
) -> dict[int, Tensor]:
    """One forward of the source for each stored and each watched step; the predictions of the watched ones.

    Raises InputError naming the first step whose prediction holds NaN or inf, as keys and values that do would cause.
    """
    predictions, finite = {}, []
    steps = sorted(watched.union(store.steps))
    for done, k in enumerate(steps, start=1):
        with store.write(k) if k in store.steps else nullcontext() as places:
            mode = Mode.OFF if places is None else Mode.CAPTURE
            with span("forward source"):
                prediction = predict(k, source.at(k), source_prompt, mode, kept=places)
        if k in watched:
            predictions[k] = prediction
        finite.append(prediction.isfinite().all())
        progress(done, len(steps))
    store.written()
    if finite and not all(fine := torch.stack(finite).tolist()):  # read once, when all has run
        k = steps[fine.index(False)]
        raise InputError(f"the source's prediction became NaN or inf at step {k + 1} of {predict.solver.num_steps}")
    return predictions


Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Source:
    """A source as the model sees it, and all that makes its K and V what they are.

    background: indices [N] of its tokens; prompt: of one sample.
    """

    path: SourcePath
    prompt: Conditioning
    background: Tensor


def source_facts(
    model: PipelineModel, solver: Solver, lock: LockConfig, given: Given, source_prompt: str, noise: Tensor
) -> dict[str, Any]:
    """The facts that an edit and a cache must share; given: the source as the model takes it."""
    scheduler = solver.scheduler
    inverts = lock.source_path == "invert"
    guided = "" if lock.source_guidance is None else f" guided {lock.source_guidance:g}"
    skipped = {"skipped": solver.skip} if solver.skip else {}
    several = "" if lock.noises == 1 else f", source_noise {lock.noises}"
    return {
        "model": {
            "family": model.arch.family,
            "class": type(model.transformers[0]).__name__,
            "dtype": dtype_name(model.transformers[0].dtype),
            "fingerprint": fingerprint(model.modules),
            "options": model.facts(given),
        },
        "scheduler": {
            "class": type(scheduler).__name__,
            "prediction": solver.prediction,
            "steps": solver.num_steps + solver.skip,
            **skipped,
            "timesteps": [float(t) for t in solver.timesteps],
            "sigmas": solver.sigmas.tolist(),
        },
        "video": digest(given.frames),
        "size": list(given.frames.shape[:3]),
        "source_prompt": source_prompt,
        "source_path": f"invert {lock.inversion_solver}{guided}" if inverts else f"renoise{several}",
        "noise": None if inverts else digest(noise),
    }


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, not torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def steps_to_store(lock: LockConfig, cache: CacheConfig, num_steps: int, stage: Callable[[int], int]) -> dict[int, int]:
    """For each step whose K and V are stored, the stored step that stands for it."""
    first = first_dynamic_step(lock, num_steps) if cache.steps == "dynamic" else 0
    locked = (k for k in range(max(first, zeroed_steps(lock, num_steps)), num_steps) if can_lock(lock, num_steps, k))
    return thinned_steps(locked, cache.step_stride, stage)


class SourceMaker:
    """Runs a source's pass into a store, or finds what an earlier one has left."""

    def __init__(self, source: Source, predict: Predictor, cache: CacheConfig, progress: Progress):
        self.source, self.predict, self.cache, self.progress = source, predict, cache, progress
        model, lock, solver = predict.model, predict.lock, predict.solver
        self.device = source.background.device
        self.slots = steps_to_store(lock, cache, solver.num_steps, predict.stage)
        watches = asks_source(lock)
        asked = range(zeroed_steps(lock, solver.num_steps), solver.num_steps)
        self.watched = frozenset(asked) if watches else frozenset()
        sizes = {kv_sizes(t, model.arch) for t in model.transformers}
        if len(sizes) > 1:
            raise InputError(f"the model's transformers have self-attentions of different sizes: {sorted(sizes)}")
        kept = predict.kept_tokens(source.background, source.path.start)
        shape = KVShape(predict.locks[0].layers, kept, *sizes.pop())
        self.layout = StepLayout.usual(shape, cache.format, model.transformers[0].dtype)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are stored."""
        return tuple(sorted(set(self.slots.values())))

    def in_memory(self, tier: str) -> StoredSource:
        """Run the source into a resident or host store."""
        kind = ResidentStore if tier == "resident" else HostStore
        store = kind(self.layout, self.steps, self.device)
        try:
            return StoredSource(store, self.slots, self.source.background, self._run(store, self.watched))
        except BaseException:
            store.close()
            raise

    def on_disk(self, root: CacheRoot, source_facts: dict[str, Any]) -> StoredSource:
        """What the root holds of this source, or else a new entry. Raises OutputError where it cannot be written."""
        facts = self.facts(source_facts)
        key = key_of(facts)
        saved = _found(root, key, facts)
        if saved is None:
            root.make_room(self._disk_bytes)
            with root.writer(key) as writer:
                self.write(writer, source_facts)
                saved = _found(root, key, facts)  # inside, where nobody can evict it
        if saved is None:
            raise OutputError(f"the cache '{root.path / key}' was gone as soon as it was written")
        return read_saved(saved, "disk", self.device, owned=True)

    def write(self, writer: EntryWriter, source_facts: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Run the source into an entry and publish it; its facts. more: such as nobody compares."""
        store = DiskStore(self.layout, self.steps, self.device, writer)
        try:
            predictions = self._run(store, self._kept_predictions)
            background = self.source.background.cpu()
            facts = self.facts(source_facts) | more
            latents = _path_tensors(self.source.path, self.predict.lock.source_path == "invert")
            save_source(writer, facts, latents, background, predictions)
            return facts
        finally:
            store.close()

    def facts(self, source_facts: dict[str, Any]) -> dict[str, Any]:
        """All the facts of an entry: of the source, and what is kept of it."""
        shape = self.layout.shape
        kv = {"tokens": shape.tokens, "heads": shape.heads, "dim": shape.dim, "dtype": dtype_name(self.layout.dtype)}
        if self.layout.tokens_per_scale > 1:
            kv["tokens_per_scale"] = self.layout.tokens_per_scale
        return {
            **source_facts,
            "format": self.layout.format,
            "k_stage": K_STAGE,
            "layers": list(shape.layers),
            "slots": [list(pair) for pair in sorted(self.slots.items())],
            "predictions": sorted(self._kept_predictions),
            "kv": kv,
            "mask": digest(self.source.background.cpu()),
            "version": __version__,
        }

    @property
    def _kept_predictions(self) -> frozenset[int]:
        """The steps whose predictions a cache on disk has: those of a stored step cost nothing."""
        return self.watched.union(self.steps)

    @property
    def _disk_bytes(self) -> int:
        """About what an entry takes: its steps, the path and the predictions, a page a shard."""
        latents = len(self.source.path.path) + len(self._kept_predictions)
        shards = PAGE * (len(self.steps) + 2)
        background = self.source.background.nbytes
        return self.layout.nbytes * len(self.steps) + latents * self.source.path.start.nbytes + background + shards

    def _run(self, store: KVStore, watched: frozenset[int]) -> dict[int, Tensor]:
        source = self.source
        self.predict.use_background(source.background)
        return run_source(self.predict, source.path, source.prompt, store, watched, self.progress)


def _found(root: CacheRoot, key: str, facts: dict[str, Any]) -> SavedSource | None:
    """The root's entry of a key; one that is of something else is set aside."""
    entry = root.find(key)
    if entry is None:
        return None
    try:
        if {name: entry.meta.get(name) for name in facts} != facts:
            other = first_difference(entry.meta, facts) or "other layers, steps or tokens"
            raise InputError(f"cache '{entry.folder}' was made with {other}")
        return SavedSource(entry, entry.folder)
    except InputError as error:
        root.set_aside(entry, str(error))
        entry.close()
        return None


def read_saved(saved: SavedSource, tier: str, device: torch.device, owned: bool = False) -> StoredSource:
    """A saved source as a store of a tier, copied into memory but for "disk"; owned: close it with the store."""
    predictions = {k: x.to(device, copy=True) for k, x in saved.predictions.items()}
    background = saved.background.to(device, copy=True)
    if tier == "disk":
        store: KVStore = DiskStore(saved.layout, saved.steps, device).opened(saved.entry, owned)
    else:
        store = _copied(saved, tier, device)
    return StoredSource(store, saved.slots, background, predictions)


def _copied(saved: SavedSource, tier: str, device: torch.device) -> KVStore:
    store = (ResidentStore if tier == "resident" else HostStore)(saved.layout, saved.steps, device)
    try:
        for step in saved.steps:
            with store.write(step) as places:
                for key, packed in saved.packed(step).items():
                    places[key].copy_(packed)
        store.written()
    except BaseException:
        store.close()
        raise
    return store


def saved_path(saved: SavedSource, solver: Solver, device: torch.device) -> SourcePath:
    """The source's path, as the pass that made the cache took it."""
    latents = {name: x.to(device, copy=True) for name, x in saved.latents.items()}
    if "path" in latents:
        return SourcePath(latents["path"], latents["path"][0])
    return renoise(latents["clean"], latents["noise"], solver)


def check_saved(saved: SavedSource, facts: dict[str, Any], layers: tuple[int, ...], mask_tokens: Tensor) -> None:
    """Raise InputError naming the reason if the cache cannot serve the edit.

    layers: the layers that the edit locks; mask_tokens: its foreground, bool [1, S].
    """
    name = f"cache '{saved.folder}'"
    different = first_difference(saved.facts, facts)
    if different is not None:
        raise InputError(f"{name} was made with {different}")
    held = saved.layout.shape.layers
    if not set(layers) <= set(held):
        raise InputError(f"{name} holds layers {_ranges(held)} only, and the edit locks {_ranges(layers)}")
    stored = torch.zeros(mask_tokens.shape[1], dtype=torch.bool)
    stored[saved.background] = True
    grown = int((~mask_tokens[0].cpu() & ~stored).sum())
    if grown:
        raise InputError(
            f"{name} does not hold {grown} of the background's tokens: the mask may grow beyond the one it was made "
            "with, but not shrink"
        )


def _path_tensors(path: SourcePath, inverted: bool) -> dict[str, Tensor]:
    """All that is needed to have the path again."""
    named = {"path": path.path} if inverted else {"clean": path.path[-1], "noise": path.noise}
    return {name: x.cpu() for name, x in named.items()}


def _ranges(numbers: tuple[int, ...]) -> str:
    """0-3, 7."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
