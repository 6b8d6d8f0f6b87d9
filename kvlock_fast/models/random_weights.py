"""Models to measure with: of a transformer's config, with random weights, as deep as wanted."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from kvlock_fast.errors import InputError
from kvlock_fast.masks import Geometry
from kvlock_fast.models.arch import ArchSpec
from kvlock_fast.models.families import family_of_transformer

FAMILIES = ("wan", "cogvideox")
"""Those whose models can be made without an autoencoder and text encoders."""


def random_model(config: Mapping[str, Any], layers: int, geometry: Geometry, device: torch.device, dtype: torch.dtype):
    """A family's model around a random transformer of a config with its class name: no text, no autoencoder.

    geometry: of the autoencoder that is not there. Raises InputError for a family that is none of FAMILIES.
    """
    model = model_of(config["_class_name"])
    transformer = random_transformer(config, layers, device, dtype)
    vae = SimpleNamespace(config=_vae_config(model.arch.family, config["in_channels"], geometry))
    pipe = {"transformer": transformer, "vae": vae, "config": {}, "_execution_device": device}
    return model(SimpleNamespace(**pipe, vae_scale_factor_spatial=geometry.spatial_stride))


def model_of(transformer: str) -> type:
    """The family's model for a transformer's class name. Raises InputError for one of no family of FAMILIES."""
    family = family_of_transformer(transformer)
    if family is None or family.name not in FAMILIES:
        raise InputError(f"there is no random model for a {transformer}; of these families: {', '.join(FAMILIES)}")
    return family.load()


def _vae_config(family: str, channels: int, geometry: Geometry) -> Any:
    """What the family's model reads of its autoencoder."""
    time, space = geometry.temporal_stride, geometry.spatial_stride
    if family == "wan":
        return SimpleNamespace(z_dim=channels, scale_factor_temporal=time, scale_factor_spatial=space)
    halvings = range(space.bit_length())
    return SimpleNamespace(
        latent_channels=channels, temporal_compression_ratio=time, block_out_channels=[1 for _ in halvings]
    )


def usual_scheduler(family: str) -> Any:
    """As the family's checkpoints have it."""
    if family == "wan":
        return diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    return diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )


def random_transformer(config: Mapping[str, Any], layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """With normal weights, norms of 1 and no bias; what diffusers keeps in fp32 is in fp32."""
    kind = getattr(diffusers, config["_class_name"])
    with init_empty_weights(include_buffers=False):
        transformer = kind.from_config({**config, "num_layers": layers})
    generator = torch.Generator(device).manual_seed(0)
    kept = set(kind._keep_in_fp32_modules or ())
    for name, module in transformer.named_modules():
        for key, meta in list(module.named_parameters(recurse=False)):
            wide = kept & set(f"{name}.{key}".split("."))
            empty = torch.empty(meta.shape, device=device, dtype=torch.float32 if wide else dtype)
            module.register_parameter(key, nn.Parameter(_filled(empty, key, generator), requires_grad=False))
    return transformer.to(device).eval()


def _filled(x: Tensor, name: str, generator: torch.Generator) -> Tensor:
    if name == "bias":
        return x.zero_()
    return x.fill_(1.0) if x.ndim == 1 else x.normal_(0.0, 0.02, generator=generator)


def cut_depth(transformer: nn.Module, arch: ArchSpec, layers: int) -> None:
    """Keep the first layers only."""
    first, _ = arch.attentions(transformer)[0]
    blocks = first.partition(".")[0]
    if layers < len(getattr(transformer, blocks)):
        setattr(transformer, blocks, getattr(transformer, blocks)[:layers])
        transformer.register_to_config(num_layers=layers)
