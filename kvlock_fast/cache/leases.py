"""Files in an entry's folder beside the entry itself: whose they are, who reads, and what may go.

    manifest.json                   the entry
    data-<owner>-<hex>/             its shards, or those of an entry being written, or of one that is superseded
      published                     a mark: the manifest has named this folder
    manifest-<owner>-<hex>.json     a manifest before its rename
    lease-<owner>-<hex>             this process reads or writes here: nothing is evicted
    evict-<owner>-<hex>             this process is about to evict: nothing is opened
    trash-<owner>-<hex>/            on its way out
    damaged-<digest>.txt            the manifest with this digest is set aside; the text says why

Any process may remove what a dead one left. All else is left as it is, so an entry can live among other files.

File locks are not trusted, as network file systems pretend to have them: an owner in a name says which process wrote
this, and whether it still runs. `<owner>` is `<machine>.<pid>.<start>`: the machine is a hash of the boot and of the
space of process ids, and the start of a process tells it from a later one with the same id.
"""

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from kvlock_fast import owner
from kvlock_fast.cache import manifest
from kvlock_fast.errors import InputError, os_errors

_OWNED = re.compile(rf"([a-z]+)-({owner.TOKEN})-[0-9a-f]{{16}}(?:\.json)?")


def owned_name(kind: str, suffix: str = "") -> str:
    """A new name that says whose it is."""
    return f"{kind}-{owner.token()}-{secrets.token_hex(8)}{suffix}"


def kind_of(name: str) -> str | None:
    """The kind of an owned name; None for any other."""
    match = _OWNED.fullmatch(name)
    return match and match[1]


def owner_lives(path: Path) -> bool:
    """Whether the process that the owned name at `path` names may still run."""
    match = _OWNED.fullmatch(path.name)
    return match is not None and owner.lives(match[2], path)


PUBLISHED = "published"
TAG = "CACHEDIR.TAG"
"""A file in the folder of several entries; its name and first line are known to backup programs."""
TAG_OF_0_1 = "Signature: 8a477f597d28d172789f06886806bc55\n# A kvlock_fast cache; backup programs leave it out.\n"
"""Version 0.1 put it into folders of the user's too, so what else is in them may be anybody's."""
TAG_TEXT = f"{TAG_OF_0_1}# The program made this folder, and all that is in it.\n"

_MARK = re.compile(r"damaged-([0-9a-f]{32})\.txt")
_EVICTION_SECONDS = 30
"""The longest wait for another process to finish an eviction, which takes milliseconds."""


class Lease:
    """A mark that keeps an entry from being evicted until it is released, or this process ends."""

    def __init__(self, folder: Path):
        """Lease. Raises FileNotFoundError if the folder is gone, other OSErrors, InputError after too long a wait."""
        self._pid = os.getpid()
        end = time.monotonic() + _EVICTION_SECONDS
        # Said before it is looked: of a reader and an evictor that come at once, at least one sees the other.
        while True:
            self._path = folder / owned_name("lease")
            self._path.touch(exist_ok=False)
            if not any_live(folder, "evict"):
                return
            self.release()
            if time.monotonic() > end:
                raise InputError(f"cannot use the cache '{folder}': another process has been removing it for too long")
            time.sleep(0.005)

    def release(self) -> None:
        # A forked child has the object too, but not the lease.
        if os.getpid() == self._pid:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


def any_live(folder: Path, kind: str) -> bool:
    """Whether something of this kind lies here whose owner may still run."""
    return any(owner_lives(path) for path in owned(folder, kind))


def owned(folder: Path, *kinds: str) -> list[Path]:
    """Files and folders that lie here under an owned name of these kinds."""
    return [path for path in sorted(folder.iterdir()) if kind_of(path.name) in kinds]


def sweep(folder: Path) -> None:
    """Remove what dead processes left, and data that were published and are superseded. Silent about what it cannot."""
    with contextlib.suppress(OSError):
        found = owned(folder, "data", "manifest", "lease", "evict", "trash")
        marks = _marks(folder)
        # In this order: data that are marked as published, or whose writer is dead, can no longer become the
        # entry's, so if a manifest read after that does not name them, none will.
        idle = [path for path in found if _is_done(path) or not owner_lives(path)]
        data = [path for path in idle if kind_of(path.name) == "data"]
        for path in _superseded(folder, data):
            discard(path)
        for path in set(idle) - set(data):
            _remove(path)
        current = manifest.digest_of(_current(folder))
        for digest, mark in marks.items():
            if digest != current:
                mark.unlink(missing_ok=True)


