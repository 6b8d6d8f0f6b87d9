"""What a measurement was made on: the GPU, its clocks as found, versions, the commit."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-3", "flash-attn-4", "sageattention", "numpy")
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "driver_version")


def machine(commit: str | None = None) -> dict[str, Any]:
    """Plain values; None where something cannot be found out. `commit`: for a copy of the tree without its history."""
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if cuda else None,
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count if cuda else None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit or _commit(),
    }


def clocks() -> dict[str, str] | None:
    """Clocks in MHz, power in W, as they are now."""
    said = _said("nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits", "--id=0")
    return dict(zip(CLOCKS, map(str.strip, said.split(",")), strict=False)) if said else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = str(Path(__file__).parent)
    commit = _said("git", "-C", here, "rev-parse", "HEAD")
    if commit and _said("git", "-C", here, "status", "--porcelain", "--untracked-files=no"):
        commit += ", and changes"
    return commit


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
