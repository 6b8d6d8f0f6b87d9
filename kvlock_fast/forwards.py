"""The transformer's forwards under the lock: who shares a batch, and where the source's K and V come from."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.config import LockConfig
from kvlock_fast.foreground import Region
from kvlock_fast.masks import ProjectedMask
from kvlock_fast.models.locking import KeptKV, Mode, TransformerLock, blend_weight
from kvlock_fast.models.ranges import layer_ranges
from kvlock_fast.models.sharding import shard_of
from kvlock_fast.nvtx import span
from kvlock_fast.solvers import Solver
from kvlock_fast.trace import Recorder

Combine = Callable[[Tensor, Tensor | None, float, Tensor, Tensor], Tensor]
"""Of the conditional and the unconditional prediction (None without guidance), a guidance scale, the latents and their
sigma: what goes to the scheduler, in the order of a pipeline's own bits.
"""


def classifier_free(cond: Tensor, uncond: Tensor | None, scale: float, latents: Tensor, sigma: Tensor) -> Tensor:
    """As most of diffusers' pipelines guide."""
    return cond if uncond is None else uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class Task:
    """What is asked of the loop, on the device.

    prompt, negative: of B samples; source_prompt: of one; negative is None without classifier-free guidance; guidance:
    omega0 for each stage; latents_dtype: of the latents between steps that are diffusers' own; combine: how the
    family's pipeline guides; source_negative: of one, where the source is guided by itself.
    """

    mask: ProjectedMask
    prompt: Conditioning
    negative: Conditioning | None
    source_prompt: Conditioning
    guidance: tuple[float, ...]
    lock: LockConfig
    latents_dtype: torch.dtype = torch.float32
    combine: Combine = classifier_free
    source_negative: Conditioning | None = None

    def of(self, samples: tuple[int, ...]) -> "Task":
        """Of some of the samples."""
        if samples == tuple(range(self.batch)):
            return self
        # By slices: an index would be a copy from the host.
        some = [
            None if x is None else Conditioning.cat([x.part(i, i + 1) for i in samples])
            for x in (self.prompt, self.negative)
        ]
        return replace(self, prompt=some[0], negative=some[1])

    @property
    def batch(self) -> int:
        return self.prompt.rows

    def guided(self, omega0: float) -> bool:
        """Whether guidance follows the lock's rules; a scale of 1 or less is left as it is."""
        return self.negative is not None and omega0 > 1


class Predictor:
    """The model's transformers with the lock attached while the context is open."""

    def __init__(
        self,
        model: Any,
        solver: Solver,
        lock: LockConfig,
        background: Tensor,
        recorder: Recorder,
        processors: str = "auto",
    ):
        """background: indices [N] of the tokens whose K and V are kept apart from the batch; processors: by which
        attention forwards that lock go, as `KVLockPipeline` has it.
        """
        self.model, self.solver, self.lock, self.recorder = model, solver, lock, recorder
        self.processors = processors
        self.background = background
        self.locks: list[TransformerLock] = []
        self._exit = ExitStack()
        self._stages = [model.stage_at(t, solver.num_train_timesteps) for t in solver.timesteps.tolist()]
        self._stages.append(self._stages[-1])

    def __enter__(self) -> "Predictor":
        with ExitStack() as attached:  # what is attached comes off again if one of two transformers is refused
            for transformer in self.model.transformers if self.lock.locks else ():
                arch, layers = self.model.arch, self.lock.layers
                lock = TransformerLock(transformer, arch, layers, self.background, self.processors)
                attached.callback(lock.detach)
                self.locks.append(lock)
            for transformer in self.model.transformers:
                attached.enter_context(layer_ranges(transformer, self.model.arch))
            self._exit = attached.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def use_background(self, background: Tensor) -> None:
        """Keep and blend these tokens from now on."""
        if background is self.background:
            return
        self.background = background
        for lock in self.locks:
            lock.use_background(background)

    def kept_tokens(self, background: Tensor, latents: Tensor) -> int:
        """How many of the background's tokens of latents [..., T, H, W] this process keeps."""
        shard = shard_of(self.locks[0].transformer)
        return len(background if shard is None else shard.indices(background, self.model.tokens_of(latents)))

    def stage(self, k: int) -> int:
        """0, or 1 in the low-noise steps of a model that has two stages; for k = T too."""
        return self._stages[k]

    def __call__(
        self,
        k: int,
        latents: Tensor,
        text: Conditioning,
        mode: Mode = Mode.OFF,
        weight: Tensor | None = None,
        kept: KeptKV | None = None,
        timestep: Tensor | None = None,
    ) -> Tensor:
        """The prediction at latents [rows, C, T, H, W], told `text` of each; the rest as `TransformerLock.forward`."""
        which, timestep = self._count(k, latents, timestep)
        if not self.locks:
            return self.model.predict(which, latents, timestep, text)
        tokens, ahead = self.model.tokens_of(latents), self.model.tokens_ahead(latents)
        with self.locks[which].forward(mode, weight, kept, tokens, ahead=ahead):
            return self.model.predict(which, latents, timestep, text)

    def foreground(
        self, k: int, latents: Tensor, text: Conditioning, region: Region, kept: KeptKV, rows: Tensor | None,
        timestep: Tensor,
    ) -> Tensor:  # fmt: skip
        """The prediction of the region's tokens, 0 elsewhere; rows: which of the tokens kept are background."""
        which, timestep = self._count(k, latents, timestep)
        lock = self.locks[which]
        with lock.forward(Mode.FOREGROUND, kept=kept):
            return self.model.predict_foreground(lock, latents, timestep, text, region, self.background, rows)

    def _count(self, k: int, latents: Tensor, timestep: Tensor | None) -> tuple[int, Tensor]:
        """Count the rows; which transformer serves step k, and its timestep."""
        self.recorder.forwards += latents.shape[0]
        which = self.model.transformer_of(self.stage(k))
        return which, self.model.time_at(self.solver, k) if timestep is None else timestep


