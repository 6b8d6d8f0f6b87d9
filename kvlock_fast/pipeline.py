"""KV-Lock as a pipeline: encode, source pass, locked denoising, decode."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlock_fast.cache.entry import EntryWriter
from kvlock_fast.cache.saved_source import SavedSource
from kvlock_fast.conditioning import Conditioning
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.edits import Scene, edit_prompts
from kvlock_fast.errors import InputError, warn
from kvlock_fast.locking.arch import select_layers
from kvlock_fast.locking.compatibility import compiled_blocks
from kvlock_fast.locking.fast_path import check_processors
from kvlock_fast.locking.turns import one_at_a_time
from kvlock_fast.loop.graph import CapturedLoops, choose_capture, why_not_captured
from kvlock_fast.loop.inputs import check_numbers, check_texts, fit_to_model
from kvlock_fast.loop.parallel import CAPTURED, check_tokens, check_transformers
from kvlock_fast.loop.solver import Solver
from kvlock_fast.loop.task import Task
from kvlock_fast.loop.trace import Recorder, Trace
from kvlock_fast.loop.windows import Windows, asked_for
from kvlock_fast.masks import ProjectedMask
from kvlock_fast.methods import refuse_method
from kvlock_fast.models import load_diffusers, wrap_pipeline
from kvlock_fast.models.schedulers import check_scheduler
from kvlock_fast.planning.run_with_memory import Way, run_with_memory
from kvlock_fast.renamed import renamed
from kvlock_fast.settings import COMPILE, GRAPH

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
        self._loops: CapturedLoops | None = None
        check_scheduler(pipe.scheduler, self.model.arch.flow, self.model.shifts_by_size)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, torch_dtype: torch.dtype | dict | None = None) -> "KVLockPipeline":
        """Load a diffusers pipeline from a folder or by hub id ("demo": the bundled model), safetensors only.

        A single `torch_dtype` leaves the autoencoder in fp32, as Wan asks for. Raises InputError when there is no such
        model or its family is not known.
        """
        if str(path) == "demo":
            from kvlock_fast.models.bundled import model_path

            path = model_path()
        return cls(load_diffusers(path, torch_dtype))

    @classmethod
    def from_pipe(cls, pipe: Any) -> "KVLockPipeline":
        """Around a diffusers pipeline that is loaded already; it stays usable as it is."""
        return cls(pipe)

    def to(self, *args: Any, **kwargs: Any) -> "KVLockPipeline":
        """Move the models, as `DiffusionPipeline.to`."""
        self._loops = None
        self.pipe.to(*args, **kwargs)
        return self

    @renamed(window="clip_frames", overlap="clip_overlap")
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
        clip_frames: int | None = None,
        clip_overlap: int | None = None,
        lock: LockConfig | None = None,
        cache: CacheConfig | None = None,
        graph: str = "off",
        compile: str = "off",
        processors: str = "auto",
        ladder: bool = True,
        output: str = "frames",
        progress: Progress | None = None,
    ) -> EditOutput:
        """Edit `video` where `mask` is True.

        video: uint8 [F, H, W, 3] (array, tensor, or a list of frames); mask: bool [F, H, W], [1, H, W] or [H, W] (for
        all frames), at the video's size; prompt: one, or several for the same source, edited in one batch; latents: the
        starting noise [1, C, T, h, w] instead of drawing it from `generator`; height, width: the size to work at
        (default: the video's; the nearest the model can take); frames_policy: what to do with a frame count that the
        model cannot take: "pad" (repeat the last frame, cut back afterwards), "trim" or "error"; guidance_scale_2: for
        the low-noise transformer of a model with two; clip_frames: the most frames that go through the model at once,
        for clips longer than what it was made for, and clip_overlap: frames that neighbours share and blend (default a
        quarter of clip_frames); lock: default LockConfig(); cache: where the source's K and V come from (one made by
        `invert` brings its noise along: give no generator or latents, or the same); graph: whether the steps are
        captured in CUDA graphs, "off", "on", or "auto" (where they can be; a warning says why not); compile: "regional"
        has torch.compile take the transformer's blocks, "off" leaves them as they are; processors: by which attention
        the locked layers go: "generic" is diffusers' own, its keys and values blended in place; "fast" has one kernel
        do norms, rotation, blending and keeping, the same to rounding (Wan, CogVideoX, LTX, HunyuanVideo); "auto" is
        "fast" on CUDA where the model has it and a trial of the kernel there agrees with plain torch, else "generic":
        without the kernel there is nothing to gain; ladder: whether the cache is planned for and smaller ways are tried
        when memory runs out (without, `cache` is taken to the letter, and "auto" is lockstep); output: "frames" or
        "latent"; progress(stage, done, total) is called along the way.

        Raises InputError (a ValueError) on bad input; warns where the input is changed to fit.
        """
        lock, cache, progress = _lock(lock), _cache(cache), progress or (lambda stage, done, total: None)
        prompts = check_texts(prompt, source_prompt, negative_prompt)
        check_numbers(num_inference_steps, guidance_scale, guidance_scale_2, self.model.two_stages)
        if graph not in GRAPH:
            raise InputError(f"graph must be one of {', '.join(GRAPH)}, got {graph!r}")
        if compile not in COMPILE:
            raise InputError(f"compile must be one of {', '.join(COMPILE)}, got {compile!r}")
        if compile != "off" and lock.method != "lock":
            raise InputError(f"compile {compile!r} does not go with the method {lock.method!r}")
        check_processors(processors, self.model)
        if output not in ("frames", "latent"):
            raise InputError(f"output must be frames or latent, got {output!r}")
        windows = self._windows(clip_frames, clip_overlap)
        recorder = Recorder(self.model.device)
        with one_at_a_time(self.model.transformers), self._scene(
            (video, mask, height, width, frames_policy), source_prompt, num_inference_steps, (latents, generator),
            lock, cache, recorder, progress, guidance_scale, graph, windows, processors,
        ) as scene:  # fmt: skip
            with _stage(recorder, progress, "text"):
                texts = self._texts(prompts, negative_prompt, source_prompt, scene)
                source_negative = scene.source_negative(negative_prompt or "")
            second = guidance_scale if guidance_scale_2 is None else guidance_scale_2
            scales = tuple(self.model.omega0(scale) for scale in (guidance_scale, second))
            task = Task(scene.mask, *texts, scales, scene.lock, self.model.latents_dtype, self.model.settle,
                        source_negative)  # fmt: skip

            def run(way: Way) -> tuple[Tensor, list[np.ndarray]]:
                blocks = compiled_blocks(self.model.transformers, compile, self.model.arch.blocks)
                with _stage(recorder, progress, "denoise"), blocks:
                    edited = edit_prompts(task, scene, way.cache, recorder, progress)
                    edited = self.model.last_latents(edited, task.prompt)
                _refuse_nan(recorder, prompts, scene.solver.num_steps)
                if output == "latent":
                    return edited, []
                with _stage(recorder, progress, "decode"):
                    videos = self.model.decode(edited, len(scene.frames), tiled=way.tiled_decoding)
                return edited, [self.model.own_frames(video, scene.count).numpy() for video in videos]

            if ladder and not scene.shared:  # what one process has room for, another may not
                edited, decoded = run_with_memory(run, scene, task, cache)
            else:
                edited, decoded = run(Way(cache))
        warmup, solver = max(0, scene.solver.num_steps - lock.kappa), scene.solver
        trace = recorder.finish(prompts, warmup, scene.mask, solver.timesteps, solver.sigmas)
        return EditOutput(decoded, edited.float(), trace, scene.mask)

    @torch.no_grad()
    def invert(
        self,
        video: np.ndarray | Tensor | Sequence,
        mask: np.ndarray | Tensor,
        output: str | Path,
        *,
        source_prompt: str,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        frames_policy: str = "pad",
        lock: LockConfig | None = None,
        cache: CacheConfig | None = None,
        processors: str = "auto",
        notes: dict[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Run the source once and keep its K and V in the folder `output`, for `CacheConfig(path=output)`.

        The arguments are those of a call; of `lock` the layers, the source's path and what decides which steps lock
        (alpha, warmup_alpha, kappa) count, guidance_scale only for models that take it as an input, of `cache` the
        format, step_stride and steps. notes: plain values to keep in the manifest, such as {"seed": 3}. An earlier
        cache in the folder is replaced when the new one is whole; other files stay. Returns the facts of the manifest.

        Raises InputError on bad input, OutputError where the folder cannot be written.
        """
        lock, cache, progress = _lock(lock), _cache(cache), progress or (lambda stage, done, total: None)
        check_texts("", source_prompt, None)
        check_numbers(num_inference_steps, guidance_scale, None, self.model.two_stages)
        check_processors(processors, self.model)
        if cache.path is not None:
            raise InputError(f"cache must not have a path, got {str(cache.path)!r}: the output is where it is made")
        if not lock.locks:
            raise InputError("lock never locks (alpha is 0): there is nothing to keep of the source")
        recorder = Recorder(self.model.device)
        with one_at_a_time(self.model.transformers), self._scene(
            (video, mask, height, width, frames_policy), source_prompt, num_inference_steps, (latents, generator),
            lock, replace(cache, tier="disk"), recorder, progress, guidance_scale, processors=processors,
        ) as scene:  # fmt: skip
            with _stage(recorder, progress, "text"):
                text = self.model.condition_source([source_prompt], scene.given_source)
                negative = scene.source_negative("")
            with EntryWriter(output) as writer, _stage(recorder, progress, "source pass"):
                return scene.save(text, cache, writer, recorder, progress, notes or {}, negative)

    @contextmanager
    def _scene(
        self,
        clip: tuple[Any, Any, int | None, int | None, str],
        source_prompt: str,
        num_steps: int,
        noise: tuple[Tensor | None, torch.Generator | None],
        lock: LockConfig,
        cache: CacheConfig,
        recorder: Recorder,
        progress: Progress,
        guidance_scale: float,
        graph: str = "off",
        windows: Windows | None = None,
        processors: str = "auto",
    ) -> Iterator[Scene]:
        """The source, encoded or taken from the cache that `cache` names; its files are open meanwhile."""
        shard = check_transformers(self.model, lock, cache, noise)
        for transformer in self.model.transformers:
            count = len(self.model.arch.attentions(transformer))
            if len(select_layers(count, lock.layers)) < count and lock.compute == "foreground":
                left_out = f"layers {list(lock.layers)} leaves out some of {count}"
                raise InputError(f"compute 'foreground' needs every layer locked: {left_out}")
        if lock.compute == "foreground" and not hasattr(self.model, "predict_foreground"):
            raise InputError(f"compute 'foreground' is not there for the family {self.model.arch.family}")
        saved = None if cache.path is None else SavedSource.open(cache.path)
        try:
            video, mask, height, width, policy = clip
            if saved is not None and height is None and width is None:
                height, width = saved.size
            at_once = None if windows is None else windows.frames
            can_be_cut = not self.model.told_of_frames
            fitted = fit_to_model(video, mask, self.model.geometry, height, width, policy, at_once, can_be_cut)
            frames, pixel_mask, count = fitted
            windows = _if_longer(windows, len(frames), cache)
            check_scheduler(self.pipe.scheduler, self.model.arch.flow, self.model.shifts_by_size)
            at_once = len(frames) if windows is None else windows.frames
            settings = self.model.timesteps_settings(num_steps, at_once, *frames.shape[1:3])
            solver = Solver(self.pipe.scheduler, num_steps, self.model.device, settings, lock.skip_steps)
            parted = "clip_frames" if windows is not None else "context parallelism" if shard is not None else None
            refuse_method(lock, self.model, solver, cache, parted)
            if solver.table is None and not lock.stock:
                name = type(self.pipe.scheduler).__name__
                message = f"scheduler {name} has no table of its steps: it is called itself, which is slower"
                warn(message)
            several = "the clip goes through the model in stretches" if windows is not None else None
            several = several if shard is None else CAPTURED
            loops = self._captured(graph, several or why_not_captured(self.model, lock, solver))
            with _stage(recorder, progress, "encode"):
                mask = self._project(pixel_mask)
                check_tokens(shard, mask, windows, self.model.geometry)
                clean = None if saved is not None else self.model.encode_video(frames)
            if lock.compute == "foreground" and mask.tokens.all():
                message = "mask covers every token: compute 'foreground' has nothing to leave out, computing in full"
                warn(message)
                # A halo goes with the source's latents only, which compute 'foreground' kept until here.
                lock = replace(lock, compute="full", background_latents="source")
            scene = Scene(self.model, lock, solver, frames, count, mask, source_prompt, saved, windows, loops)
            scene.kept_loops, scene.pixels, scene.guidance_scale = self._loops, pixel_mask, guidance_scale
            scene.processors, scene.shared = processors, shard is not None
            scene.place(clean, *noise)
            yield scene
        except torch.OutOfMemoryError as error:  # outside of the ladder
            raise InputError("there is too little memory on the device: use a smaller size or fewer frames") from error
        finally:
            if saved is not None:
                saved.entry.close()
            self.pipe.maybe_free_model_hooks()

    def _windows(self, frames: int | None, overlap: int | None) -> Windows | None:
        """How a long clip is cut. Raises InputError where it cannot be."""
        windows = asked_for(frames, overlap)
        if windows is not None:
            if self.model.told_of_frames:
                raise InputError(
                    f"clip_frames does not go with the family {self.model.arch.family}, which sees the whole clip"
                )
            windows.latent_sizes(self.model.geometry)
        return windows

    def _captured(self, graph: str, why_not: str | None) -> CapturedLoops | None:
        """Where captured steps are kept; None where they are not captured."""
        capture = choose_capture(graph, self.model.device, why_not)
        if capture is None:
            return None
        kept = self._loops and getattr(self._loops.capture, "device", None)
        if self._loops is None or kept != getattr(capture, "device", None):
            self._loops = CapturedLoops(capture)
        return self._loops

    def _project(self, pixel_mask: Tensor) -> ProjectedMask:
        projected = self.model.project(self.model.may_change(pixel_mask).to(self.model.device))
        if not projected.tokens.any():
            raise InputError("mask is empty: no pixel is marked as foreground")
        if projected.tokens.all():
            message = "mask covers every token: nothing is locked, the whole video is edited"
            warn(message)
        return projected

    def _texts(
        self, prompts: list[str], negative_prompt: str | None, source_prompt: str, scene: Scene
    ) -> tuple[Conditioning, Conditioning | None, Conditioning]:
        """What the model is told of the prompts, of the negative one and of the source's."""
        given = scene.given
        told = [self.model.condition([text], given) for text in prompts]
        negative = None
        asked = negative_prompt is not None or not self.model.guided_if_asked
        if asked and self.model.guided(given.guidance_scale):
            negative = self.model.condition_negative(negative_prompt or "", prompts, given)
        return Conditioning.cat(told), negative, self.model.condition_source([source_prompt], scene.given_source)


