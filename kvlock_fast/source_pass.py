"""The source's own pass through the model: its keys and values, and what it predicted, kept for the edits."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from kvlock_fast.cache.store import KVStore
from kvlock_fast.conditioning import Conditioning
from kvlock_fast.forwards import Predictor
from kvlock_fast.models.locking import Mode
from kvlock_fast.nvtx import span
from kvlock_fast.source import SourcePath


@dataclass(frozen=True)
class StoredSource:
    """What a pass of the source has left.

    slots: for each step whose K and V are there, the stored step that stands for it (itself, or a neighbour by the
    step stride). background: indices [N] of the tokens that are stored. predictions: the source's predictions
    [1, C, T, H, W], where they were kept.
    """

    store: KVStore
    slots: dict[int, int]
    background: Tensor
    predictions: dict[int, Tensor] = field(default_factory=dict)

    def covers(self, k: int, locks: bool, compares: bool) -> bool:
        """Whether step k needs no forward of the source: if it locks, and if it compares with its predictions."""
        return (k in self.slots or not locks) and (k in self.predictions or not compares)


def thinned_steps(locked: Iterable[int], stride: int, stage: Callable[[int], int]) -> dict[int, int]:
    """For each locked step the step that is stored for it: of every `stride` in a row, in one stage, the middle one.

    Of two in the middle the earlier. By bench/cache.py the first or last of four costs ten times the error; the later
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
    """One forward of the source for each stored and each watched step; the predictions of the watched ones."""
    predictions = {}
    steps = sorted(watched.union(store.steps))
    for done, k in enumerate(steps, start=1):
        with store.write(k) if k in store.steps else nullcontext() as places:
            mode = Mode.OFF if places is None else Mode.CAPTURE
            with span("forward source"):
                prediction = predict(k, source.at(k), source_prompt, mode, kept=places)
        if k in watched:
            predictions[k] = prediction
        progress(done, len(steps))
    store.written()
    return predictions
