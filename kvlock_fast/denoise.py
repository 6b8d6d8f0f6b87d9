"""The locked denoising loop.

One screen, one line a formula: where the source is (source.py), how much to lock (controller.py), the forwards under
the lock (models/locking.py), guidance (kernels/guidance.py), the ODE's step (solvers.py).
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.config import LockConfig
from kvlock_fast.controller import Controller
from kvlock_fast.kernels.guidance import cfg_projection_reference, guided_prediction_reference
from kvlock_fast.masks import ProjectedMask
from kvlock_fast.models.locking import Mode, TransformerLock, blend_weight
from kvlock_fast.solvers import FlowSolver
from kvlock_fast.source import InvertedSource, RenoisedSource
from kvlock_fast.trace import Recorder


@dataclass(frozen=True)
class Task:
    """All the loop needs, on the device.

    clean: the source's latent [1, C, T, H, W] fp32; noise: the same shape; prompt, negative: [B, L, C]; source_prompt:
    [1, L, C]; negative is None without classifier-free guidance; guidance: omega0 for each stage.
    """

    clean: Tensor
    noise: Tensor
    mask: ProjectedMask
    prompt: Tensor
    negative: Tensor | None
    source_prompt: Tensor
    guidance: tuple[float, ...]
    lock: LockConfig

    @property
    def batch(self) -> int:
        return self.prompt.shape[0]

    def guided(self, omega0: float) -> bool:
        """Whether guidance follows the lock's rules; a scale of 1 or less is left as it is."""
        return self.negative is not None and omega0 > 1


def denoise(task: Task, model: Any, solver: FlowSolver, recorder: Recorder, progress: Callable[[int], None]) -> Tensor:
    """The edit's clean latents [B, C, T, H, W]; `progress(k)` is called after step k."""
    with Forwards(task, model, solver, recorder) as forwards:
        with recorder.stage("source path"):
            source = _source_path(task, solver, forwards)
        controller = Controller(task.lock, solver.num_steps, task.batch, task.mask.token_latents)
        latents = source.start.expand(task.batch, -1, -1, -1, -1)
        latents = _keep_background(task, latents, source.at(0))
        recorder.begin()
        for k in range(solver.num_steps):
            omega0 = task.guidance[forwards.stage(k)]
            alpha, omega = controller.alpha(k), controller.omega(k, omega0, task.guided(omega0))
            if k < task.lock.zero_init_steps:  # CFG-Zero*: the first predictions are 0, and say nothing of x0
                prediction, s_star, variance = torch.zeros_like(latents), controller.ones, controller.no_variance
            else:
                source_latent = source.at(k) if controller.needs_source(k) else None
                v_source, v_cond, v_uncond = forwards(k, latents, source_latent, alpha)
                prediction, s_star = _guide(task, v_cond, v_uncond, omega, omega0)
                clean = solver.predict_clean(k, prediction, latents)
                source_clean = None if v_source is None else solver.predict_clean(k, v_source, source_latent)
                variance = controller.observe(clean, source_clean)
            latents = solver.step(k, prediction, latents)
            latents = _keep_background(task, latents, source.at(k + 1))
            recorder.step(variance, alpha, omega, s_star, latents)
            progress(k)
        return latents


def _keep_background(task: Task, latents: Tensor, source_latent: Tensor) -> Tensor:
    """Under background_latents="source", the background of the source's path; else the latents as they are."""
    if task.lock.background_latents == "model":
        return latents
    return torch.where(task.mask.token_latents[:, None], latents, source_latent.to(latents.dtype))


def _guide(task: Task, cond: Tensor, uncond: Tensor | None, omega: Tensor, omega0: float) -> tuple[Tensor, Tensor]:
    """The guided prediction and s*: eps = s* eps_u + omega (eps_c - s* eps_u)."""
    lock, ones = task.lock, torch.ones_like(omega)
    if not lock.stock:  # in fp32, or the scheduler would round the latents to the model's dtype
        cond, uncond = cond.float(), None if uncond is None else uncond.float()
    if uncond is None:
        return cond, ones
    if lock.stock_guidance or not task.guided(omega0):  # in the order of diffusers, whose bits they then are
        return uncond + omega0 * (cond - uncond), ones
    s_star = ones
    if lock.s_star:
        where = task.mask.token_latents[:, None] if lock.s_star_region == "foreground" else None
        c, u = (x if where is None else torch.where(where, x, 0.0) for x in (cond, uncond))
        s_star = cfg_projection_reference(c, u)
    return guided_prediction_reference(cond, uncond, omega, s_star), s_star


