"""Outputs that appear under their final name only when they are whole."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvlock_fast.errors import InputError, OutputError


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
    temporary = final.with_name(f".kvlock-{secrets.token_hex(6)}{final.suffix}")
    try:
        # Not tempfile: its 0600 mode would stay on the finished file, where the user's umask should decide.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise _refusal(final, error) from error
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(final)
        _fsync(final.parent)
    except OSError as error:
        raise _refusal(final, error) from error
    finally:
        # Nothing is left to remove after the move; after a failure this is the clean-up, KeyboardInterrupt included.
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike) -> None:
    """Raise OutputError unless a file can be put at `path`; leaves nothing behind and touches no earlier file."""
    final = Path(path)
    _refuse_what_is_no_file(final)
    probe = final.with_name(f".kvlock-{secrets.token_hex(6)}")
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        probe.unlink()
    except OSError as error:
        raise _refusal(final, error) from error


def check_writable_folder(path: str | os.PathLike) -> None:
    """Raise OutputError unless a folder is, or can be made, at `path` and takes files; makes none."""
    folder = Path(path)
    try:
        there, file = folder.is_dir(), folder.exists() and not folder.is_dir()
    # A name that is too long.
    except OSError as error:
        raise _refusal(folder, error) from error
    if file:
        raise OutputError(f"cannot write the folder '{folder}': a file has this name")
    check_writable(folder / f".kvlock-{secrets.token_hex(6)}" if there else folder)


@contextlib.contextmanager
def new_folder_content(path: str | os.PathLike, replaced: str) -> Iterator[Path]:
    """Give a temporary folder; its files go to the folder `path` when the block ends well.

    A new folder appears whole, by one move. In one that exists, the files come in one by one, each whole, and older
    ones that match the pattern `replaced` go; all else stays. If the block raises, nothing changes.

    Raises:
        OutputError: the place cannot be written.
    """
    folder = Path(path)
    check_writable_folder(folder)
    name = f".kvlock-{secrets.token_hex(6)}"
    # Inside a folder that exists: it may be the root of a file system.
    temporary = folder / name if folder.is_dir() else folder.with_name(name)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _fsync(file)
        if not folder.is_dir():
            temporary.replace(folder)
            _fsync(folder.parent)
            return
        fresh = {file.name for file in temporary.iterdir()}
        for file in fresh:
            (temporary / file).replace(folder / file)
        for older in folder.glob(replaced):
            if older.name not in fresh:
                older.unlink()
        _fsync(folder)
    except OSError as error:
        raise _refusal(folder, error) from error
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
    probe = folder / f".kvlock-{secrets.token_hex(6)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        probe.unlink()
    except OSError as error:
        raise _refusal(folder, error) from error
    return folder


def user_cache_folder() -> Path:
    """Where automatic caches are kept: $KVLOCK_FAST_CACHE, or kvlock_fast in the user's cache folder."""
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
    try:
        if path.is_dir():
            raise OutputError(f"cannot write '{path}': a folder has this name")
        # A device or a pipe, which the finished file would replace for good.
        if path.exists() and not path.is_file():
            raise OutputError(f"cannot write '{path}': it is not a regular file")
    # A name that is too long.
    except OSError as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: OSError) -> OutputError:
    if isinstance(error, FileNotFoundError):
        return OutputError(f"cannot write '{path}': the folder '{path.parent}' does not exist")
    return OutputError(f"cannot write '{path}': {error.strerror or error}")


def _fsync(path: Path) -> None:
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
