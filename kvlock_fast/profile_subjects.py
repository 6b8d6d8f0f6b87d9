"""What `kvlock-fast profile` runs: a real model's whole edit, or the steps of a known size with random weights."""

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvlock_fast.cache.job import Job
from kvlock_fast.cache.machine import Machine
from kvlock_fast.cache.model_sizes import ModelSize, find_model, from_pipeline
from kvlock_fast.cache.planner import short_of
from kvlock_fast.cache.units import text_bytes
from kvlock_fast.composite import composite
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.edit import Clip, load_pipeline
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.forwards import Task
from kvlock_fast.inputs import nearest_size
from kvlock_fast.masks import project_mask
from kvlock_fast.media import resize_mask, resize_video, write_video
from kvlock_fast.models.wan import WAN, WanModel
from kvlock_fast.nvtx import span
from kvlock_fast.scene import Scene, edit_prompts
from kvlock_fast.solvers import FlowSolver
from kvlock_fast.trace import Recorder

Progress = Callable[[str, int, int], None]
FOREGROUND = 0.2
"""Share of the frame that the made-up mask covers."""
LONGEST, SHORT = 900, 120
"""Seconds: a run on a CPU that would take longer is refused, and a shorter one is named."""
MOST_FRAMES = 100_000


@dataclass(frozen=True)
class Extent:
    """What is run: frames and size as the model takes them, layers of each transformer, tokens of the video."""

    model: ModelSize
    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return math.prod(self.model.geometry.token_grid(self.frames, self.height, self.width))

    @property
    def text(self) -> str:
        layers, frames = f"layer{'s' * (self.model.layers > 1)}", f"frame{'s' * (self.frames > 1)}"
        size = f"{self.height}x{self.width}"
        return f"{self.model.name} with {self.model.layers} {layers}, {self.frames} {frames} of {size}"

    def flops(self, rows: int) -> float:
        """Of a forward of so many rows: attention's two products, and the other matrices."""
        model = self.model
        return rows * model.layers * (4 * self.tokens**2 * model.dim + 2 * self.tokens * model.matrix_weights)


def find_extent(model: ModelSize, frames: int | None, size: tuple[int, int] | None, layers: int | None) -> Extent:
    """The model's own numbers where none are given. Raises InputError naming the option; warns where one is changed."""
    if layers is not None:
        if not 1 <= layers <= model.layers:
            raise InputError(f"--layers must be a whole number from 1 to {model.layers}, got {layers}")
        model = with_layers(model, layers)
    frames = model.frames if frames is None else frames
    if not 1 <= frames <= MOST_FRAMES:
        raise InputError(f"--frames must be a whole number from 1 to {MOST_FRAMES}, got {frames}")
    stride, wanted = model.geometry.temporal_stride, size or (model.height, model.width)
    fitting = nearest_size(model.geometry, *wanted)
    if fitting != wanted:
        _warn(f"{model.name} cannot take the size {wanted[0]}x{wanted[1]}: profiling {fitting[0]}x{fitting[1]}")
    whole = frames + -(frames - 1) % stride
    if whole != frames:
        _warn(f"{frames} frames are not {stride}n+1: profiling {whole}, as an edit would pad them")
    most = model.geometry.most_tokens
    if most is not None and max(model.geometry.token_grid(whole, *fitting)) > most:
        raise InputError(
            f"{whole} frames of {fitting[0]}x{fitting[1]} are too many for {model.name}: "
            f"it takes at most {most} tokens along each side"
        )
    return Extent(model, whole, *fitting)


def with_layers(model: ModelSize, layers: int) -> ModelSize:
    """Cut to so many layers; what is outside of them counts as if it were in them."""
    return replace(model, layers=layers, parameters=math.ceil(model.parameters * layers / model.layers))


