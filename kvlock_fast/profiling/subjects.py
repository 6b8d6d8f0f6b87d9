"""What `kvlock-fast profile` runs: a real model's whole edit, or the steps of a known size with random weights.

A model with random weights is made of a transformer's config, as deep as wanted.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.edit import load_pipeline
from kvlock_fast.edits import edit_prompts
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.loop.solver import Solver
from kvlock_fast.loop.task import Task
from kvlock_fast.loop.trace import Recorder
from kvlock_fast.masks import project_mask
from kvlock_fast.media import resize_mask, resize_video, write_video
from kvlock_fast.media.clip import Clip
from kvlock_fast.media.paste import composite
from kvlock_fast.models.base import PipelineModel
from kvlock_fast.models.bundled import model_path
from kvlock_fast.models.protocols import Scheduler, Transformer
from kvlock_fast.models.registry import family_of_transformer
from kvlock_fast.nvtx import span
from kvlock_fast.pipeline import KVLockPipeline
from kvlock_fast.planning.command import DTYPES
from kvlock_fast.planning.extent import Extent
from kvlock_fast.planning.find_model import find_model, from_model
from kvlock_fast.planning.known_models import CONFIGS
from kvlock_fast.planning.model_size import ModelSize
from kvlock_fast.profiling.extent import FOREGROUND, find_extent, refuse_too_large
from kvlock_fast.scene import Scene
from kvlock_fast.settings import ProfileSettings

FAMILIES = ("wan", "cogvideox")
"""Families whose models can be made without an autoencoder and text encoders."""
Config = Mapping[str, Any]
Progress = Callable[[str, int, int], None]


def _random_model(config: Config, extent: Extent, device: torch.device, dtype: torch.dtype) -> PipelineModel:
    """A family's model around a random transformer, without text encoder and autoencoder."""
    model, size = model_of(config["_class_name"]), extent.model
    time, space = size.geometry.temporal_stride, size.geometry.spatial_stride
    vae = SimpleNamespace(
        z_dim=size.channels, scale_factor_temporal=time, scale_factor_spatial=space, latent_channels=size.channels,
        temporal_compression_ratio=time, block_out_channels=[1] * space.bit_length(),
    )  # fmt: skip
    transformer = random_transformer(config, size.layers, device, dtype)
    pipe: Any = SimpleNamespace(
        transformer=transformer, vae=SimpleNamespace(config=vae), config={}, _execution_device=device,
        vae_scale_factor_spatial=space,
    )  # fmt: skip
    return model(pipe)


def model_of(transformer: str) -> type[PipelineModel]:
    """Find the family's model of a transformer's class name. Raises InputError for one of no family of FAMILIES."""
    family = family_of_transformer(transformer)
    if family is None or family.name not in FAMILIES:
        raise InputError(f"there is no random model for a {transformer}; of these families: {', '.join(FAMILIES)}")
    return family.load()


def usual_scheduler(family: str) -> Scheduler:
    """Make the scheduler that the family's checkpoints have."""
    kind, config = {
        "wan": ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True,
                                            "flow_shift": 3.0}),
        "cogvideox": ("CogVideoXDDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
                                                 "timestep_spacing": "trailing", "clip_sample": False}),
    }[family]  # fmt: skip
    return getattr(diffusers, kind)(**config)


