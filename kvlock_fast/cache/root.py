"""A folder of many cache entries by key, shared by any number of processes: found, set aside, evicted by a quota."""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from kvlock_fast.cache import leases, manifest
from kvlock_fast.cache.entry import Entry, EntryWriter
from kvlock_fast.cache.manifest import DamagedCache, MissingCache
from kvlock_fast.errors import InputError, OutputError, os_errors, warn

_KEY = re.compile(r"[0-9a-z][0-9a-z-]{0,127}")


@dataclass(frozen=True)
class Slot:
    """An entry's folder as `CacheRoot.slots` finds it. used: when it was last found, in seconds since 1970."""

    folder: Path
    nbytes: int
    used: float
    aside: bool
    in_use: bool


class CacheRoot:
    """The entries of a folder, each in a sub-folder named by its key (0-9, a-z and -).

    quota_bytes: what `make_room` keeps to; None for no limit. To make one removes what dead processes left in it.
    Raises OutputError if the folder cannot be made or read.
    """

    def __init__(self, path: str | os.PathLike, quota_bytes: int | None = None):
        self.path, self.quota_bytes = Path(path), quota_bytes
        with os_errors(f"cannot use the cache '{self.path}'"):
            self.path.mkdir(parents=True, exist_ok=True)
            ours = not any(self.path.iterdir())  # else it is a folder of the user's, in which we have entries
            self.sweep()
        if ours:
            with contextlib.suppress(OSError):
                (self.path / leases.TAG).write_text(leases.TAG_TEXT)

    def sweep(self) -> None:
        """Remove what dead processes left. What carries no mark of ours is left as it is."""
        all_ours = leases.is_root(self.path, leases.TAG_TEXT)
        for folder in self._folders():
            with contextlib.suppress(OSError):
                ours = all_ours or leases.is_entry(folder) or bool(leases.owned(folder, "lease", "evict"))
                leases.sweep(folder)
                if ours:
                    folder.rmdir()

    def find(self, key: str) -> Entry | None:
        """The entry of a key, which is not evicted until it is closed; None if there is none that is whole.

        A damaged one is set aside with a warning: it is not looked at again, and the next one written replaces it.
        """
        folder = self._folder(key)
        try:
            if not (folder / manifest.NAME).exists() or leases.why_aside(folder) is not None:
                return None
            entry = Entry.open(folder)
        except MissingCache:
            return None  # evicted meanwhile
        except DamagedCache as error:
            if error.manifest is not None:
                leases.set_aside(folder, error.manifest, str(error))
            warn(f"{error}; it is set aside")
            return None
        except (InputError, OSError) as error:
            warn(f"{error}; it is not used")
            return None
        with contextlib.suppress(OSError):
            os.utime(folder / manifest.NAME)
        return entry

    def set_aside(self, entry: Entry, reason: str) -> None:
        """Set aside, with a warning, an entry that was found whole but is not what its key says."""
        leases.set_aside(entry.folder, entry.digest, reason)
        warn(f"the cache '{entry.folder}' is set aside: {reason}")

    def writer(self, key: str) -> EntryWriter:
        """Make the writer of a key's entry; what is there already stays until the new one is published."""
        return EntryWriter(self._folder(key))

    def make_room(self, nbytes: int) -> None:
        """Evict until `nbytes` more fit the quota: what is set aside first, then what was least recently used.

        What is in use stays. Processes that make room at once may overshoot together. Raises OutputError if so much
        cannot be freed, as a rule with nothing evicted.
        """
        if self.quota_bytes is None:
            return
        slots = self.slots()
        excess = sum(slot.nbytes for slot in slots) + nbytes - self.quota_bytes
        idle = [slot for slot in slots if not slot.in_use]
        if excess <= sum(slot.nbytes for slot in idle):
            for slot in sorted(idle, key=lambda slot: (not slot.aside, slot.used)):
                if excess > 0:
                    excess -= leases.remove_entry(slot.folder) or 0
        if excess > 0:
            kept = sum(slot.nbytes for slot in self.slots())
            raise OutputError(
                f"the cache '{self.path}' has no room for {nbytes} bytes: its quota is {self.quota_bytes} bytes, "
                f"and of the {kept} bytes in it too many are in use"
            )

    def slots(self) -> list[Slot]:
        """All entries, in the order of their keys."""
        slots = []
        for folder in self._folders():
            with contextlib.suppress(FileNotFoundError, PermissionError):  # gone, or another user's own
                if leases.is_entry(folder):
                    slots.append(slot_of(folder))
        return slots

    def _folders(self) -> list[Path]:
        return [path for path in sorted(self.path.iterdir()) if _KEY.fullmatch(path.name) and path.is_dir()]

    def _folder(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"a cache key has 0-9, a-z and - only, and at most 128, got '{key}'")
        return self.path / key


def slot_of(folder: Path) -> Slot:
    """Look at an entry's folder. Raises FileNotFoundError if it is gone."""
    used = 0.0
    with contextlib.suppress(FileNotFoundError):
        used = (folder / manifest.NAME).stat().st_mtime
    aside = leases.why_aside(folder) is not None
    return Slot(folder, leases.disk_bytes(folder), used, aside, leases.any_live(folder, "lease"))
