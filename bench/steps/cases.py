"""A whole denoising step, by this project and by its peers: diffusers as it is, and the lock written in plain torch.

Every contender takes so many steps from the same noise and calls `mark` after each; it returns the latents at the end.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from bench.steps.families import STEPS, WanSteps
from kvlock_fast.conditioning import Conditioning
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.edits import edit_prompts
from kvlock_fast.loop.graph import CapturedLoops, CudaCapture
from kvlock_fast.loop.solver import Solver
from kvlock_fast.loop.task import Task
from kvlock_fast.loop.trace import Recorder
from kvlock_fast.masks import project_mask
from kvlock_fast.planning.find_model import find_model
from kvlock_fast.profiling.extent import find_extent
from kvlock_fast.profiling.subjects import RandomSubject, transformer_config
from kvlock_fast.scene import Scene

Mark = Callable[[], None]
Contender = Callable[[int, Mark], Tensor]
GUIDANCE, EPS = 5.0, 1e-8


@dataclass(frozen=True)
class StepShape:
    """A known model, or a config file, at a length and size; layers: fewer than it has, None for all."""

    name: str
    config: str
    frames: int
    size: tuple[int, int]
    layers: int | None = None


SHAPES = {
    shape.name: shape
    for shape in (
        StepShape("wan-1.3b 81f", "wan-1.3b", 81, (480, 832)),
        StepShape("wan-1.3b 33f", "wan-1.3b", 33, (480, 832)),
        StepShape("cogvideox-2b", "cogvideox-2b", 49, (480, 720)),
        StepShape("demo", "demo", 17, (64, 64)),
        StepShape("quick", "demo", 5, (32, 32), 2),
        StepShape("quick cogvideox", str(Path(__file__).with_name("cogvideox-tiny.json")), 9, (32, 48)),
    )
}
QUICK = ("quick", "quick cogvideox")


class Steps:
    """The same edit for every contender: random weights, noise, texts, a mask over a fifth of the frame."""

    def __init__(self, shape: StepShape, device: torch.device, dtype: torch.dtype):
        # A free edit in which every step is guided: the same forwards for every contender.
        self.lock = LockConfig.preset("free-path", min_predictions=2, guidance_skip=False)
        extent = find_extent(find_model(shape.config), shape.frames, shape.size, shape.layers)
        config = transformer_config(shape.config, extent.model)
        self.subject = RandomSubject(config, extent, self.lock, CacheConfig(), device, dtype)
        self.device, self.extent, self.model = device, extent, self.subject.model
        self.transformer: nn.Module = self.model.transformers[0]
        pixels = torch.from_numpy(self.subject.clip.mask).to(device)
        self.mask = project_mask(pixels, extent.model.geometry)
        self.prompt, self.negative, self.source_prompt = self.subject.texts.split(1)
        generator = torch.Generator().manual_seed(1)
        self.noise = torch.randn(self.subject.clean.shape, generator=generator).to(device)

    def family(self, steps: int) -> WanSteps:
        """What a step is made of, ready for so many."""
        return STEPS[self.model.arch.family](self.model, steps)

    def contenders(self) -> dict[str, Contender]:
        """By name; ours come last."""
        cuda = self.device.type == "cuda"
        found: dict[str, Contender] = {"diffusers, no lock": self.diffusers}
        if cuda:
            found["diffusers, no lock, cuDNN"] = self.diffusers_cudnn
        found["lock in plain torch"] = self.plain
        if cuda:
            found["lock in plain torch, compiled"] = self.compiled
        along, resident = CacheConfig(tier="lockstep"), CacheConfig(tier="resident")
        found["ours, lockstep"], found["ours, resident fp8"] = self.ours(along), self.ours(resident)
        found["ours, host fp8"] = self.ours(CacheConfig(tier="host"))
        found["ours, lockstep, fast"] = self.ours(along, processors="fast")
        found["ours, resident fp8, fast"] = self.ours(resident, processors="fast")
        if cuda:
            found["ours, lockstep, captured"] = self.ours(along, "on")
            found["ours, resident fp8, captured"] = self.ours(resident, "on")
            found["ours, lockstep, fast, captured"] = self.ours(along, "on", processors="fast")
            found["ours, resident fp8, fast, captured"] = self.ours(resident, "on", processors="fast")
        return found

    def rows(self, name: str) -> int:
        """Samples in a step's forwards."""
        return 2 if "no lock" in name or "fp8" in name else 3

    def diffusers(self, steps: int, mark: Mark) -> Tensor:
        """As the family's pipeline steps: its forwards, plain guidance, the scheduler's own step."""
        family, latents = self.family(steps), self.noise
        for k, t in enumerate(family.scheduler.timesteps):
            cond, uncond = family.branches(latents, t, self.prompt, self.negative, self.transformer)
            latents = family.advance(k, uncond + GUIDANCE * (cond - uncond), latents)
            mark()
        return latents

    def diffusers_cudnn(self, steps: int, mark: Mark) -> Tensor:
        """The same with attention by cuDNN."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return self.diffusers(steps, mark)

    def plain(self, steps: int, mark: Mark, transformer: nn.Module | None = None) -> Tensor:
        """The lock as one would write it on top of diffusers: hooks, lines of torch, numbers read by the host."""
        transformer, lock = transformer or self.transformer, self.lock
        family, latents, history = self.family(steps), self.noise, []
        inside, clean = self.mask.latents[:, None], self.subject.clean
        latents = torch.where(inside, latents, self.renoised(family, 0))
        alpha, omega, first = lock.warmup_alpha, GUIDANCE, max(0, steps - lock.kappa)
        with plain_lock(transformer, self.mask.tokens[0], family) as state:
            for k, t in enumerate(family.scheduler.timesteps):
                state["alpha"] = alpha
                rows = torch.cat([self.renoised(family, k), latents, latents])
                texts = torch.cat([self.source_prompt, self.prompt, self.negative])
                _, cond, uncond = family.forward(rows, t, texts, transformer).float().split(1)
                s_star = (cond * uncond).sum() / ((uncond * uncond).sum() + EPS)
                prediction = s_star * uncond + omega * (cond - s_star * uncond)
                history = [*history, family.clean(k, latents, prediction)][-lock.variance_window :]
                latents = family.advance(k, prediction, latents)
                after = self.renoised(family, k + 1) if k + 1 < steps else clean
                latents = torch.where(inside, latents, after)
                if len(history) > 1:
                    variance = torch.stack(history).var(0)[inside.expand_as(latents)].mean().item()
                    if k + 1 >= first:
                        alpha = min(max(variance / lock.tau, lock.alpha_floor), 1.0)
                        omega = max(GUIDANCE * min(variance / lock.tau, lock.b), lock.omega_floor)
                mark()
        return latents

    def compiled(self, steps: int, mark: Mark) -> Tensor:
        """The same with the transformer's blocks compiled; the first run compiles."""
        if not hasattr(self, "_compiled"):
            self._compiled = copy.deepcopy(self.transformer)
            for block in getattr(self._compiled, self.family(1).blocks):
                block.compile()
        return self.plain(steps, mark, self._compiled)

    def renoised(self, family: WanSteps, k: int) -> Tensor:
        """The source's latent at step k."""
        a, b = family.levels(k)
        return a * self.subject.clean + b * self.noise

    def ours(
        self,
        cache: CacheConfig,
        graph: str = "off",
        lock: LockConfig | None = None,
        prompts: int = 1,
        processors: str = "generic",
    ) -> Contender:
        """This project's loop; the source's own pass, where it is stored, is not marked."""
        lock = lock or self.lock
        loops = CapturedLoops(CudaCapture(self.device)) if graph == "on" else None

        @torch.no_grad()
        def run(steps: int, mark: Mark) -> Tensor:
            def progress(stage: str, done: int, total: int) -> None:
                if stage == "denoise" and done:
                    mark()

            solver = Solver(self.family(steps).scheduler, steps, self.device)
            frames = torch.from_numpy(self.subject.clip.video)
            scene = Scene(self.model, lock, solver, frames, len(frames), self.mask, "", None, None, loops)
            scene.processors = processors
            scene.place(self.subject.clean, self.noise, None)
            texts = [Conditioning(text=x) for x in (self.prompt, self.negative, self.source_prompt)]
            texts[:2] = (x.expand(prompts) for x in texts[:2])
            task = Task(self.mask, *texts, guidance=(GUIDANCE, GUIDANCE), lock=lock)
            with TemporaryDirectory() as folder:
                there = replace(cache, root=str(Path(folder)))
                return edit_prompts(task, scene, there, Recorder(self.device), progress)

        return run


@contextmanager
def plain_lock(transformer: nn.Module, foreground: Tensor, family: WanSteps) -> Iterator[dict[str, float]]:
    """Forward hooks that blend the background's keys and values of rows 1.. with row 0's by state["alpha"]."""
    state, handles = {"alpha": 1.0}, []

    def blend(module: nn.Module, arguments: Any, out: Tensor) -> Tensor:
        alpha, video = state["alpha"], family.video(out)
        source, own = video[:1], video[1:]
        where = foreground.view(1, -1, *[1] * (video.ndim - 2))
        video[1:] = torch.where(where, own, alpha * source + (1 - alpha) * own)
        return out

    for block in getattr(transformer, family.blocks):
        handles += [block.attn1.norm_k.register_forward_hook(blend), block.attn1.to_v.register_forward_hook(blend)]
    try:
        yield state
    finally:
        for handle in handles:
            handle.remove()
