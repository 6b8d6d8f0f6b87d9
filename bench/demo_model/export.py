"""Trained weights to a diffusers folder: fp16 safetensors, put in place in one rename."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from bench.demo_model.networks import SHIFT, make_text_encoder, make_tokenizer, make_transformer
from bench.demo_model.train_vae import trained_vae


def trained_pipeline(work: Path):
    """The `WanPipeline` (float32) of the averaged weights below `work`, latents' statistics in the VAE's config."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    vae, tokenizer = trained_vae(work), make_tokenizer()
    modules = {"transformer": make_transformer(), "text_encoder": make_text_encoder(len(tokenizer))}
    weights = load_file(work / "transformer" / "average.safetensors")
    for name, module in modules.items():
        _load(module, weights, f"{name}.")
    statistics = load_file(work / "transformer" / "statistics.safetensors")
    vae.register_to_config(**{f"latents_{name}": value.tolist() for name, value in statistics.items()})
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return WanPipeline(tokenizer=tokenizer, vae=vae, scheduler=scheduler, **modules)


def _load(module: torch.nn.Module, weights: dict[str, torch.Tensor], prefix: str) -> None:
    part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    # T5 ties its embedding to a second name, which safetensors keeps once.
    missing, unexpected = module.load_state_dict(part, strict=False)
    if unexpected or any("embed_tokens" not in name for name in missing):
        raise ValueError(f"weights do not fit {type(module).__name__}: missing {missing}, unexpected {unexpected}")
    module.eval()


def export_model(work: Path, output: Path) -> str:
    """Write the model below `work` to `output`, replacing what is there; returns a line with its size."""
    pipeline = trained_pipeline(work)
    for module in (pipeline.vae, pipeline.transformer, pipeline.text_encoder):
        module.to(torch.float16)
    fresh, old = (output.with_name(f"{output.name}.{suffix}") for suffix in ("new", "old"))
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(fresh, safe_serialization=True)
    # Transformers 5 writes its tokenizer's new name; both 4 and 5 know the old one.
    for path in (fresh / "model_index.json", fresh / "tokenizer" / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    if output.exists():
        output.rename(old)
    fresh.rename(output)
    shutil.rmtree(old, ignore_errors=True)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return f"{output}: {size / 1e6:.2f} MB"
