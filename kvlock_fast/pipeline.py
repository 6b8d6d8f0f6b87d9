"""KV-Lock as a pipeline: encode, source pass, locked denoising, decode."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlock_fast.cache.entry import EntryWriter
from kvlock_fast.conditioning import Conditioning
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.edits import edit_prompts
from kvlock_fast.errors import InputError, warn
from kvlock_fast.locking.compatibility import compiled_blocks
from kvlock_fast.locking.fast_path import check_processors
from kvlock_fast.locking.turns import one_at_a_time
from kvlock_fast.loop.graph import CapturedLoops, choose_capture
from kvlock_fast.loop.inputs import as_mask, as_video, check_numbers, check_texts
from kvlock_fast.loop.task import Task
from kvlock_fast.loop.trace import Recorder, Trace
from kvlock_fast.masks import ProjectedMask
from kvlock_fast.media import paste
from kvlock_fast.models import load_diffusers, wrap_pipeline
from kvlock_fast.models.protocols import Pipeline
from kvlock_fast.models.schedulers import check_scheduler
from kvlock_fast.open_scene import Wanted, open_scene, staged
from kvlock_fast.planning.run_with_memory import Way, run_with_memory
from kvlock_fast.renamed import renamed
from kvlock_fast.scene import Progress, Scene
from kvlock_fast.settings import COMPILE, GRAPH


@dataclass(frozen=True)
class EditOutput:
    """frames: one [F, H, W, 3] uint8 array a prompt (empty for output="latent"), the model's or their composites;
    latents: [B, C, T, h, w] fp32, normalised; trace: what happened at each step; mask: the mask as the model saw it.
    """

    frames: list[np.ndarray]
    latents: Tensor
    trace: Trace
    mask: ProjectedMask


class KVLockPipeline:
    """Edits the masked region of a video with a diffusers pipeline, the rest locked to the source."""

    def __init__(self, pipe: Pipeline):
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
    def from_pipe(cls, pipe: Pipeline) -> "KVLockPipeline":
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
        composite: bool = False,
        progress: Progress | None = None,
    ) -> EditOutput:
        """Edit `video` where `mask` is True.

        Args:
            video: uint8 [F, H, W, 3], as an array, a tensor or a list of frames.
            mask: bool [F, H, W], or [1, H, W] or [H, W] for all frames, of the video's size.
            source_prompt: what the source shows in the mask, and around it; other objects are left out.
            prompt: what the edit shall show there; several are edited in one batch.
            negative_prompt: what it shall not show; None for the family's own.
            num_inference_steps: steps of the scheduler.
            guidance_scale: omega0, the scale of classifier-free guidance; 1 or less runs no negative branch.
            guidance_scale_2: the same for the low-noise transformer of a model with two; None: guidance_scale.
            generator: where the starting noise is drawn from.
            latents: the starting noise [1, C, T, h, w] itself, instead of a generator.
            height, width: pixels to work at, the nearest that the model takes; None for the video's.
            frames_policy: for a number of frames that the model cannot take, "pad" (repeat the last frame, cut back
                afterwards), "trim" or "error".
            clip_frames: the most frames that go through the model at once; None for all.
            clip_overlap: frames that neighbouring stretches share and blend; None for a quarter of clip_frames.
            lock: when and how to lock; None for `LockConfig()`.
            cache: where the source's K and V come from; None for `CacheConfig()`. One made by `invert` brings its
                noise along: give no generator or latents, or the same.
            graph: whether steps are captured in CUDA graphs, "off", "on", or "auto" (where they can be; a warning says
                why not).
            compile: "regional" has torch.compile take the transformer's blocks, "off" leaves them as they are.
            processors: the attention of locked layers. "generic" is diffusers' own, its keys and values blended in
                place; "fast" has one kernel do norms, rotation, blending and keeping, the same to rounding (Wan,
                CogVideoX, LTX, HunyuanVideo); "auto" is "fast" on CUDA where the model has it and a trial of the kernel
                agrees with plain torch, else "generic".
            ladder: whether the cache is planned for, and smaller ways are tried when memory runs out; without it
                `cache` is taken to the letter, and its tier "auto" is lockstep.
            output: "frames", or "latent" to skip decoding.
            composite: whether frames have the video's size and, outside the mask, its own pixels, as `kvf.composite`
                makes them and the command line delivers them; else they are the model's own.
            progress: called as progress(stage, done, total) along the way.

        Returns:
            The edits' frames, latents, trace and the mask as the model has it.

        Raises:
            InputError: (a ValueError) on bad input. What is changed to fit is said in a warning.
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
        if composite and output == "latent":
            raise InputError("composite=True needs frames, got output='latent'")
        recorder = Recorder(self.model.device)
        wanted = Wanted(
            video=video, mask=mask, source_prompt=source_prompt, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, generator=generator, latents=latents, height=height, width=width,
            frames_policy=frames_policy, lock=lock, cache=cache, processors=processors, clip_frames=clip_frames,
            clip_overlap=clip_overlap,
        )  # fmt: skip
        captured = partial(self._captured, graph)
        with (
            one_at_a_time(self.model.transformers),
            open_scene(self.model, wanted, recorder, progress, captured) as scene,
        ):
            scene.kept_loops = self._loops
            with staged(recorder, progress, "text"):
                texts = self._texts(prompts, negative_prompt, source_prompt, scene)
                source_negative = scene.source_negative(negative_prompt or "")
            second = guidance_scale if guidance_scale_2 is None else guidance_scale_2
            scales = tuple(self.model.omega0(scale) for scale in (guidance_scale, second))
            task = Task(scene.mask, *texts, scales, scene.lock, self.model.latents_dtype, self.model.settle,
                        source_negative)  # fmt: skip

            def run(way: Way) -> tuple[Tensor, list[np.ndarray]]:
                blocks = compiled_blocks(self.model.transformers, compile, self.model.arch.blocks)
                with staged(recorder, progress, "denoise"), blocks:
                    edited = edit_prompts(task, scene, way.cache, recorder, progress)
                    edited = self.model.last_latents(edited, task.prompt)
                _refuse_nan(recorder, prompts, scene.solver.num_steps)
                if output == "latent":
                    return edited, []
                with staged(recorder, progress, "decode"):
                    videos = self.model.decode(edited, len(scene.frames), tiled=way.tiled_decoding)
                return edited, [self.model.own_frames(video, scene.count).numpy() for video in videos]

            if ladder and not scene.shared:  # what one process has room for, another may not
                edited, decoded = run_with_memory(run, scene, task, cache)
            else:
                edited, decoded = run(Way(cache))
        warmup, solver = max(0, scene.solver.num_steps - lock.kappa), scene.solver
        trace = recorder.finish(prompts, warmup, scene.mask, solver.timesteps, solver.sigmas)
        if composite:
            source = as_video(video)
            shown = as_mask(mask, *source.shape[:3])
            decoded = [paste.composite(source[: len(one)], one, shown[: len(one)]) for one in decoded]
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
        """Run the source once and keep its K and V in a folder, for `CacheConfig(path=output)`.

        The arguments are those of a call. Of the lock count the layers, the source's path and what decides which steps
        lock (alpha, warmup_alpha, kappa); of the cache the format, step_stride and steps; guidance_scale counts for
        models that take it as an input.

        Args:
            output: the folder. An earlier cache in it is replaced when the new one is whole; other files stay.
            notes: plain values to keep in the manifest, such as {"seed": 3}.

        Returns:
            The facts of the cache's manifest.

        Raises:
            InputError: on bad input.
            OutputError: where the folder cannot be written.
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
        wanted = Wanted(
            video=video, mask=mask, source_prompt=source_prompt, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, generator=generator, latents=latents, height=height, width=width,
            frames_policy=frames_policy, lock=lock, cache=replace(cache, tier="disk"), processors=processors,
        )  # fmt: skip
        with one_at_a_time(self.model.transformers), open_scene(self.model, wanted, recorder, progress) as scene:
            with staged(recorder, progress, "text"):
                text = self.model.condition_source([source_prompt], scene.given_source)
                negative = scene.source_negative("")
            with EntryWriter(output) as writer, staged(recorder, progress, "source pass"):
                return scene.save(text, cache, writer, recorder, progress, notes or {}, negative)

    def _captured(self, graph: str, why_not: str | None) -> CapturedLoops | None:
        """Where captured steps are kept; None where they are not captured."""
        capture = choose_capture(graph, self.model.device, why_not)
        if capture is None:
            return None
        kept = self._loops and getattr(self._loops.capture, "device", None)
        if self._loops is None or kept != getattr(capture, "device", None):
            self._loops = CapturedLoops(capture)
        return self._loops

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
        if negative is None and scene.lock.guidance_interval is not None:
            interval = scene.lock.guidance_interval
            warn(f"guidance_interval {interval} changes nothing: no step of this edit has an unconditional branch")
        return Conditioning.cat(told), negative, self.model.condition_source([source_prompt], scene.given_source)


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