def _source_path(task: Task, solver: FlowSolver, forwards: "Forwards") -> RenoisedSource | InvertedSource:
    if task.lock.source_path == "renoise":
        return RenoisedSource(task.clean, task.noise, solver)
    return InvertedSource(task.clean, solver, forwards.source_only, task.lock.inversion_solver)


class Forwards:
    """The transformer's forwards of a step, with the lock attached while the context is open."""

    def __init__(self, task: Task, model: Any, solver: FlowSolver, recorder: Recorder):
        self.task, self.model, self.solver, self.recorder = task, model, solver, recorder
        self.locks: list[TransformerLock] = []
        self._exit = ExitStack()
        batching = task.lock.guidance_batching
        self.batched = batching == "batched" or (batching == "auto" and task.lock.locks)
        train_steps = solver.scheduler.config.num_train_timesteps
        self._stages = [model.stage_at(t, train_steps) for t in solver.timesteps.tolist()]
        self._stages.append(self._stages[-1])
        self.background = (~task.mask.tokens[0]).nonzero()[:, 0]

    def __enter__(self) -> "Forwards":
        with ExitStack() as attached:  # what is attached comes off again if one of two transformers is refused
            for transformer in self.model.transformers if self.task.lock.locks else ():
                lock = TransformerLock(transformer, self.model.arch, self.task.lock.layers, self.background)
                attached.callback(lock.detach)
                self.locks.append(lock)
            self._exit = attached.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def stage(self, k: int) -> int:
        """0, or 1 in the low-noise steps of a model that has two stages; for k = T too."""
        return self._stages[k]

    def source_only(self, latents: Tensor, k: int) -> Tensor:
        """The source's own velocity [1, ...] at sigma_k, nothing locked."""
        return self._predict(k, latents, self.task.source_prompt, Mode.OFF)

    def __call__(
        self, k: int, latents: Tensor, source_latent: Tensor | None, alpha: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Velocities of the source [1, ...] (None without its latent), conditional and unconditional [B, ...]."""
        if self.batched:
            return self._together(k, latents, source_latent, alpha)
        return self._apart(k, latents, source_latent, alpha)

    def _together(self, k, latents, source_latent, alpha):
        """One forward; rows: the source, then the prompts' conditional, then their unconditional branch."""
        task, branches = self.task, 1 if self.task.negative is None else 2
        rows = [latents.float()] * branches
        texts = [task.prompt] if branches == 1 else [task.prompt, task.negative]
        mode, weight, lead = Mode.OFF, None, 0
        if source_latent is not None:
            rows, texts, lead = [source_latent, *rows], [task.source_prompt, *texts], 1
            mode = Mode.IN_BATCH if self.locks else Mode.OFF
            weight = blend_weight(alpha.repeat(branches), task.mask.tokens)
        out = self._predict(k, torch.cat(rows), torch.cat(texts), mode, weight)
        source = out[:1] if lead else None
        cond, uncond = (*out[lead:].split(task.batch), None)[:2]
        return source, cond, uncond

    def _apart(self, k, latents, source_latent, alpha):
        """A forward for the source, which keeps its K and V, and one for each branch."""
        task, mode, weight, source = self.task, Mode.OFF, None, None
        if source_latent is not None:
            keep = Mode.CAPTURE if self.locks else Mode.OFF
            source = self._predict(k, source_latent, task.source_prompt, keep)
            mode, weight = Mode.STORED if self.locks else Mode.OFF, blend_weight(alpha, task.mask.tokens)
        cond = self._predict(k, latents, task.prompt, mode, weight)
        uncond = None if task.negative is None else self._predict(k, latents, task.negative, mode, weight)
        if self.locks:
            self.locks[self.model.transformer_of(self.stage(k))].forget()
        return source, cond, uncond

    def _predict(self, k: int, latents: Tensor, text: Tensor, mode: Mode, weight: Tensor | None = None) -> Tensor:
        which, timestep = self.model.transformer_of(self.stage(k)), self.solver.timestep_at(k)
        self.recorder.forwards += latents.shape[0]
        if not self.locks:
            return self.model.predict(which, latents, timestep, text)
        with self.locks[which].forward(mode, weight):
            return self.model.predict(which, latents, timestep, text)
