"""Outputs that appear under their final name only when they are whole."""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvlock_fast import owner
from kvlock_fast.errors import InputError, OutputError, OutputLost


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`, with its suffix; move it there when the block ends well.

    The temporary file is created at once, so an unwritable place is refused before any work is done. If the block
    raises, nothing under the final name changes and the temporary file is removed.

    Raises:
        OutputError: the place cannot be written (no such folder, a folder of that name, no permission, disk full).
    """
    final = Path(path)
    _refuse_what_is_no_file(final)
    # Short and of its own, so that a long final name still fits the file system's limit.
    temporary = final.with_name(f"{_temporary_name()}{final.suffix}")
    with _writing(final):
        _create(temporary)
    try:
        with _writing(final):
            yield temporary
            fsync(temporary)
            temporary.replace(final)
            fsync(final.parent)
    finally:
        # Nothing is left to remove after the move; after a failure this is the clean-up, KeyboardInterrupt included.
        with contextlib.suppress(OSError):  # what the failure says is worth more
            temporary.unlink(missing_ok=True)


TEMPORARY = re.compile(rf"\.kvlock-(?:({owner.TOKEN})-)?[0-9a-f]{{12}}(\..+)?")
"""A regular expression of names of temporary files, with the owner's token where there is one."""


def _temporary_name() -> str:
    return f".kvlock-{owner.token()}-{secrets.token_hex(6)}"


def _create(path: Path) -> None:
    # Not tempfile: its 0600 mode would stay on the finished file, where the user's umask should decide.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def _try_file_in(folder: Path) -> None:
    probe = folder / _temporary_name()
    _create(probe)
    probe.unlink()


def is_abandoned(path: Path) -> bool:
    """Whether a file of a temporary name was left by a process that has ended.

    A name without its process (as version 0.1 had them) counts as abandoned after a day.
    """
    found = TEMPORARY.fullmatch(path.name)
    if found is None:
        return False
    if found[1] is not None:
        return not owner.lives(found[1], path)
    try:
        return time.time() - path.stat().st_mtime > owner.FOREIGN_SECONDS
    except OSError:
        return False


def check_writable(path: str | os.PathLike) -> None:
    """Raise OutputError unless a file can be put at `path`; leaves nothing behind and touches no earlier file."""
    final = Path(path)
    _refuse_what_is_no_file(final)
    with _writing(final):
        _try_file_in(final.parent)


def check_writable_folder(path: str | os.PathLike) -> None:
    """Raise OutputError unless a folder is, or can be made, at `path` and takes files; makes none."""
    folder = Path(path)
    with _writing(folder):  # or its name is too long
        there, file = folder.is_dir(), folder.exists() and not folder.is_dir()
    if file:
        raise OutputError(f"cannot write the folder '{folder}': a file has this name")
    check_writable(folder / _temporary_name() if there else folder)


def check_replaced(path: str | os.PathLike, replaced: str, ours: Callable[[Path], bool]) -> None:
    """Raise OutputError where a folder holds a file that matches the pattern `replaced` and is not ours."""
    for file in sorted(Path(path).glob(replaced)):
        if not ours(file):
            raise OutputError(
                f"cannot write the folder '{path}': its '{file.name}' was not made by this program, and nothing else "
                "is overwritten"
            )


@contextlib.contextmanager
def new_folder_content(path: str | os.PathLike, replaced: str, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Give a temporary folder; its files go to the folder `path` when the block ends well.

    A new folder appears whole, by one move. In one that exists, the files come in one by one, each whole, and older
    ones of ours that match the pattern `replaced` go; all else stays. If the block raises, nothing changes.

    Raises:
        OutputError: the place cannot be written, or a file that matches is not ours.
    """
    folder = Path(path)
    check_writable_folder(folder)
    check_replaced(folder, replaced, ours)
    name = _temporary_name()
    # Inside a folder that exists: it may be the root of a file system.
    temporary = folder / name if folder.is_dir() else folder.with_name(name)
    try:
        with _writing(folder):
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir():
                fsync(file)
            if not folder.is_dir():
                temporary.replace(folder)
                fsync(folder.parent)
                return
            check_replaced(folder, replaced, ours)  # again: something may have come meanwhile
            fresh = {file.name for file in temporary.iterdir()}
            for file in fresh:
                (temporary / file).replace(folder / file)
            for older in folder.glob(replaced):
                if older.name not in fresh and ours(older):
                    older.unlink()
            fsync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path`, all or nothing. Raises OutputError as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` as UTF-8, all or nothing. Raises OutputError as `atomic_path` does."""
    write_bytes(path, text.encode())


def output_folder(path: str | os.PathLike) -> Path:
    """Make the folder `path` (and those above it) unless it is there, and check that it can be written to.

    Files already in it stay. Raises OutputError naming the folder.
    """
    folder = Path(path)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _try_file_in(folder)
    return folder


def user_cache_folder() -> Path:
    """Folder of automatic caches: $KVLOCK_FAST_CACHE, or kvlock_fast in the user's cache folder."""
    named = os.environ.get("KVLOCK_FAST_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "kvlock_fast"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"kvlock_fast-{os.getuid()}"


def refuse_special(path: str | os.PathLike) -> None:
    """Raise InputError for a pipe, a device or a socket: reading one may wait for ever. What is missing passes."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):  # its reader says what is wrong
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"'{path}' is not a regular file")


def _refuse_what_is_no_file(path: Path) -> None:
    # A link in such a folder leads to whatever the process has open, and would itself be replaced.
    parents = Path(os.path.normpath(path.absolute())).parents
    if any(Path(folder) in parents for folder in ("/dev", "/proc", "/sys")) and Path("/dev/shm") not in parents:
        raise OutputError(f"cannot write '{path}': it is not a regular file")
    with _writing(path):  # or its name is too long
        if path.is_dir():
            raise OutputError(f"cannot write '{path}': a folder has this name")
        # A device or a pipe, which the finished file would replace for good.
        if path.exists() and not path.is_file():
            raise OutputError(f"cannot write '{path}': it is not a regular file")


LOST = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "ENODEV", "ENXIO", "ESTALE", "ENOTCONN")
    if hasattr(errno, name)
)
"""Numbers of errors of a disk, not of a name: the next file meets them too."""


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: OSError) -> OutputError:
    if error.errno in LOST:
        return OutputLost(f"cannot write '{path}': {error.strerror or error}")
    if isinstance(error, FileNotFoundError):
        return OutputError(f"cannot write '{path}': the folder '{path.parent}' does not exist")
    return OutputError(f"cannot write '{path}': {error.strerror or error}")


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        # Only Windows refuses to open a folder; there the move itself is as durable as it gets.
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_json(target: str | None) -> None:
    """Raise OutputError unless figures can be written there."""
    if target is not None and target != "-":
        check_writable(target)


def write_json(target: str | None, data: dict[str, Any]) -> None:
    """Write figures to a file, or to stdout for "-"; nothing for None."""
    if target == "-":
        print(json.dumps(data, indent=1))
    elif target is not None:
        write_text(target, json.dumps(data, indent=1))
