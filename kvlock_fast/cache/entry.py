"""A cache entry on disk: a folder with a manifest and, in a folder of their own, shards of tensors.

An entry is written beside the one that is there and takes its place by the rename of its manifest, so whoever opens it
finds the old or the new one, whole, whatever else happens at the time. Nothing is locked.
"""

import contextlib
import os
import shutil
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kvlock_fast.cache import manifest
from kvlock_fast.cache.leases import PUBLISHED, Lease, is_entry, owned_name, sweep
from kvlock_fast.cache.manifest import SHARD_NAME, DamagedCache, Manifest, MissingCache, ShardRecord
from kvlock_fast.cache.shard import MappedShard, write_shard
from kvlock_fast.errors import InputError, OutputError, os_errors
from kvlock_fast.files import fsync

if TYPE_CHECKING:
    from torch import Tensor

_THREADS = min(8, os.cpu_count() or 1)


class EntryWriter:
    """Writes an entry into a folder, which may exist and hold other files:

        with EntryWriter(folder) as writer:
            writer.add_shard("step-000", tensors)
            writer.publish({"steps": 50})

    If the block ends without `publish`, all that was written is removed. Every method raises OutputError, naming the
    folder, if it cannot be written: disk full, no permission, a file of that name.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._failure = f"cannot write the cache '{folder}'"
        self._shards: dict[str, ShardRecord] = {}
        self._published = False

    def __enter__(self) -> Self:
        self._made = not self.folder.exists()
        self._data = self.folder / owned_name("data")
        self._temporary = self.folder / owned_name("manifest", ".json")
        self._lease: Lease | None = None
        try:
            with os_errors(self._failure):
                self._lease = _lease_in_new_folder(self.folder)
                sweep(self.folder)
                if (self.folder / manifest.NAME).exists() and not is_entry(self.folder):
                    raise OutputError(f"{self._failure}: its {manifest.NAME} is not a cache's, or is damaged")
                self._data.mkdir()
        except BaseException:
            self._clean_up()
            raise
        self._hashing = ThreadPoolExecutor(1)
        return self

    def add_shard(self, name: str, tensors: Mapping[str, "Tensor"]) -> None:
        """Write `<name>.safetensors`; the tensors' bytes are hashed meanwhile.

        Raises ValueError for a name that is not plain or is taken, and for a dtype that safetensors files do not hold.
        """
        if not SHARD_NAME.fullmatch(name):
            raise ValueError(f"a shard's name has letters, digits, - and _ only, and at most 64, got '{name}'")
        if name in self._shards:
            raise ValueError(f"there is a shard '{name}' already")
        with os_errors(self._failure):
            self._shards[name] = write_shard(_shard_path(self._data, name), tensors, self._hashing)

    def publish(self, meta: Mapping[str, Any]) -> None:
        """Make what was added the folder's entry, once it is on the disk for certain; meta: anything that is JSON."""
        if self._published:
            raise ValueError("the entry has been published already")
        content = Manifest(meta=dict(meta), data=self._data.name, shards=self._shards).serialise()
        with os_errors(self._failure):
            fsync(self._data)
            self._temporary.write_bytes(content)
            fsync(self._temporary)
            self._temporary.replace(self.folder / manifest.NAME)
            self._published = True
            fsync(self.folder)
            fsync(self.folder.parent)
        sweep(self.folder)

    def __exit__(self, *_: object) -> None:
        self._hashing.shutdown()
        self._clean_up()

    def _clean_up(self) -> None:
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)
        # By the manifest, not by what `publish` got to say before it was interrupted.
        if _names(self.folder, self._data):
            with contextlib.suppress(OSError):
                (self._data / PUBLISHED).touch()
        else:
            shutil.rmtree(self._data, ignore_errors=True)
        if self._lease is not None:
            self._lease.release()
        if self._made and not self._published:
            with contextlib.suppress(OSError):
                self.folder.rmdir()


