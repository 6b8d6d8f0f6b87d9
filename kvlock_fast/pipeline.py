"""KV-Lock as a pipeline: encode, source path, locked denoising, decode."""

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.denoise import Task, denoise
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.inputs import check_call, fit_to_model
from kvlock_fast.masks import ProjectedMask, project_mask
from kvlock_fast.models import wrap_pipeline
from kvlock_fast.models.arch import select_layers
from kvlock_fast.solvers import FlowSolver, check_scheduler
from kvlock_fast.trace import Recorder, Trace

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EditOutput:
    """frames: one [F, H, W, 3] uint8 array a prompt (empty for output="latent"); latents: [B, C, T, h, w] fp32,
    normalised; trace: what happened at each step; mask: the mask as the model saw it.
    """

    frames: list[np.ndarray]
    latents: Tensor
    trace: Trace
    mask: ProjectedMask


class KVLockPipeline:
    """Edits the masked region of a video with a diffusers pipeline, the rest locked to the source."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.model = wrap_pipeline(pipe)
        check_scheduler(pipe.scheduler)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, torch_dtype: torch.dtype | dict | None = None) -> "KVLockPipeline":
        """Load a diffusers pipeline from a folder or by hub id ("demo": the bundled model), safetensors only.

        A single `torch_dtype` leaves the autoencoder in fp32, as Wan asks for. Raises InputError when there is no such
        model or its family is not known.
        """
        from diffusers import DiffusionPipeline

        if str(path) == "demo":
            from kvlock_fast.demo import model_path

            path = model_path()
        if torch_dtype is not None and not isinstance(torch_dtype, dict):
            torch_dtype = {"default": torch_dtype, "vae": torch.float32}
        try:
            pipe = DiffusionPipeline.from_pretrained(str(path), torch_dtype=torch_dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise InputError(f"model {str(path)!r} cannot be loaded: {_first_line(error)}") from error
        return cls(pipe)

    @classmethod
    def from_pipe(cls, pipe: Any) -> "KVLockPipeline":
        """Around a diffusers pipeline that is loaded already; it stays usable as it is."""
        return cls(pipe)

    def to(self, *args: Any, **kwargs: Any) -> "KVLockPipeline":
        """Move the models, as `DiffusionPipeline.to`."""
        self.pipe.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def __call__(
        self,
        video: np.ndarray | Tensor | Sequence,
        mask: np.ndarray | Tensor,
        *,
        source_prompt: str,
        prompt: str | list[str],
        negative_prompt: str | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        guidance_scale_2: float | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        frames_policy: str = "pad",
        lock: LockConfig | None = None,
        cache: CacheConfig | None = None,
        output: str = "frames",
        progress: Progress | None = None,
    ) -> EditOutput:
        """Edit `video` where `mask` is True.

        video: uint8 [F, H, W, 3] (array, tensor, or a list of frames); mask: bool [F, H, W], [1, H, W] or [H, W] (for
        all frames), at the video's size; prompt: one, or several for the same source, edited in one batch; latents:
        the starting noise [1, C, T, h, w] instead of drawing it from `generator`; height, width: the size to work at
        (default: the video's; the nearest the model can take); frames_policy: what to do with a frame count that the
        model cannot take: "pad" (repeat the last frame, cut back afterwards), "trim" or "error"; guidance_scale_2: for
        the low-noise transformer of a model with two; lock: default LockConfig.preset("kvlock"); output: "frames" or
        "latent"; progress(stage, done, total) is called along the way.

        Raises InputError (a ValueError) on bad input; warns where the input is changed to fit.
        """
        lock, progress = lock or LockConfig.preset("kvlock"), progress or (lambda stage, done, total: None)
        cache = cache or CacheConfig()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        scales = (guidance_scale, guidance_scale if guidance_scale_2 is None else guidance_scale_2)
        check_call(prompts, source_prompt, negative_prompt, num_inference_steps, scales, frames_policy, output)
        select_layers(len(self.model.arch.attentions(self.model.transformers[0])), lock.layers)
        frames, pixel_mask, count = fit_to_model(video, mask, self.model.geometry, height, width, frames_policy)
        device = self.model.device
        recorder = Recorder(device)
        stage = _stages(recorder, progress)

        with stage("encode"):
            clean = self.model.encode_video(frames)
            projected = self._project(pixel_mask)
        with stage("text"):
            texts = self._texts(prompts, negative_prompt, source_prompt, guidance_scale)
        solver = FlowSolver(self.pipe.scheduler, num_inference_steps, device)
        noise = _start_noise(latents, clean, generator)
        task = Task(clean, noise, projected, *texts, guidance=scales, lock=lock)
        with stage("denoise"):
            recorder.clock.marks.clear()
            recorder.clock.mark()
            edited = denoise(task, self.model, solver, recorder, lambda k: progress("denoise", k + 1, solver.num_steps))
        self._refuse_nan(recorder, prompts, num_inference_steps)
        decoded: list[np.ndarray] = []
        if output == "frames":
            with stage("decode"):
                decoded = [video[:count].numpy() for video in self.model.decode(edited)]
        warmup = max(0, num_inference_steps - lock.kappa)
        trace = recorder.finish(prompts, warmup, projected.share, solver.timesteps, solver.sigmas)
        self.pipe.maybe_free_model_hooks()
        return EditOutput(decoded, edited.float(), trace, projected)

    def _project(self, pixel_mask: Tensor) -> ProjectedMask:
        projected = project_mask(pixel_mask.to(self.model.device), self.model.geometry)
        if not projected.tokens.any():
            raise InputError("mask is empty: no pixel is marked as foreground")
        if projected.tokens.all():
            message = "mask covers every token: nothing is locked, the whole video is edited"
            warnings.warn(message, InputWarning, stacklevel=4)
        return projected

    def _texts(self, prompts, negative_prompt, source_prompt, guidance_scale) -> tuple[Tensor, Tensor | None, Tensor]:
        guided = guidance_scale > 1
        words = [*prompts, source_prompt, *([negative_prompt or ""] if guided else [])]
        embeds = torch.cat([self.model.encode_prompts([text]) for text in words])
        count = len(prompts)
        negative = embeds[count + 1 :].expand(count, -1, -1) if guided else None
        return embeds[:count], negative, embeds[count : count + 1]

    def _refuse_nan(self, recorder: Recorder, prompts: list[str], steps: int) -> None:
        bad = recorder.first_bad_step()
        if bad is not None:
            raise InputError(f"the latents became NaN or inf at step {bad[0]} of {steps}, prompt {prompts[bad[1]]!r}")


@contextmanager
def _timed(recorder: Recorder, progress: Progress, name: str):
    progress(name, 0, 1)
    start = time.perf_counter()
    yield
    if recorder.device.type == "cuda":
        torch.cuda.synchronize()
    recorder.stages[name] = time.perf_counter() - start
    progress(name, 1, 1)


def _stages(recorder: Recorder, progress: Progress):
    return lambda name: _timed(recorder, progress, name)


def _start_noise(latents: Tensor | None, clean: Tensor, generator: torch.Generator | None) -> Tensor:
    """The noise the edit starts from, [1, C, T, h, w] fp32."""
    if latents is None:
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(clean.shape, generator=generator, device=clean.device, dtype=torch.float32)
    if latents.shape != clean.shape:
        raise InputError(f"latents must be {tuple(clean.shape)}, got {tuple(latents.shape)}")
    return latents.to(device=clean.device, dtype=torch.float32)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
