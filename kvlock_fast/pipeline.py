"""KV-Lock as a pipeline: encode, source path, locked denoising, decode."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.denoise import Task, denoise
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.inputs import check_numbers, check_texts, fit_to_model
from kvlock_fast.masks import ProjectedMask, project_mask
from kvlock_fast.models import load_diffusers, wrap_pipeline
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
        if str(path) == "demo":
            from kvlock_fast.demo import model_path

            path = model_path()
        return cls(load_diffusers(path, torch_dtype))

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
        lock, progress = _lock(lock), progress or (lambda stage, done, total: None)
        if cache is not None and not isinstance(cache, CacheConfig):
            raise InputError(f"cache must be a CacheConfig, got {cache!r}")
        prompts = check_texts(prompt, source_prompt, negative_prompt)
        check_numbers(num_inference_steps, guidance_scale, guidance_scale_2, self.model.two_stages)
        if output not in ("frames", "latent"):
            raise InputError(f"output must be frames or latent, got {output!r}")
        for transformer in self.model.transformers:
            select_layers(len(self.model.arch.attentions(transformer)), lock.layers)
        frames, pixel_mask, count = fit_to_model(video, mask, self.model.geometry, height, width, frames_policy)
        device = self.model.device
        recorder = Recorder(device)
        try:
            with _stage(recorder, progress, "encode"):
                clean = self.model.encode_video(frames)
                projected = self._project(pixel_mask)
            with _stage(recorder, progress, "text"):
                texts = self._texts(prompts, negative_prompt, source_prompt, guidance_scale)
            solver = FlowSolver(self.pipe.scheduler, num_inference_steps, device)
            noise = _start_noise(latents, clean, generator)
            scales = (guidance_scale, guidance_scale if guidance_scale_2 is None else guidance_scale_2)
            task = Task(clean, noise, projected, *texts, guidance=scales, lock=lock)
            with _stage(recorder, progress, "denoise"):
                step_done = partial(_step_done, progress, solver.num_steps)
                edited = denoise(task, self.model, solver, recorder, step_done)
            _refuse_nan(recorder, prompts, num_inference_steps)
            decoded: list[np.ndarray] = []
            if output == "frames":
                with _stage(recorder, progress, "decode"):
                    decoded = [edit[:count].numpy() for edit in self.model.decode(edited)]
        finally:
            self.pipe.maybe_free_model_hooks()
        warmup = max(0, num_inference_steps - lock.kappa)
        trace = recorder.finish(prompts, warmup, projected.share, solver.timesteps, solver.sigmas)
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


@contextmanager
def _stage(recorder: Recorder, progress: Progress, name: str) -> Iterator[None]:
    progress(name, 0, 1)
    with recorder.stage(name):
        yield
    if name != "denoise":  # which reports its steps
        progress(name, 1, 1)


def _step_done(progress: Progress, total: int, k: int) -> None:
    progress("denoise", k + 1, total)


def _lock(lock: Any) -> LockConfig:
    if lock is None:
        return LockConfig.preset("kvlock")
    if not isinstance(lock, LockConfig):
        raise InputError(f"lock must be a LockConfig, such as LockConfig.preset('paper'), got {lock!r}")
    return lock


def _refuse_nan(recorder: Recorder, prompts: list[str], steps: int) -> None:
    bad = recorder.first_bad_step()
    if bad is not None:
        raise InputError(f"the latents became NaN or inf at step {bad[0]} of {steps}, prompt {prompts[bad[1]]!r}")


def _start_noise(latents: Tensor | None, clean: Tensor, generator: torch.Generator | None) -> Tensor:
    """The noise the edit starts from, [1, C, T, h, w] fp32."""
    if latents is None:
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(clean.shape, generator=generator, device=clean.device, dtype=torch.float32)
    if not isinstance(latents, Tensor):
        raise InputError(f"latents must be a torch.Tensor, got {type(latents).__name__}")
    if latents.shape != clean.shape:
        raise InputError(f"latents must be {tuple(clean.shape)}, got {tuple(latents.shape)}")
    return latents.to(device=clean.device, dtype=torch.float32)
