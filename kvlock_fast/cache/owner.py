"""Who wrote this, and does it still run? A process's name in the names of what it puts into a cache.

File locks are not trusted: network file systems pretend to have them. A name is `<kind>-<owner>-<hex>`, and its owner
`<machine>.<pid>.<start>`, where the machine is a hash of the boot and of the space of process ids, and the start of a
process tells it from a later one with the same id.
"""

import contextlib
import os
import re
import secrets
import socket
import time
from functools import cache
from pathlib import Path

import xxhash

FOREIGN_SECONDS = 24 * 3600
"""What cannot be asked after (another machine's, an earlier boot's) counts as alive until it is this old."""

_OWNED = re.compile(r"([a-z]+)-([0-9a-f]{8}\.[0-9a-f]{1,8}\.[0-9a-f]{1,16})-[0-9a-f]{16}(?:\.json)?")


def owned_name(kind: str, suffix: str = "") -> str:
    """A new name that says whose it is."""
    pid = os.getpid()
    return f"{kind}-{_machine()}.{pid:x}.{_start(pid) or 0:x}-{secrets.token_hex(8)}{suffix}"


def kind_of(name: str) -> str | None:
    """The kind of an owned name; None for any other."""
    match = _OWNED.fullmatch(name)
    return match and match[1]


def owner_lives(path: Path) -> bool:
    """Whether the process that the owned name at `path` names may still run."""
    machine, pid, start = _OWNED.fullmatch(path.name)[2].split(".")
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
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        # Containers of one machine share its boot, and may share host names across machines.
        facts = [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return xxhash.xxh3_64_hexdigest("\0".join(facts).encode())[:8]
