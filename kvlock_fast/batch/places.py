"""Paths and URLs of a batch: where results go, what fsspec reads and writes, and what interrupted runs left.

A path without a scheme is local, and `file://` is the same. Everything else (`memory://`, `s3://`, ...) goes through
fsspec, whose packages for a scheme are the user's to install.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from filelock import BaseFileLock, FileLock, Timeout

from kvlock_fast.batch.fields import short
from kvlock_fast.errors import InputError, OutputError, OutputLost, one_line, os_errors, warn
from kvlock_fast.files import is_abandoned, output_folder, write_bytes
from kvlock_fast.media import ENCODERS, STILLS

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

LEDGER = "ledger.sqlite"


def held(folder: Path, refusal: str) -> BaseFileLock:
    """Return the lock of a folder; the system lets it go when the process ends, however it does.

    Raises InputError with the refusal where another process holds it, OutputError where it cannot be made.
    """
    path = folder / ".ledger.lock"
    with os_errors(f"cannot write '{folder}'"):
        path.touch()
    # A soft lock would outlive a killed process.
    lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(refusal) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise OutputError(f"cannot lock '{path}': {error.strerror or error}") from error
        warn(f"'{folder}' has no file locks ({error.strerror or error}): let one batch at a time write there")
    return lock


def remove_litter(folder: Path) -> int:
    """Remove files below a folder that a process had half written when it ended; how many there were."""
    found = [path for path in folder.rglob(".kvlock-*") if path.is_file() and is_abandoned(path)]
    for path in found:
        with contextlib.suppress(OSError):  # another program's, which was quicker
            path.unlink()
    return len(found)


_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")


def is_remote(place: str) -> bool:
    """Whether it is a URL of something else than a local file."""
    match = _SCHEME.match(place)
    return match is not None and match[1].lower() not in ("file", "local")


def local_path(place: str, base: Path) -> Path:
    """Turn a path (relative to `base`) or file://... into a local path."""
    if _SCHEME.match(place):
        return Path(unquote(urlsplit(place).path))
    return base / place


def is_there(place: str, base: Path) -> bool:
    """Whether there is a file or folder. Raises InputError where that cannot be found out."""
    if not is_remote(place):
        try:
            return local_path(place, base).exists()
        except (OSError, ValueError):  # a name that no file can have
            return False
    with _said(place):
        system, path = _remote(place)
        return bool(system.exists(path))


@contextmanager
def fetched(place: str, base: Path) -> Iterator[Path]:
    """A local path of it; what is remote is copied into a temporary folder while the context is open.

    Raises InputError where it cannot be fetched.
    """
    if not is_remote(place):
        yield local_path(place, base)
        return
    folder = Path(tempfile.mkdtemp(prefix="kvlock-"))
    try:
        target = folder / (Path(urlsplit(place).path).name or "file")
        with _said(place):
            system, path = _remote(place)
            if not system.exists(path):
                raise InputError(f"'{place}' does not exist")
            system.get(path, str(target), recursive=system.isdir(path))
        yield target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Results:
    """A folder or URL for finished files. A file appears whole or not at all."""

    def __init__(self, place: str):
        """Make the folder. Raises InputError where nothing can be written."""
        self.place = place.rstrip("/") or place
        self.system: AbstractFileSystem | None = None
        if is_remote(place):
            with _said(place):
                self.system, self.root = _remote(self.place)
                self.system.makedirs(self.root, exist_ok=True)
        else:
            self.folder = output_folder(local_path(place, Path()))

    def write(self, name: str, data: bytes) -> None:
        """Put a file. Raises OutputError, OutputLost where no file can be put any more."""
        if self.system is None:
            path = self.folder / name
            self._check_there(path)
            output_folder(path.parent)
            if not path.resolve().is_relative_to(self.folder.resolve()):  # by a link made since the check
                raise OutputError(f"cannot write '{path}': it leads out of '{self.folder}'")
            write_bytes(path, data)
            return
        path = f"{self.root}/{name}"
        with _said(path, OutputLost):  # a network or a store that fails once fails for the next file too
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            # Object stores show an object when it is whole.
            self.system.pipe_file(path, data)

    def _check_there(self, path: Path) -> None:
        with os_errors(f"cannot write '{path}'", OutputLost):
            if not self.folder.is_dir():
                raise OutputLost(f"cannot write '{path}': the folder '{self.folder}' was removed")

    def check_takes_files(self) -> None:
        """Raise OutputLost where a local folder takes no file of any name."""
        if self.system is None:
            try:
                self._check_there(self.folder)
                output_folder(self.folder)
            except OutputError as error:
                raise OutputLost(str(error)) from error

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""
        if self.system is None:
            path = self.folder / name
            return path.stat().st_size if path.is_file() else None
        path = f"{self.root}/{name}"
        with _said(path):
            return self.system.size(path) if self.system.isfile(path) else None

    def url(self, name: str) -> str:
        """Address of a file for a link from the page in the output folder: relative where the file lies there."""
        return name if self.system is None else f"{self.place}/{name}"