class RandomSubject:
    """The denoising steps of a model with random weights: no text, no autoencoder."""

    def __init__(self, name: str, extent: Extent, lock: LockConfig, cache: CacheConfig, place: tuple[Any, Any]):
        """name: of a known size, a transformer's config or a model's folder; place: torch.device and dtype."""
        self.extent, self.lock, self.cache = extent, lock, cache
        self.device, self.dtype = place
        config = transformer_config(name, extent.model)
        transformer = random_transformer(config, extent.model.layers, *place)
        geometry, channels = extent.model.geometry, extent.model.channels
        vae = SimpleNamespace(
            z_dim=channels,
            scale_factor_temporal=geometry.temporal_stride,
            scale_factor_spatial=geometry.spatial_stride,
        )
        self.model = WanModel(
            SimpleNamespace(
                transformer=transformer, vae=SimpleNamespace(config=vae), config={}, _execution_device=self.device
            )
        )
        generator = torch.Generator().manual_seed(0)
        grid = [n * p for n, p in zip(geometry.token_grid(extent.frames, extent.height, extent.width),
                                      geometry.patch_size, strict=True)]  # fmt: skip
        self.clean = torch.randn(1, channels, *grid, generator=generator).to(self.device)
        text = torch.randn(3, extent.model.cross_tokens, config.get("text_dim", 4096), generator=generator)
        self.texts = text.to(self.device, transformer.dtype).split(1)

    @torch.no_grad()
    def run(self, steps: int, folder: Path, progress: Progress) -> None:
        """Denoise one edit; an automatic cache goes below `folder`."""
        recorder, extent = Recorder(self.device), self.extent
        clip = made_up_clip(extent)
        mask = project_mask(torch.from_numpy(clip.mask).to(self.device), extent.model.geometry)
        solver = FlowSolver(_wan_scheduler(), steps, self.device)
        scene = Scene(self.model, self.lock, solver, torch.from_numpy(clip.video), extent.frames, mask, "", None)
        scene.place(self.clean, None, torch.Generator().manual_seed(1))
        prompt, negative, source = self.texts
        task = Task(mask, prompt, negative, source, guidance=(5.0, 5.0), lock=self.lock)
        progress("denoise", 0, 1)
        with recorder.stage("denoise"):
            edit_prompts(task, scene, replace(self.cache, root=folder), recorder, progress)


class PipelineSubject:
    """A whole edit by a real model: encode, text, steps, decode, composite, write."""

    def __init__(self, pipe: Any, extent: Extent, clip: Clip, texts: tuple[str, str], lock: LockConfig,
                 cache: CacheConfig, guidance: float):  # fmt: skip
        """texts: of the source and of the edit."""
        self.pipe, self.extent, self.clip, self.texts = pipe, extent, clip, texts
        self.lock, self.cache, self.guidance = lock, cache, guidance
        self.device, self.dtype = pipe.model.device, pipe.model.transformers[0].dtype
        for transformer in pipe.model.transformers:
            cut_depth(transformer, extent.model.layers)

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
            cache=replace(self.cache, root=folder),
            progress=progress,
        )
        with span("composite"):
            video = composite(clip.video, out.frames[0], clip.mask)
        with span("write"):
            write_video(folder / "edited.mp4", video, clip.fps)


Subject = RandomSubject | PipelineSubject


@dataclass(frozen=True)
class Wanted:
    """What to profile. config: a known size, a config file or a folder, run with random weights; model: a folder, a hub
    id or "demo", run with its own ("demo" is that as a config too); frames, size, layers: None for the model's.
    """

    config: str | None = None
    model: str | None = None
    frames: int | None = None
    size: tuple[int, int] | None = None
    layers: int | None = None
    tier: str = "lockstep"
    format: str = "fp8_e4m3"
    preset: str = "kvlock"
    dtype: str = "auto"
    force: bool = False


