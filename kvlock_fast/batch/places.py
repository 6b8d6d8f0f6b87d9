"""Paths and URLs: what fsspec knows is read and written like a file.

A path without a scheme is local, and `file://` is the same. Everything else (`memory://`, `s3://`, ...) goes through
fsspec, whose packages for a scheme are the user's to install.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from kvlock_fast.errors import InputError, OutputError
from kvlock_fast.files import output_folder, write_bytes

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")


def is_remote(place: str) -> bool:
    """Whether it is a URL of something else than a local file."""
    match = _SCHEME.match(place)
    return match is not None and match[1].lower() != "file"


def local_path(place: str, base: Path) -> Path:
    """Of a path (relative to `base`) or of file://..."""
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
    """Where finished files go: a folder, or a URL. A file appears whole or not at all."""

    def __init__(self, place: str):
        """Raises InputError where nothing can be written."""
        self.place = place.rstrip("/") or place
        self.system: Any = None
        if is_remote(place):
            with _said(place):
                self.system, self.root = _remote(self.place)
                self.system.makedirs(self.root, exist_ok=True)
        else:
            self.folder = output_folder(local_path(place, Path()))

    def write(self, name: str, data: bytes) -> None:
        """Put a file. Raises OutputError."""
        if self.system is None:
            path = self.folder / name
            output_folder(path.parent)
            if not path.resolve().is_relative_to(self.folder.resolve()):  # by a link made since the check
                raise OutputError(f"cannot write '{path}': it leads out of '{self.folder}'")
            write_bytes(path, data)
            return
        path = f"{self.root}/{name}"
        with _said(path, OutputError):
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            # Object stores show an object when it is whole.
            self.system.pipe_file(path, data)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""
        if self.system is None:
            path = self.folder / name
            return path.stat().st_size if path.is_file() else None
        path = f"{self.root}/{name}"
        with _said(path):
            return self.system.size(path) if self.system.isfile(path) else None

    def url(self, name: str) -> str:
        """For a link from the page in the output folder: relative where the file lies there."""
        return name if self.system is None else f"{self.place}/{name}"


def _remote(place: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(place)


@contextmanager
def _said(place: str, kind: type[InputError] = InputError) -> Iterator[None]:
    """Whatever a file system raises, as one sentence about the place."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each file system has errors of its own
        text = " ".join(str(error).split())[:200]
        raise kind(f"'{place}' cannot be reached: {text or type(error).__name__}") from error
