"""What is installed, what will be used, what is missing and what that costs. Never fails for a missing part.

`capabilities` lists what this installation can do, as plain values.
"""

from __future__ import annotations

import importlib
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from kvlock_fast.version import __version__

BACKENDS = {"flash_attn": "flash-attn", "sageattention": "sageattention", "xformers": "xformers"}


def installed_version(distribution: str) -> str | None:
    """Version of a distribution, or None where it is not installed; imports nothing."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def capabilities() -> dict[str, Any]:
    """List what this installation can do.

    Returns:
        versions, device, families, backends, formats, tiers, presets: names and versions as strings, lists of names;
        transformers: the family by the name of the class.
    """
    import torch

    from kvlock_fast.config import PRESETS, TIERS
    from kvlock_fast.kernels.quantize import FORMATS
    from kvlock_fast.models.registry import FAMILIES, REGISTRY

    packages = ("torch", "triton", "diffusers", "transformers", "numpy", "av")
    triton = ["triton"] if installed_version("triton") else []
    found = [name for name, distribution in BACKENDS.items() if installed_version(distribution)]
    return {
        "versions": {"kvlock_fast": __version__, **{name: installed_version(name) for name in packages}},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "families": list(FAMILIES),
        "transformers": {name: family.name for family in reversed(REGISTRY) for name in family.transformers},
        "backends": ["reference", *triton, "sdpa", *found],
        "formats": list(FORMATS),
        "tiers": list(TIERS),
        "presets": list(PRESETS),
    }


_OPTIONAL = "optional; attention runs by torch's own kernels"

# name -> (distribution, module, what its absence costs)
_PARTS = {
    "torch": ("torch", "torch", "nothing runs"),
    "triton": ("triton", "triton", "the fused kernels do not run; plain torch does the same, slower"),
    "diffusers": ("diffusers", "diffusers", "no model can be loaded"),
    "transformers": ("transformers", "transformers", "models with a text encoder of their own cannot be loaded"),
    "av": ("av", "av", "no video can be read or written"),
    "nvtx": ("nvtx", "nvtx", "profiles carry no names"),
    "flash-attn 2": ("flash-attn", "flash_attn", _OPTIONAL),
    "flash-attn 3": ("flash-attn-3", "flash_attn_interface", _OPTIONAL),
    "flash-attn 4": ("flash-attn-4", "flash_attn.cute", _OPTIONAL),
    "sageattention": ("sageattention", "sageattention", _OPTIONAL),
    "xformers": ("xformers", "xformers", _OPTIONAL),
}

_GIB = 1024**3


def report() -> dict[str, Any]:
    """Describe the state of this installation as plain values.

    Returns:
        `python`, `kvlock_fast`, `platform`: strings. `parts`: per name `version` (None: missing), `error` (why it
        cannot be imported although it is there, or None), `cost` (of being missing). `device`: name, kind, capability,
        memory in bytes. `memory`: of this machine, in bytes or None. `demo_model`: its folder or None. `will_use`:
        device and attention.
    """
    from kvlock_fast.models.bundled import model_path

    parts = {name: _part(*entry) for name, entry in _PARTS.items()}
    device, torch = _device(), parts["torch"]
    works = torch["version"] is not None and not torch["error"]
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "kvlock_fast": __version__,
        "parts": parts,
        "device": device,
        "memory": _memory(),
        "demo_model": str(model_path()) if (model_path() / "model_index.json").is_file() else None,
        "will_use": {
            "device": device["kind"],
            "attention": "torch's scaled_dot_product_attention" if works else "nothing",
        },
    }


def render(facts: dict[str, Any]) -> str:
    """Write the facts of `report` as lines for a terminal."""
    memory, use = facts["memory"], facts["will_use"]
    rows = [
        ("kvlock_fast", facts["kvlock_fast"]),
        ("python", f"{facts['python']} on {facts['platform']}"),
        ("memory", f"{memory / _GIB:.1f} GiB" if memory else "unknown"),
        ("device", _device_text(facts["device"])),
        (),
    ]
    for name, part in facts["parts"].items():
        text = part["version"] or f"missing: {part['cost']}"
        rows.append((name, f"{text}, but broken ({part['error']}): {part['cost']}" if part["error"] else text))
    missing = "missing: --model demo and `kvlock-fast demo` cannot run"
    rows += [(), ("demo model", facts["demo_model"] or missing)]
    rows.append(("will use", f"{use['device']}, attention by {use['attention']}"))
    return "\n".join(f"{row[0]:<15}{row[1]}" if row else "" for row in rows)


def _part(distribution: str, module: str, cost: str) -> dict[str, str | None]:
    found = installed_version(distribution)
    # Some builds of flash-attn 3 come as a bare module without a distribution of that name.
    if found is None and _importable(module):
        found = "present"
    return {"version": found, "error": _broken(module) if found else None, "cost": cost}


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except Exception:
        return False


def _broken(module: str) -> str | None:
    """The error of importing a module that is there, None where it can be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a foreign package raises is the answer
        return _short(error)
    return None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def _device() -> dict[str, Any]:
    none = {"kind": "cpu", "name": platform.processor() or platform.machine(), "capability": None, "memory": None}
    try:
        import torch

        none["threads"] = torch.get_num_threads()
        if not torch.cuda.is_available():
            return {**none, "cuda_build": torch.version.cuda}
        properties = torch.cuda.get_device_properties(0)
        return {
            "kind": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "cuda_build": torch.version.cuda,
        }
    except Exception as error:
        return {**none, "error": _short(error)}


def _device_text(device: dict[str, Any]) -> str:
    if device["kind"] == "cuda":
        memory = f"{device['memory'] / _GIB:.0f} GiB"
        return f"{device['name']}, capability {device['capability']}, {memory}, CUDA {device['cuda_build']}"
    if device.get("error"):
        return f"cpu (asking for a GPU failed: {device['error']})"
    why = "torch finds no GPU" if device.get("cuda_build") else "this torch is built without CUDA"
    return f"cpu, {device.get('threads', 1)} threads ({why})"


def _memory() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return psutil.virtual_memory().total