class Forwards:
    """The predictions of a step: of the source, where it is run along, and of the edit's branches."""

    def __init__(self, task: Task, predict: Predictor, timestep: Tensor | None = None):
        """timestep: where each step's timestep is read from [], None for the solver's table."""
        self.task, self.predict, self.timestep = task, predict, timestep
        batching = task.lock.guidance_batching
        told = [x for x in (task.source_prompt, task.negative, task.prompt) if x is not None]
        together = (task.lock.locks or predict.model.arch.one_call) and Conditioning.fit(told)
        self.batched = batching == "batched" or (batching == "auto" and together)

    def run_along(
        self, k: int, latents: Tensor, source_latent: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The source [1, ...] with the edit: predictions of source, conditional and unconditional branch [B, ...]."""
        task = self.task
        if not self.batched:  # a forward for the source, which keeps its K and V, and one for each branch
            source, kept = self.of_source(k, source_latent)
            return source, *self._branches(k, latents, self._locked(Mode.STORED), alpha, kept)
        branches = 1 if task.negative is None else 2
        rows = torch.cat([source_latent, *[latents.float()] * branches])
        texts = Conditioning.cat([task.source_prompt, self._texts()])
        weight = self._weight(alpha.repeat(branches))
        with span("forward all"):
            out = self._predict(k, rows, texts, self._locked(Mode.IN_BATCH), weight)
        return out[:1], *self._split(out[1:])

    def of_source(self, k: int, source_latent: Tensor) -> tuple[Tensor, KeptKV]:
        """The source's prediction [1, ...], and its background's K and V of this step."""
        kept: KeptKV = {}
        with span("forward source"):
            locked = self._locked(Mode.CAPTURE)
            return self._predict(k, source_latent, self.task.source_prompt, locked, kept=kept), kept

    def of_foreground(
        self, k: int, latents: Tensor, kept: KeptKV, region: Region, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The region's tokens alone, in front of the source's background: both branches [B, ...], 0 elsewhere."""
        task, branches = self.task, 1 if self.task.negative is None else 2

        def predict(latents: Tensor, text: Conditioning) -> Tensor:
            with span("forward foreground"):
                return self.predict.foreground(k, latents, text, region, kept, rows, self.timestep)

        if not self.batched:
            return predict(latents, task.prompt), None if branches == 1 else predict(latents, task.negative)
        return self._split(predict(torch.cat([latents.float()] * branches), self._texts()))

    def from_kept(self, k: int, latents: Tensor, kept: KeptKV, alpha: Tensor) -> tuple[Tensor, Tensor | None]:
        """The edit alone, locked to K and V that were kept: conditional and unconditional [B, ...]."""
        return self._branches(k, latents, self._locked(Mode.STORED), alpha, kept)

    def unlocked(self, k: int, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """The edit alone, nothing locked: conditional and unconditional [B, ...]."""
        return self._branches(k, latents, Mode.OFF)

    def _predict(self, k: int, *args: Any, **kwargs: Any) -> Tensor:
        return self.predict(k, *args, **kwargs, timestep=self.timestep)

    def _locked(self, mode: Mode) -> Mode:
        return mode if self.predict.locks else Mode.OFF

    def _branches(
        self, k: int, latents: Tensor, mode: Mode, alpha: Tensor | None = None, kept: KeptKV | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Both branches, in one forward or one after the other."""
        task, branches = self.task, 1 if self.task.negative is None else 2
        if self.batched:
            weight = None if alpha is None else self._weight(alpha.repeat(branches))
            rows = torch.cat([latents.float()] * branches)
            with span("forward edit"):
                return self._split(self._predict(k, rows, self._texts(), mode, weight, kept))
        weight = None if alpha is None else self._weight(alpha)
        with span("forward edit"):
            cond = self._predict(k, latents, task.prompt, mode, weight, kept)
        if branches == 1:
            return cond, None
        with span("forward edit"):
            return cond, self._predict(k, latents, task.negative, mode, weight, kept)

    def _weight(self, alpha: Tensor) -> Tensor:
        """[rows, S] fp32, of alpha [rows]."""
        return blend_weight(alpha, self.task.mask.tokens, self.task.lock.foreground_mix)

    def _texts(self) -> Conditioning:
        """Of all branches in one batch: unconditional rows first, as diffusers has them."""
        task = self.task
        return task.prompt if task.negative is None else Conditioning.cat([task.negative, task.prompt])

    def _split(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        *uncond, cond = out.split(self.task.batch)
        return cond, uncond[0] if uncond else None