def random_transformer(config: Config, layers: int, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Make a transformer with normal weights, norms of 1 and no bias; what diffusers keeps in fp32 is in fp32.

    Args:
        config: of the transformer, with its class name.
        layers: its depth.
        device: where the weights are.
        dtype: of the other weights.
    """
    kind = getattr(diffusers, config["_class_name"])
    with init_empty_weights(include_buffers=False):
        transformer: Transformer = kind.from_config({**config, "num_layers": layers})
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


def cut_depth(transformer: Transformer, arch: ArchSpec, layers: int) -> None:
    """Keep the first layers of a diffusers transformer only."""
    blocks = arch.attentions(transformer)[0][0].partition(".")[0]
    if layers < len(getattr(transformer, blocks)):
        setattr(transformer, blocks, getattr(transformer, blocks)[:layers])
        transformer.register_to_config(num_layers=layers)


class RandomSubject:
    """The denoising steps of a model with random weights: no text, no autoencoder."""

    def __init__(
        self,
        config: Config,
        extent: Extent,
        lock: LockConfig,
        cache: CacheConfig,
        device: torch.device,
        dtype: torch.dtype,
    ):
        """config: of the transformer; dtype: of the weights."""
        self.extent, self.lock, self.cache, self.device, self.dtype = extent, lock, cache, device, dtype
        self.clip = made_up_clip(extent)
        self.model = _random_model(config, extent, device, dtype)
        geometry, generator = extent.model.geometry, torch.Generator().manual_seed(0)
        grid = geometry.token_grid(extent.frames, extent.height, extent.width)
        latents = [n * p for n, p in zip(grid, geometry.patch_size, strict=True)]
        self.clean = torch.randn(1, extent.model.channels, *latents, generator=generator).to(device)
        length = extent.model.cross_tokens + extent.model.text_tokens
        channels = config.get("text_dim") or config.get("text_embed_dim") or 4096
        texts = torch.randn(3, length, channels, generator=generator)
        self.texts = texts.to(device, self.model.transformers[0].dtype)

    @torch.no_grad()
    def run(self, steps: int, folder: Path, progress: Progress) -> None:
        """Denoise one edit; an automatic cache goes below `folder`."""
        recorder, extent, frames = Recorder(self.device), self.extent, torch.from_numpy(self.clip.video)
        mask = project_mask(torch.from_numpy(self.clip.mask).to(self.device), extent.model.geometry)
        solver = Solver(usual_scheduler(self.model.arch.family), steps, self.device)
        scene = Scene(self.model, self.lock, solver, frames, extent.frames, mask, "", None)
        scene.place(self.clean, None, torch.Generator().manual_seed(1))
        prompt, negative, source = (Conditioning(text=text) for text in self.texts.split(1))
        task = Task(mask, prompt, negative, source, guidance=(5.0, 5.0), lock=self.lock)
        progress("denoise", 0, 1)
        with recorder.stage("denoise"):
            edit_prompts(task, scene, replace(self.cache, root=str(folder)), recorder, progress)


class PipelineSubject:
    """A whole edit by a real model: encode, text, steps, decode, composite, write."""

    def __init__(
        self,
        pipe: KVLockPipeline,
        extent: Extent,
        clip: Clip,
        texts: tuple[str, str],
        guidance: float,
        lock: LockConfig,
        cache: CacheConfig,
    ):
        """texts: of the source and of the edit."""
        self.pipe, self.extent, self.clip, self.texts = pipe, extent, clip, texts
        self.lock, self.cache, self.guidance = lock, cache, guidance
        self.device, self.dtype = pipe.model.device, pipe.model.transformers[0].dtype
        for transformer in pipe.model.transformers:
            cut_depth(transformer, pipe.model.arch, extent.model.layers)

    def run(self, steps: int, folder: Path, progress: Progress) -> None:
        """Edit the clip; the video and an automatic cache go below `folder`."""
        clip = self.clip
        out = self.pipe(
            clip.video,
            clip.mask,
            source_prompt=self.texts[0],
            prompt=self.texts[1],
            num_inference_steps=steps,
            guidance_scale=self.guidance,
            generator=torch.Generator().manual_seed(0),
            lock=self.lock,
            cache=replace(self.cache, root=str(folder)),
            progress=progress,
        )
        with span("composite"):
            video = composite(clip.video, out.frames[0], clip.mask)
        with span("write"):
            write_video(folder / "edited.mp4", video, clip.fps)


Subject = RandomSubject | PipelineSubject


@dataclass(frozen=True)
class Wanted(ProfileSettings):
    """Request for a profile, by the command line or a program."""

    @property
    def bundled(self) -> bool:
        """Whether it is the bundled model."""
        named = self.model is not None and Path(self.model).resolve() == model_path()
        return "demo" in (self.config, self.model) or named


def make_subject(wanted: Wanted, steps: int, device: torch.device) -> Subject:
    """Make what is to be run. Raises InputError naming what is wrong, or what would fit where it does not."""
    lock, cache = LockConfig.preset(wanted.preset), CacheConfig(tier=wanted.tier, format=wanted.format)
    given = wanted.frames, wanted.size, wanted.layers
    if wanted.config is not None and not wanted.bundled:
        dtype = _dtype(wanted.dtype, device)
        extent = find_extent(find_model(wanted.config), *given)
        config = transformer_config(wanted.config, extent.model)
        if not wanted.force:
            refuse_too_large(extent, steps, device, dtype, lock, cache, encoders=False)
        return RandomSubject(config, extent, lock, cache, device, dtype)
    clip, texts, guidance = None, ("a video", "another video"), 5.0
    if wanted.bundled:
        extent = find_extent(find_model("demo"), *given)
        pipe = load_pipeline("demo", str(device), "fp32" if wanted.dtype == "auto" else wanted.dtype)
        clip, texts, guidance = _demo_clip(extent)
    else:
        pipe = load_pipeline(wanted.model or "", str(device), wanted.dtype)
        extent = find_extent(replace(from_model(pipe.model), name=f"'{wanted.model}'"), *given)
    if not wanted.force:
        refuse_too_large(extent, steps, device, pipe.model.transformers[0].dtype, lock, cache, encoders=True)
    return PipelineSubject(pipe, extent, clip or made_up_clip(extent), texts, guidance, lock, cache)


def _demo_clip(extent: Extent) -> tuple[Clip, tuple[str, str], float]:
    """The demo's own clip, stretched to the size and played to and fro to the frames; its texts and guidance scale."""
    from kvlock_fast import demo

    case = demo.demo_case()
    last = len(case.mask) - 1
    order = last - np.abs(np.arange(extent.frames) % (2 * last) - last)
    video = resize_video(case.source.video[order], extent.height, extent.width)
    mask = resize_mask(case.mask[order], extent.height, extent.width)
    return Clip(video, mask, Fraction(8)), (case.source_prompt, case.prompt), demo.GUIDANCE


def transformer_config(name: str, model: ModelSize) -> Config:
    """Find the config of a transformer of a known size, in a config file or in a folder.

    Raises InputError for a family that is none of FAMILIES, and for a model that takes an image.
    """
    if model.family not in FAMILIES:
        raise InputError(
            f"{model.name} is of the family {model.family}; profile by sizes alone runs {', '.join(FAMILIES)}"
        )
    path = model_path() if name == "demo" else Path(name)
    if not path.exists() or (name == model.name and name != "demo"):
        return CONFIGS[model.name]
    config = json.loads((path / "transformer" / "config.json" if path.is_dir() else path).read_text())
    if config.get("image_dim") is not None or config["in_channels"] != config.get("out_channels"):
        raise InputError(f"'{name}' takes an image beside the text: image-to-video is not supported yet")
    return config


def made_up_clip(extent: Extent) -> Clip:
    """Draw a gradient that drifts, and in the middle a box of a fifth of the frame that may change."""
    frames, height, width = extent.frames, extent.height, extent.width
    y, x = np.mgrid[:height, :width]
    drift = np.arange(frames).astype(np.uint8)[:, None, None, None]
    video = np.stack([x, y, x + y], axis=-1).astype(np.uint8) + drift  # of uint8, which wraps around
    side = math.sqrt(FOREGROUND)
    near = (np.abs(2 * y + 1 - height) <= side * height) & (np.abs(2 * x + 1 - width) <= side * width)
    return Clip(video, np.repeat(near[None], frames, axis=0), Fraction(16))


def _dtype(name: str, device: torch.device) -> torch.dtype:
    names = {**DTYPES, "auto": torch.float32 if device.type == "cpu" else torch.bfloat16}
    if name not in names:
        raise InputError(f"dtype '{name}' is not one of {', '.join(names)}")
    return names[name]
