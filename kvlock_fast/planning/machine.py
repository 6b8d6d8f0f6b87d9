"""How much memory a machine has to give, in bytes."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@dataclass(frozen=True)
class Machine:
    """Bytes that one process may take. gpu_bytes: None where models run on the CPU, and so in the host's memory."""

    gpu_bytes: int | None
    host_bytes: int
    disk_bytes: int

    @classmethod
    def here(cls, device: torch.device | str = "auto", disk_path: str | Path = ".") -> "Machine":
        """Measure this machine: what is free, and what this process holds already, since a plan counts weights too.

        device: a device, or "auto" for CUDA where there is one; disk_path: where a cache would be written.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device, place = torch.device(device), Path(disk_path).resolve()
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
        disk = shutil.disk_usage(existing).free
        host = int(min(psutil.virtual_memory().available, _container_free()))
        if device.type != "cuda":
            return cls(None, host + psutil.Process().memory_info().rss, disk)
        free, _ = torch.cuda.mem_get_info(device)
        return cls(free + torch.cuda.memory_reserved(device), host, disk)


def _container_free(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the control group's limit leaves, inf without a limit; its unused page cache counts as free."""
    try:
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such files, or "max"
        return float("inf")
    return max(0, limit - used + int(stat.get("inactive_file", 0)))
