"""The process that wrote a temporary file: a token of it in the name, and whether that process may still run.

A token is MACHINE.PID.START in hexadecimal: a machine's boot, and a process of it by its number and by when it began.
A reused number counts as another process.
"""

import contextlib
import os
import socket
import time
from functools import cache
from pathlib import Path

FOREIGN_SECONDS = 24 * 3600
"""The age from which a process that cannot be asked after (another machine's, an earlier boot's) counts as dead."""
TOKEN = r"[0-9a-f]{8}\.[0-9a-f]{1,8}\.[0-9a-f]{1,16}"
"""A regular expression of a token."""


def token() -> str:
    """The token of this process."""
    pid = os.getpid()
    return f"{_machine()}.{pid:x}.{_start(pid) or 0:x}"


def lives(owner: str, path: Path) -> bool:
    """Whether the process of a token, which the name at `path` holds, may still run."""
    machine, pid, start = owner.split(".")
    if machine == _machine() and os.name == "posix":
        return _runs(int(pid, 16), int(start, 16))
    try:
        return time.time() - path.stat().st_mtime < FOREIGN_SECONDS
    except FileNotFoundError:
        return False


def _runs(pid: int, start: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    found = _start(pid)
    return found is None or found == start


def _start(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; -1 for one that has ended, None where this cannot be read."""
    try:
        # The name, second and in brackets, may hold spaces and brackets itself.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])


@cache
def _machine() -> str:
    import xxhash

    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        # Containers of one machine share its boot, and may share host names across machines.
        facts = [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return xxhash.xxh3_64_hexdigest("\0".join(facts).encode())[:8]