def make_subject(wanted: Wanted, steps: int, device: torch.device) -> Subject:
    """Raises InputError naming what is wrong, or what would fit where it does not."""
    from kvlock_fast.demo import model_path

    name = wanted.config or wanted.model
    lock, cache = LockConfig.preset(wanted.preset), CacheConfig(tier=wanted.tier, format=wanted.format)
    given = wanted.frames, wanted.size, wanted.layers
    bundled = name == "demo" or (wanted.model and Path(name).resolve() == model_path())
    if wanted.config is not None and not bundled:
        dtype = _dtype(wanted.dtype, device)
        extent = find_extent(find_model(name), *given)
        transformer_config(name, extent.model)
        _refuse_too_large(extent, steps, device, dtype, wanted)
        return RandomSubject(name, extent, lock, cache, (device, dtype))
    if bundled:
        return _demo_subject(wanted, find_extent(find_model("demo"), *given), steps, device, lock, cache)
    pipe = load_pipeline(name, device, wanted.dtype)
    extent = find_extent(replace(from_pipeline(pipe.pipe), name=f"'{name}'"), *given)
    _refuse_too_large(extent, steps, device, pipe.model.transformers[0].dtype, wanted)
    return PipelineSubject(pipe, extent, made_up_clip(extent), ("a video", "another video"), lock, cache, 5.0)


def _demo_subject(
    wanted: Wanted, extent: Extent, steps: int, device: torch.device, lock: LockConfig, cache: CacheConfig
) -> PipelineSubject:
    """The bundled model on its own clip, which is stretched to the size and played to and fro to the frames."""
    from kvlock_fast import demo

    pipe = load_pipeline("demo", device, "fp32" if wanted.dtype == "auto" else wanted.dtype)
    _refuse_too_large(extent, steps, device, pipe.model.transformers[0].dtype, wanted)
    case = demo.demo_case()
    count, there = len(case.mask), extent.frames
    order = np.abs((np.arange(there) + count - 1) % (2 * (count - 1)) - (count - 1))
    video = resize_video(case.source.video[order], extent.height, extent.width)
    mask = resize_mask(case.mask[order], extent.height, extent.width)
    clip, texts = Clip(video, mask, Fraction(8)), (case.source_prompt, case.prompt)
    return PipelineSubject(pipe, extent, clip, texts, lock, cache, demo.GUIDANCE)


def transformer_config(name: str, model: ModelSize) -> dict[str, Any]:
    """What diffusers' transformer of a known size, a config file or a folder is made of."""
    if model.family != WAN.family:
        raise InputError(f"{model.name} is of the family {model.family}; profile runs {WAN.family}")
    path = Path(name)
    if not path.exists() or name == model.name:
        return {
            "num_attention_heads": model.heads, "attention_head_dim": model.head_dim, "num_layers": model.layers,
            "ffn_dim": model.feed_forward, "in_channels": model.channels, "out_channels": model.channels,
            "patch_size": model.geometry.patch_size, "rope_max_seq_len": model.geometry.most_tokens,
        }  # fmt: skip
    config = json.loads((path / "transformer" / "config.json" if path.is_dir() else path).read_text())
    if config.get("image_dim") is not None or config["in_channels"] != config.get("out_channels"):
        raise InputError(f"'{name}' takes an image beside the text: image-to-video is not supported yet")
    return config


