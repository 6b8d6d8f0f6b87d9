"""The table's VACE: the class of diffusers around the demo model, trained by vace_training.py or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).parent / "vace.safetensors"
"""Of the trained parts, with the fingerprint of the model they belong to."""


def untrained_vace(pipe: Any) -> Any:
    """A diffusers `WanVACEPipeline` of a Wan pipeline's own weights, whose VACE blocks add nothing yet.

    It edits as the Wan model does, unlocked: the real class, not a trained one. Every second block has one of VACE.
    """
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    own = pipe.transformer
    config = {name: value for name, value in own.config.items() if not name.startswith("_")}
    channels = 2 * pipe.vae.config.z_dim + pipe.vae.config.scale_factor_spatial**2
    layers = list(range(0, own.config.num_layers, 2))
    random_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    transformer = WanVACETransformer3DModel(**config, vace_layers=layers, vace_in_channels=channels)
    torch.random.set_rng_state(random_state)
    missing, unexpected = transformer.load_state_dict(own.state_dict(), strict=False)
    if unexpected or not all(name.startswith("vace_") for name in missing):
        raise ValueError(f"a VACE of this model would lack {[name for name in missing if 'vace_' not in name]}")
    with torch.no_grad():
        for block in transformer.vace_blocks:
            block.proj_out.weight.zero_()
            block.proj_out.bias.zero_()
    parts = {name: pipe.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    made = WanVACEPipeline(**parts, transformer=transformer.to(own.device, own.dtype).eval())
    # The class takes it from the autoencoder's depth, which misses that this one begins with patches.
    made.vae_scale_factor_spatial = pipe.vae.config.scale_factor_spatial
    made.set_progress_bar_config(disable=True)
    return made


def vace_parts(transformer: nn.Module) -> nn.ModuleDict:
    """What a VACE has beside its base, and what is trained of it."""
    return nn.ModuleDict({name: getattr(transformer, name) for name in ("vace_blocks", "vace_patch_embedding")})


def trained_vace(pipe: Any, path: Path = WEIGHTS) -> Any:
    """`untrained_vace` with the trained parts. Raises RuntimeError for parts of other sizes."""
    made = untrained_vace(pipe)
    weights = {name: value.float() for name, value in load_file(path).items()}
    vace_parts(made.transformer).load_state_dict(weights)
    made.transformer.to(pipe.transformer.dtype)
    return made


def belongs_to(path: Path) -> str | None:
    """The fingerprint of the model that the parts in a file were trained on; None where there is no file."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("base")
