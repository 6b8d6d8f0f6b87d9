"""What this installation can do, as plain values."""

from importlib.metadata import PackageNotFoundError, version
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
    from kvlock_fast.models.families import FAMILIES, REGISTRY

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
