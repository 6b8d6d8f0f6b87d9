"""The transformers under the lock, and what is asked of them: a task, and one prediction at a time."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.config import LockConfig
from kvlock_fast.locking.lock import KeptKV, Mode, TransformerLock
from kvlock_fast.locking.parallel import shard_of
from kvlock_fast.loop.ranges import layer_ranges
from kvlock_fast.loop.solver import Solver
from kvlock_fast.loop.trace import Recorder
from kvlock_fast.masks import ProjectedMask, Region

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