@contextmanager
def _stage(recorder: Recorder, progress: Progress, name: str) -> Iterator[None]:
    progress(name, 0, 1)
    with recorder.stage(name):
        yield
    if name not in ("denoise", "source pass"):  # which report their steps
        progress(name, 1, 1)


def _if_longer(windows: Windows | None, frames: int, cache: CacheConfig) -> Windows | None:
    """The windows of a clip that is longer than one; InputError where stretches cannot have this cache."""
    if windows is None or frames <= windows.frames:
        return None
    if cache.path is not None or cache.tier == "disk":
        where = f"the cache {str(cache.path)!r}" if cache.path is not None else "the cache tier disk"
        raise InputError(f"clip_frames does not go with {where}: stretches are kept in memory or run along only")
    return windows


def _lock(lock: Any) -> LockConfig:
    if lock is None:
        return LockConfig()
    if not isinstance(lock, LockConfig):
        raise InputError(f"lock must be a LockConfig, such as LockConfig.preset('paper'), got {lock!r}")
    return lock


def _cache(cache: Any) -> CacheConfig:
    if cache is None:
        return CacheConfig()
    if not isinstance(cache, CacheConfig):
        raise InputError(f"cache must be a CacheConfig, got {cache!r}")
    return cache


def _refuse_nan(recorder: Recorder, prompts: list[str], steps: int) -> None:
    bad = recorder.first_bad_step()
    if bad is not None:
        raise InputError(f"the latents became NaN or inf at step {bad[0]} of {steps}, prompt {prompts[bad[1]]!r}")