def random_transformer(config: dict[str, Any], layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Wan's transformer with normal weights, norms of 1 and no bias; what diffusers keeps in fp32 is in fp32."""
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

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


def made_up_clip(extent: Extent) -> Clip:
    """A gradient that drifts, and in the middle a box of a fifth of the frame that may change."""
    frames, height, width = extent.frames, extent.height, extent.width
    y, x = np.mgrid[:height, :width]
    drift = np.arange(frames)[:, None, None]
    video = np.stack([(x + drift) % 256, (y + drift) % 256, (x + y) % 256 + 0 * drift], axis=-1).astype(np.uint8)
    side = math.sqrt(FOREGROUND)
    near = (np.abs(2 * y + 1 - height) <= side * height) & (np.abs(2 * x + 1 - width) <= side * width)
    return Clip(video, np.repeat(near[None], frames, axis=0), Fraction(16))


def _wan_scheduler() -> Any:
    """As Wan 2.1's pipelines have it."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    names["auto"] = torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in names:
        raise InputError(f"dtype '{name}' is not one of {', '.join(names)}")
    return names[name]


def _refuse_too_large(extent: Extent, steps: int, device: torch.device, dtype: torch.dtype, wanted: Wanted) -> None:
    """Raise InputError for a run without the memory for it, or on a CPU for much longer than anyone waits."""
    if wanted.force:
        return
    machine = Machine.here(device)
    rate = _matrix_rate() if device.type == "cpu" else math.inf

    def seconds(e: Extent) -> float:
        return steps * e.flops(rows=3) / rate

    def memory(e: Extent) -> tuple[bool, str]:
        job = Job(e.model, e.frames, e.height, e.width, round((1 - FOREGROUND) * e.tokens), steps, steps, dtype=dtype,
                  encoders_on_device=wanted.config is None)  # fmt: skip
        format = None if wanted.tier == "lockstep" else wanted.format
        needed = job.needed(wanted.tier, format, 1, gpu=machine.gpu_bytes is not None)
        place = f"{text_bytes(needed.gpu)} on the GPU and " * bool(needed.gpu) + f"{text_bytes(needed.host)} of memory"
        return not short_of(needed, machine), place

    fits, place = memory(extent)
    if fits and seconds(extent) <= LONGEST:
        return
    smaller = _largest(extent, lambda e: memory(e)[0] and seconds(e) <= SHORT)
    why = f"{steps} steps of it take about {_long(seconds(extent))} on this CPU" if fits else f"it needs {place}"
    raise InputError(f"{extent.text}: {why}; {_advice(extent, smaller, seconds)}--force runs it all the same")


def _advice(extent: Extent, smaller: Extent | None, seconds: Callable[[Extent], float]) -> str:
    """The options that make it fit, or nothing where none do."""
    if smaller is None:
        return ""
    options = []
    if smaller.model.layers != extent.model.layers:
        options.append(f"--layers {smaller.model.layers}")
    if smaller.frames != extent.frames:
        options.append(f"--frames {smaller.frames}")
    if (smaller.height, smaller.width) != (extent.height, extent.width):
        options.append(f"--size {smaller.height}x{smaller.width}")
    takes = f" (about {_long(seconds(smaller))})" if seconds(smaller) else ""
    return f"{' '.join(options)}{takes} would fit, "


def _largest(extent: Extent, fits: Callable[[Extent], bool]) -> Extent | None:
    """Of what is left when depth, length and size are cut, the most work that fits."""
    model, stride = extent.model, extent.model.geometry.temporal_stride
    depths = sorted({model.layers, *(n for n in (1, 2, 4, 8, 16) if n < model.layers)})
    lengths = sorted({extent.frames, *(n for n in (1 + i * stride for i in (0, 1, 4, 8)) if n < extent.frames)})
    sizes = {nearest_size(model.geometry, extent.height // n, extent.width // n) for n in (1, 2, 4)}
    smaller = (Extent(with_layers(model, d), f, *size) for d, f, size in product(depths, lengths, sizes))
    return max(filter(fits, smaller), key=lambda e: e.flops(1), default=None)


def _matrix_rate() -> float:
    """FLOP/s of this CPU's matrix products in fp32, the best of a few."""
    a, best = torch.ones(768, 768), math.inf
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 768**3 / best


def _long(seconds: float) -> str:
    for name, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(1, seconds):.0f} s"


def _warn(message: str) -> None:
    warnings.warn(message, InputWarning, stacklevel=3)


def temporary_folder() -> TemporaryDirectory:
    """For what a run leaves."""
    return TemporaryDirectory(prefix="kvlock-profile-")
