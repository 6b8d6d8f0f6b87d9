"""Which jobs share a pass of their source, and in which order the passes come."""

from collections.abc import Iterable, Iterator

from kvlock_fast.batch.jobs import Job, Setup


def grouped(jobs: Iterable[Job], most: int) -> Iterator[list[Job]]:
    """Jobs of one setup, at most `most` together."""
    by_setup: dict[Setup, list[Job]] = {}
    for job in jobs:
        by_setup.setdefault(job.setup, []).append(job)
    for together in by_setup.values():
        for first in range(0, len(together), most):
            yield together[first : first + most]


def ranks(setups: Iterable[Setup]) -> dict[Setup, tuple[int, int, int]]:
    """To sort setups by: model, source, and themselves, each in the order of its first appearance.

    So a model comes once and is loaded once, and so does a source, which is read once.
    """
    models: dict[tuple[str, str], int] = {}
    sources: dict[str, int] = {}
    found: dict[Setup, tuple[int, int, int]] = {}
    for setup in setups:
        model = models.setdefault((setup.model, setup.dtype), len(models))
        found.setdefault(setup, (model, sources.setdefault(setup.source, len(sources)), len(found)))
    return found
