"""A job of a batch: one prompt on one source, and all that decides how its frames come out.

`grouped` says which jobs share a pass of their source, `ranks` in which order the passes come, and `Waiting` which of
the passes that wait a worker gets.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.settings import EditSettings, Finish, Inputs, MaskShape, RunConfig

if TYPE_CHECKING:
    from kvlock_fast.loop.windows import Windows


@dataclass(frozen=True)
class Setup(RunConfig, Inputs):
    """Everything that decides what the model computes for a job. Jobs of equal setups can share a pass."""

    def windows(self) -> Windows | None:
        """Cut of a long clip; None where it is not cut. Raises InputError where it cannot be."""
        from kvlock_fast.loop.windows import asked_for

        return asked_for(self.clip_frames, self.clip_overlap)

    def edit_settings(self, prompts: list[str]) -> EditSettings:
        """Settings for the room `edit`."""
        values = {f.name: getattr(self, f.name) for f in fields(RunConfig)}
        return EditSettings(**values, prompts=prompts)


@dataclass(frozen=True)
class Job:
    """id: its name in the ledger; output: a file name below the output folder; setup: what the model computes; finish:
    what is done with that; line: where the manifest has it.
    """

    id: str
    prompt: str
    output: str
    setup: Setup
    finish: Finish = field(default_factory=Finish)
    line: int = field(default=0, compare=False)

    def edit_settings(self) -> EditSettings:
        """Settings for the room `edit`."""
        return replace(self.setup.edit_settings([self.prompt]), **vars(self.finish))

    def spec(self) -> str:
        """All of the job as JSON, the same text for the same job."""
        own = {"id": self.id, "prompt": self.prompt, "output": self.output}
        return json.dumps({**own, **asdict(self.finish), **asdict(self.setup)})

    @classmethod
    def from_spec(cls, text: str) -> Job:
        """The job of such a text."""
        data: dict[str, Any] = json.loads(text)
        own = {name: data.pop(name) for name in ("id", "prompt", "output")}
        finish = Finish(**{f.name: data.pop(f.name) for f in fields(Finish) if f.name in data})
        data["size"] = None if data["size"] is None else tuple(data["size"])
        for name, kind in (("lock", LockConfig), ("cache", CacheConfig), ("mask_shape", MaskShape)):
            data[name] = kind(**data.get(name, {}))
        return cls(**own, setup=Setup(**data), finish=finish)


@dataclass(frozen=True)
class Decision:
    """Choice of how a pass is run: tier and format of the source's K and V, and prompts in one batch.

    ladder: whether even one prompt at a time was too much, and smaller ways are tried by the pipeline.
    """

    tier: str
    format: str
    at_once: int
    ladder: bool = False


@dataclass(frozen=True)
class Pass:
    """One run of a source with its prompts: jobs in fixed places, so that a repetition computes the same frames.

    places: the job of each place, None where one was taken away; missing: ids of the jobs to be done; decision: of the
    run that first had a result; crashes: how often a worker died with it.
    """

    id: int
    places: tuple[Job | None, ...]
    missing: frozenset[str]
    decision: Decision | None = None
    crashes: int = 0

    @property
    def setup(self) -> Setup:
        return self.jobs[0].setup

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Jobs to be done."""
        return tuple(job for job in self.places if job is not None and job.id in self.missing)

    def rows(self, at_once: int) -> list[Job]:
        """Rows that go through the model, with `at_once` prompts in a batch: whole batches that lack a result.

        Jobs that are done keep their place as padding, and an empty place has the first job's prompt: how a batch is
        rounded depends on how many rows it has.
        """
        first, rows = self.jobs[0], []
        for start in range(0, len(self.places), at_once):
            batch = [job or first for job in self.places[start : start + at_once]]
            if any(job is not None and job.id in self.missing for job in self.places[start : start + at_once]):
                rows += batch
        return rows


def grouped(jobs: Iterable[Job], most: int) -> Iterator[list[Job]]:
    """Jobs of one setup, at most `most` together."""
    by_setup: dict[Setup, list[Job]] = {}
    for job in jobs:
        by_setup.setdefault(job.setup, []).append(job)
    for together in by_setup.values():
        for first in range(0, len(together), most):
            yield together[first : first + most]


def ranks(setups: Iterable[Setup]) -> dict[Setup, tuple[int, int, int]]:
    """Keys to sort setups by: model, source, and themselves, each in the order of its first appearance.

    So a model comes once and is loaded once, and so does a source, which is read once.
    """
    models: dict[tuple[str, str], int] = {}
    sources: dict[str, int] = {}
    found: dict[Setup, tuple[int, int, int]] = {}
    for setup in setups:
        model = models.setdefault((setup.model, setup.dtype), len(models))
        found.setdefault(setup, (model, sources.setdefault(setup.source, len(sources)), len(found)))
    return found


class Waiting:
    """Passes in their order, each given to the worker that has its source if that can be."""

    def __init__(self, passes: Iterable[Pass]):
        self.passes = list(passes)

    def __len__(self) -> int:
        return len(self.passes)

    def add(self, passes: Iterable[Pass]) -> None:
        """Add at the end: what failed or crashed comes after what was not tried."""
        self.passes += passes

    def take(self, held: str | None, elsewhere: Collection[str], idle: bool) -> Pass | None:
        """The next pass for a worker that holds a source; None if there is none for it now.

        Its own source comes first, then one that no other worker holds, then any. A pass that a worker died with runs
        alone, so it waits for one that is idle: or those beside it would be blamed too.
        """
        allowed = [work for work in self.passes if idle or not work.crashes]
        if not allowed:
            return None
        found = next((work for work in allowed if work.setup.source == held), None)
        found = found or next((work for work in allowed if work.setup.source not in elsewhere), allowed[0])
        self.passes.remove(found)
        return found