def _superseded(folder: Path, data: list[Path]) -> list[Path]:
    """The data folders that the manifest does not name; none while it is damaged or another entry's."""
    try:
        named = folder / manifest.read(folder)[0].data
    except manifest.MissingCache:
        return data
    except InputError:
        return []
    return [path for path in data if path != named] if named.is_dir() else []


def _is_done(path: Path) -> bool:
    return kind_of(path.name) == "trash" or (path / PUBLISHED).exists()


def _current(folder: Path) -> bytes:
    """The bytes of the manifest, empty if there is none."""
    with contextlib.suppress(FileNotFoundError, InputError):
        return manifest.read_bytes(folder)
    return b""


def is_root(folder: Path, *tags: str) -> bool:
    """Whether a `CacheRoot` was made of this folder; tags: as these versions mark it, none for any."""
    try:
        return (folder / TAG).read_text(errors="replace") in (tags or (TAG_TEXT, TAG_OF_0_1))
    except OSError:
        return False


def is_entry(folder: Path) -> bool:
    """Whether this is an entry's folder, whole or damaged: something in it carries our mark.

    A manifest.json alone may be another program's: it counts where it is one of ours to the last bit.
    """
    if owned(folder, "data", "manifest", "trash") or _marks(folder):
        return True
    with contextlib.suppress(InputError):
        manifest.read(folder)
        return True
    return False


def remove_entry(folder: Path) -> int | None:
    """Remove an entry, its litter, and its folder if nothing else is in it: the bytes freed; None if it is in use.

    Raises OutputError if it cannot be removed.
    """
    freed = 0
    with os_errors(f"cannot remove the cache '{folder}'"):
        with contextlib.suppress(FileNotFoundError), _claim(folder) as unused:
            if not unused:
                return None
            freed = disk_bytes(folder)
            (folder / manifest.NAME).unlink(missing_ok=True)
            for path in owned(folder, "data"):
                with contextlib.suppress(FileNotFoundError):
                    _to_trash(path)
            # A lease may have come since: who took it waits, or finds no manifest.
            dead = [path for path in owned(folder, "manifest", "lease") if not owner_lives(path)]
            for path in [*_marks(folder).values(), *dead]:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for path in owned(folder, "trash"):
                _remove(path)
            folder.rmdir()
    return freed


@contextlib.contextmanager
def _claim(folder: Path) -> Iterator[bool]:
    """Whether nobody uses the entry; while it is claimed, nobody will."""
    intent = folder / owned_name("evict")
    intent.touch(exist_ok=False)
    try:
        yield not any_live(folder, "lease")
    finally:
        intent.unlink(missing_ok=True)


def discard(data: Path) -> None:
    """Remove a data folder, in one step for those who look."""
    with contextlib.suppress(OSError):
        _remove(_to_trash(data))


def _to_trash(path: Path) -> Path:
    return path.rename(path.with_name(owned_name("trash")))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def set_aside(folder: Path, digest: str, reason: str) -> None:
    """Mark the manifest with this digest as damaged. A later one is not concerned, whoever writes it."""
    with contextlib.suppress(OSError):
        (folder / f"damaged-{digest}.txt").write_text(reason)


def why_aside(folder: Path) -> str | None:
    """Why the entry is set aside; None if it is not."""
    with contextlib.suppress(OSError):
        if marks := _marks(folder):
            mark = marks.get(manifest.digest_of(_current(folder)))
            return None if mark is None else mark.read_text(errors="replace")
    return None


def _marks(folder: Path) -> dict[str, Path]:
    """The marks of damaged manifests, by the manifest's digest."""
    return {match[1]: path for path in folder.iterdir() if (match := _MARK.fullmatch(path.name))}


def disk_bytes(folder: Path) -> int:
    """Total length of all files of an entry's folder that are the cache's."""
    paths = [folder / manifest.NAME, *_marks(folder).values(), *owned(folder, "data", "manifest", "trash")]
    return sum(map(_length, paths))


def _length(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 for what has just gone."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir():
            return sum(_length(item) for item in path.iterdir())
        return path.stat().st_size
    return 0
