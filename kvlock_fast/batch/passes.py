"""The passes that wait, and which of them a worker gets."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from kvlock_fast.batch.jobs import Pass


class Waiting:
    """Passes in their order, each given to the worker that has its source if that can be."""

    def __init__(self, passes: Iterable[Pass]):
        self.passes = list(passes)

    def __len__(self) -> int:
        return len(self.passes)

    def add(self, passes: Iterable[Pass]) -> None:
        """At the end: what failed or crashed comes after what was not tried."""
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