class Entry(contextlib.AbstractContextManager["Entry"]):
    """An entry that was found whole, mapped into memory; from `Entry.open`. Can be used in a `with`.

    Its tensors, and those taken from it after it is closed, stay readable whoever replaces or removes the files.
    To write into them changes no file.
    """

    def __init__(
        self, folder: Path, meta: dict[str, Any], digest: str, shards: dict[str, MappedShard], lease: Lease | None
    ):
        self.folder, self.meta, self.digest = folder, meta, digest
        self._shards = shards
        self.nbytes = sum(shard.nbytes for shard in shards.values())
        """Bytes of the shards' files."""
        self._release = weakref.finalize(self, lease.release) if lease else None

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Self:
        """Map an entry after every byte of it was compared with what was written. It is not evicted until `close`.

        Raises:
            MissingCache: there is none.
            DamagedCache: a file is not what was written; the message says which.
            InputError: a file cannot be read.
        """
        folder = Path(folder)
        lease = _lease_of_entry(folder)
        try:
            content, digest, shards = _map(folder)
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        return cls(folder, content.meta, digest, shards, lease)

    @staticmethod
    def read_meta(folder: str | os.PathLike) -> dict[str, Any]:
        """Read what the writer said of an entry, without a look at its shards. Raises as `open` does."""
        return manifest.read(Path(folder))[0].meta

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the shards, sorted."""
        return tuple(sorted(self._shards))

    def tensors(self, shard: str) -> dict[str, "Tensor"]:
        """The tensors of a shard, on the CPU, without a copy. Raises KeyError for no such shard."""
        return self._shards[shard].tensors()

    def close(self, *_: object) -> None:
        """Let the entry go: it can be evicted, and its memory is free when the last of its tensors is."""
        self._shards = {}
        if self._release is not None:
            self._release()

    __exit__ = close


def _map(folder: Path) -> tuple[Manifest, str, dict[str, MappedShard]]:
    """The manifest, its digest, and the shards that it names, of one and the same entry."""
    while True:
        content, digest = manifest.read(folder)
        path = data = folder / content.data
        try:
            shards = {}
            for name, records in content.shards.items():
                path = _shard_path(data, name)
                shards[name] = MappedShard(path, records)
            # Several at once: hashing and the disk's reads run without the interpreter's lock.
            with ThreadPoolExecutor(max(1, min(_THREADS, len(shards)))) as pool:
                list(pool.map(MappedShard.verify, shards.values()))
            return content, digest, shards
        except DamagedCache as error:
            error.manifest = digest
            raise
        except FileNotFoundError:
            # Superseded or evicted a moment ago, unless the manifest is still the same.
            if manifest.read(folder)[1] == digest:
                raise DamagedCache(path, "it is missing", digest) from None
        except OSError as error:
            raise InputError(f"cannot read '{path}': {error.strerror or error}") from error


def _shard_path(data: Path, name: str) -> Path:
    return data / f"{name}.safetensors"


def _lease_of_entry(folder: Path) -> Lease | None:
    """Lease an entry and remove what dead processes left; None where nothing can be written. Raises MissingCache.

    What is not there is missing, even if another process writes it the next moment: it would be read without a lease.
    """
    try:
        lease = Lease(folder) if (folder / manifest.NAME).exists() else None
    except FileNotFoundError:
        lease = None
    except OSError:
        return None
    if lease is None:
        raise MissingCache(folder)
    sweep(folder)
    return lease


def _lease_in_new_folder(folder: Path) -> Lease:
    """Make the folder, unless it is there, and lease it before another process takes it for litter."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return Lease(folder)


def _names(folder: Path, data: Path) -> bool:
    """Whether the folder's manifest, even if damaged, names this data folder, as far as can be seen."""
    try:
        return data.name.encode() in manifest.read_bytes(folder)
    except (FileNotFoundError, NotADirectoryError, InputError):
        return False
    except OSError:
        return True
