"""A folder of many cache entries by key, shared by any number of processes: found, set aside, evicted by a quota."""

import contextlib
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from kvlock_fast.cache import litter, manifest
from kvlock_fast.cache.entry import DamagedCache, Entry, EntryWriter, MissingCache
from kvlock_fast.cache.litter import Lease
from kvlock_fast.errors import InputError, InputWarning, OutputError

TAG = "CACHEDIR.TAG"
_TAG_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n# Backup programs leave this folder out: a kvlock_fast cache.\n"
)
_KEY = re.compile(r"[0-9a-z][0-9a-z-]{0,127}")


@dataclass(frozen=True)
class Slot:
    """What `CacheRoot.slots` tells of an entry's folder. used: when it was last found, in seconds since 1970."""

    folder: Path
    nbytes: int
    used: float
    aside: bool
    in_use: bool


class CacheRoot:
    """The entries of a folder, each in a sub-folder named by its key (0-9, a-z and -).

    quota_bytes: what `make_room` keeps to; None for no limit. To make one removes what dead processes left in it.
    Raises OutputError if the folder is not there and cannot be made.
    """

    def __init__(self, path: str | os.PathLike, quota_bytes: int | None = None):
        self.path, self.quota_bytes = Path(path), quota_bytes
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write the cache '{self.path}': {error.strerror or error}") from error
        if not litter.is_root(self.path):
            with contextlib.suppress(OSError):
                (self.path / litter.TAG).write_text(litter.TAG_TEXT)
        self.sweep()

    def sweep(self) -> None:
        """Remove what dead processes left."""
        for folder in self._folders():
            litter.sweep(folder)
            with contextlib.suppress(OSError):
                folder.rmdir()

    def find(self, key: str) -> Entry | None:
        """The entry of a key, which is not evicted until it is closed; None if there is none that is whole.

        A damaged one is set aside with a warning: it is not looked at again, and the next one written replaces it.
        """
        folder = self._folder(key)
        if not (folder / manifest.NAME).exists() or litter.why_aside(folder) is not None:
            return None
        entry = lease = None
        try:
            lease = _lease(folder)
            entry = Entry.open(folder, lease)
            with contextlib.suppress(OSError):
                os.utime(folder / manifest.NAME)
        except (FileNotFoundError, MissingCache):
            pass  # evicted meanwhile
        except DamagedCache as error:
            if error.manifest is not None:
                litter.set_aside(folder, error.manifest, str(error))
            warnings.warn(InputWarning(f"{error}; it is set aside"), stacklevel=2)
        except InputError as error:
            warnings.warn(InputWarning(f"{error}; the cache is not used"), stacklevel=2)
        finally:
            if entry is None and lease is not None:
                lease.release()
        return entry

    def writer(self, key: str) -> EntryWriter:
        """To write the entry of a key; what is there already stays until the new one is published."""
        return EntryWriter(self._folder(key))

    def make_room(self, nbytes: int) -> None:
        """Evict until `nbytes` more fit the quota: what is set aside first, then what was least recently used.

        What is in use stays. Processes that make room at once may overshoot together. Raises OutputError, with nothing
        evicted, if so much cannot be freed.
        """
        if self.quota_bytes is None:
            return
        slots = self.slots()
        excess = sum(slot.nbytes for slot in slots) + nbytes - self.quota_bytes
        idle = [slot for slot in slots if not slot.in_use]
        if excess > sum(slot.nbytes for slot in idle):
            kept = sum(slot.nbytes for slot in slots if slot.in_use)
            raise OutputError(
                f"the cache '{self.path}' has no room for {nbytes} bytes: its quota is {self.quota_bytes} bytes, "
                f"and {kept} bytes are in use"
            )
        for slot in sorted(idle, key=lambda slot: (not slot.aside, slot.used)):
            if excess <= 0:
                return
            excess -= litter.remove_entry(slot.folder) or 0

    def slots(self) -> list[Slot]:
        """All entries, in the order of their keys."""
        slots = []
        for folder in self._folders():
            with contextlib.suppress(FileNotFoundError):
                slots.append(slot_of(folder))
        return slots

    def _folders(self) -> list[Path]:
        return [path for path in sorted(self.path.iterdir()) if _KEY.fullmatch(path.name) and path.is_dir()]

    def _folder(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"a cache key has 0-9, a-z and - only, and at most 128, got '{key}'")
        return self.path / key


def slot_of(folder: Path) -> Slot:
    """Raises FileNotFoundError if the folder is gone."""
    used = 0.0
    with contextlib.suppress(FileNotFoundError):
        used = (folder / manifest.NAME).stat().st_mtime
    aside = litter.why_aside(folder) is not None
    return Slot(folder, litter.disk_bytes(folder), used, aside, litter.any_live(folder, "lease"))


def _lease(folder: Path) -> Lease | None:
    """None where nothing can be written, and so by this process nothing evicted."""
    try:
        return Lease(folder)
    except FileNotFoundError:
        raise
    except OSError:
        return None
