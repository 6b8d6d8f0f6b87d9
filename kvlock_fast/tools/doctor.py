"""What is installed, what will be used, what is missing and what that costs. Never fails for a missing part.

`capabilities` says what this installation can do, as plain values.
"""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from kvlock_fast.version import __version__

BACKENDS = {"flash_attn": "flash-attn", "sageattention": "sageattention", "xformers": "xformers"}


def installed_version(distribution: str) -> str | None:
    """Its version, or None where it is not installed; imports nothing."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def capabilities() -> dict[str, Any]:
    """versions, device, families, backends, formats, tiers, presets: names and versions as strings, lists of names;
    transformers: the family by the name of the class.
    """
    import torch

    from kvlock_fast.config import PRESETS, TIERS
    from kvlock_fast.kernels.quantize import FORMATS
    from kvlock_fast.models.registry import FAMILIES, REGISTRY

    packages = ("torch", "triton", "diffusers", "transformers", "numpy", "av")
    cuda = torch.cuda.is_available()
    triton = ["triton"] if installed_version("triton") else []
    return {
        "versions": {"kvlock_fast": __version__, **{name: installed_version(name) for name in packages}},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "families": list(FAMILIES),
        "transformers": {name: family.name for family in reversed(REGISTRY) for name in family.transformers},
        "backends": [
            "reference",
            *triton,
            "sdpa",
            *(name for name, dist in BACKENDS.items() if installed_version(dist)),
        ],
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
    """The state of this installation as plain values.

    `python`, `kvlock_fast`, `platform`: strings. `parts`: per name `version` (None: missing), `error` (why it cannot
    be imported although it is there, or None), `cost` (of being missing). `device`: name, kind, capability, memory in
    bytes. `memory`: of this machine, in bytes or None. `demo_model`: its folder or None. `will_use`: device and
    attention.
    """
    parts = {name: _part(*entry) for name, entry in _PARTS.items()}
    device = _device()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "kvlock_fast": __version__,
        "parts": parts,
        "device": device,
        "memory": _memory(),
        "demo_model": _demo_model(),
        "will_use": {"device": device["kind"], "attention": _attention(parts, device)},
    }


def render(facts: dict[str, Any]) -> str:
    """The facts of `report` as lines for a terminal."""
    device, memory = facts["device"], facts["memory"]
    lines = [
        _line("kvlock_fast", facts["kvlock_fast"]),
        _line("python", f"{facts['python']} on {facts['platform']}"),
        _line("memory", f"{memory / _GIB:.1f} GiB" if memory else "unknown"),
        _line("device", _device_text(device)),
        "",
    ]
    for name, part in facts["parts"].items():
        if part["version"] is None:
            lines.append(_line(name, f"missing: {part['cost']}"))
        elif part["error"]:
            lines.append(_line(name, f"{part['version']}, but broken ({part['error']}): {part['cost']}"))
        else:
            lines.append(_line(name, part["version"]))
    model = facts["demo_model"]
    use = facts["will_use"]
    return "\n".join(
        [
            *lines,
            "",
            _line("demo model", model or "missing: --model demo and `kvlock-fast demo` cannot run"),
            _line("will use", f"{use['device']}, attention by {use['attention']}"),
        ]
    )


def _line(name: str, text: str) -> str:
    return f"{name:<15}{text}"


def _part(distribution: str, module: str, cost: str) -> dict[str, str | None]:
    try:
        found = version(distribution)
    except PackageNotFoundError:
        found = None
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
    """Why a module that is there cannot be imported. Whatever a foreign package raises is the answer, not our fault."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return None


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
        return {**none, "error": f"{type(error).__name__}: {error}".splitlines()[0][:120]}


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
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _demo_model() -> str | None:
    """The bundled model's folder, if it is there."""
    from kvlock_fast.models.bundled import model_path

    return str(model_path()) if (model_path() / "model_index.json").is_file() else None


def _attention(parts: dict[str, dict[str, str | None]], device: dict[str, Any]) -> str:
    if parts["torch"]["version"] is None or parts["torch"]["error"]:
        return "nothing"
    return "torch's scaled_dot_product_attention"