def _remote(place: str) -> tuple[AbstractFileSystem, str]:
    import fsspec

    return fsspec.core.url_to_fs(place)


@contextmanager
def _said(place: str, kind: type[InputError] = InputError) -> Iterator[None]:
    """Raise whatever a file system raises as one sentence about the place."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise kind(f"'{place}' cannot be reached: {one_line(error, 200)}") from error


SUFFIXES = (*ENCODERS, *STILLS)
REPORTS = "reports"
OWN_FILES = (LEDGER, "index.html", "results.jsonl", "results.parquet")
MOST_BYTES = 200
"""The most bytes of one part of a name: file systems take 255; a list of prompts and temporary files add a few."""


def numbered(output: str, number: int) -> str:
    """NAME-2.EXT of NAME.EXT."""
    path = PurePosixPath(output)
    return str(path.with_name(f"{path.stem}-{number}{path.suffix}"))


def output_problem(output: str, folder: Path) -> str | None:
    """Why a result cannot have this name; None if it can. Links are followed as they are now."""
    if "\0" in output:
        return f"must not hold a NUL, got {short(output)}"
    path = PurePosixPath(output)
    if path.is_absolute() or (len(output) > 1 and output[1] == ":"):
        return f"must be relative to the output folder, got {short(output)}"
    if "\\" in output or any(ord(letter) < 32 for letter in output):
        return f"must not hold a backslash or control characters, got {short(output)}"
    if ".." in path.parts or path.name in ("", "."):
        return f"must name a file within the output folder, got {short(output)}"
    if any(len(part.encode(errors="replace")) > MOST_BYTES for part in path.parts):
        return f"must not have a part longer than {MOST_BYTES} bytes, got {short(output)}"
    if any(part.startswith(".") for part in path.parts):
        return f"must not start with a dot, got {short(output)}"
    if not path.suffix:
        kinds = ", ".join(SUFFIXES)
        return f"must end in {kinds}, got {short(output)}: a result is one file, not a folder of images"
    if path.suffix.lower() not in SUFFIXES:
        return f"must end in {', '.join(SUFFIXES)}, got {short(output)}"
    if path.parts[0] == REPORTS:
        return f"must not lie in {REPORTS}/, where the reports go, got {short(output)}"
    return _place_problem(output, folder)


def _place_problem(output: str, folder: Path) -> str | None:
    """Describe a fault of the place where the name leads today."""
    place = folder / output
    try:
        if place.is_symlink() or not place.resolve().is_relative_to(folder.resolve()):
            return f"leads out of the output folder by a link, got {short(output)}"
        if place.is_dir():
            return f"is a folder already, got {short(output)}"
        inside = [part for part in place.parents if part.is_relative_to(folder) and part != folder]
        if any(part.exists() and not part.is_dir() for part in inside):
            return f"lies below a file, got {short(output)}"
    except (OSError, RuntimeError) as error:
        return f"cannot be a file: {error}"
    return None


def id_problem(id: str) -> str | None:
    """Why a job cannot have this id; None if it can: it names files."""
    if id.startswith(".") or any(letter in "/\\" or ord(letter) < 32 or letter == "\x7f" for letter in id):
        return f"must not start with a dot or hold a slash, a backslash or control characters, got {short(id)}"
    if len(id.encode(errors="replace")) > MOST_BYTES:
        return f"must not be longer than {MOST_BYTES} bytes, got {short(id)}"
    return None


def report_name(id: str) -> str:
    """Name of the page about a job, below the output folder."""
    return f"{REPORTS}/{id}.html"
