"""Transformers to measure with: of a config, with random weights, as deep as wanted."""

from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import Tensor, nn


def random_transformer(config: dict[str, Any], layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Wan's transformer with normal weights, norms of 1 and no bias; what diffusers keeps in fp32 is in fp32."""
    with init_empty_weights(include_buffers=False):
        transformer = WanTransformer3DModel.from_config({**config, "num_layers": layers})
    generator = torch.Generator(device).manual_seed(0)
    kept = set(WanTransformer3DModel._keep_in_fp32_modules or ())
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


def cut_depth(transformer: nn.Module, layers: int) -> None:
    """Keep the first layers only."""
    if layers < len(transformer.blocks):
        transformer.blocks = transformer.blocks[:layers]
        transformer.register_to_config(num_layers=layers)
