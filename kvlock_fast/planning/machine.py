"""How much memory a machine has to give, in bytes."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """What one process may take. gpu_bytes: None where models run on the CPU, and so in the host's memory."""

    gpu_bytes: int | None
    host_bytes: int
    disk_bytes: int

    @classmethod
    def here(cls, device: torch.device | str = "auto", disk_path: str | Path = ".") -> "Machine":
        """Of this machine: what is free, and what this process holds already, since a plan counts the weights too.

        device: a device, or "auto" for CUDA where there is one; disk_path: where a cache would be written.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device, disk = torch.device(device), shutil.disk_usage(_existing(Path(disk_path))).free
        if device.type != "cuda":
            return cls(None, _host_free() + _resident(), disk)
        free, _ = torch.cuda.mem_get_info(device)
        return cls(free + torch.cuda.memory_reserved(device), _host_free(), disk)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.exists())


def _host_free() -> int:
    """What can be taken without swapping, within the limit of a container where there is one."""
    return min(_available(), _container_free())


def _available() -> int:
    """MemAvailable of Linux: free, and page cache that can be dropped; elsewhere all there is."""
    fields = _fields(Path("/proc/meminfo"))
    if "MemAvailable" in fields:
        return fields["MemAvailable"] * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_free(group: Path = Path("/sys/fs/cgroup")) -> float:
    """What the control group's limit leaves; inf without a limit. Its unused page cache counts as free."""
    try:
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such files, or "max"
        return float("inf")
    return max(0, limit - used + _fields(group / "memory.stat").get("inactive_file", 0))


def _resident() -> int:
    """Bytes of memory that this process occupies; 0 where that is not known."""
    return _fields(Path("/proc/self/status")).get("VmRSS", 0) * 1024


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number, whatever stands around; nothing of a file that is not there."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    found = (re.match(r"(\w+):?\s+(\d+)", line) for line in lines)
    return {match[1]: int(match[2]) for match in found if match}
