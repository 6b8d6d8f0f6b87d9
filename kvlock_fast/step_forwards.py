"""What a step asks of the model, of the whole clip or of one stretch of it: from where the source's K and V come, and
which samples are computed for their foreground alone.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from kvlock_fast.cache.store import Packed
from kvlock_fast.controller import can_lock, compares_with_source
from kvlock_fast.foreground import edit_region
from kvlock_fast.forwards import Forwards, Predictor, Task
from kvlock_fast.models.locking import KeptKV
from kvlock_fast.source import SourcePath
from kvlock_fast.source_pass import StoredSource

TEXTS = ("prompt", "negative", "source_prompt")
"""What a task tells the model."""
Velocities = tuple[Tensor | None, Tensor, Tensor | None]
"""Of the source (None where nobody asks), conditional, unconditional (None without guidance)."""


class StepForwards:
    """The forwards of a step. All that changes from step to step is at addresses that do not."""

    def __init__(
        self,
        task: Task,
        predict: Predictor,
        source: SourcePath,
        stored: StoredSource | None,
        background: Tensor,
        timestep: Tensor,
    ):
        """task, source, stored: of the stretch; background: indices [N] of the tokens kept of it; timestep: where each
        step's is read from.
        """
        self.task, self.predict, self.source, self.stored = task, predict, source, stored
        self.background, self.timestep = background, timestep
        self.source_latent = source.at(0).clone()
        self.kept: Packed | None = None
        self.saturated: tuple[int, ...] = ()
        self.idle = False
        self.region, self.rows = None, None
        if task.lock.compute == "foreground":
            self.region = edit_region(task.mask, task.lock)
            outside = ~task.mask.tokens[0].index_select(0, background)
            self.rows = None if outside.all() else outside.nonzero()[:, 0]

    @contextmanager
    def inputs(self, k: int, saturated: tuple[int, ...]) -> Iterator[Hashable]:
        """Step k's inputs, in place while the context is open; the kind of step it is, by which kernels it takes.

        saturated: the samples that the foreground does for.
        """
        self.source_latent.copy_(self.source.at(k))
        at, self.saturated = self.predict.stage(k), saturated
        self.idle = k < self.task.lock.zero_init_steps
        if self.idle:
            yield "zero", at
        elif not (self.locks(k) or self._compares):
            yield "unlocked", at
        elif self.stored is None or not self.stored.covers(k, self.locks(k), self._compares):
            yield "along", at, saturated
        elif not self.locks(k):
            yield "compared", at
        else:
            with self.stored.store.read(self.stored.slots[k]) as self.kept:
                yield "kept", at, saturated, next(iter(self.kept.values())).codes.data_ptr()

    def tokens(self) -> list[int]:
        """Computed of each sample, in the step whose inputs are there."""
        everything = 0 if self.idle else self.task.mask.tokens.shape[1]
        return [len(self.region.computed) if i in self.saturated else everything for i in range(self.task.batch)]

    def locks(self, k: int) -> bool:
        """Whether alpha can exceed 0 at this step."""
        return can_lock(self.task.lock, self.predict.solver.num_steps, k)

    @property
    def _is_untouched(self) -> bool:
        """Whether there is nothing that the foreground alone would compute."""
        return self.region is not None and not len(self.region.computed)

    @property
    def _compares(self) -> bool:
        return compares_with_source(self.task.lock)

    def velocities(self, k: int, latents: Tensor, alpha: Tensor) -> Velocities:
        """At latents [B, C, n, h, w] with alpha [B]."""
        locks, stored = self.locks(k), self.stored
        if self._is_untouched and len(self.saturated) == self.task.batch and not self._compares:
            return None, *self._sparse(k, self.saturated, latents, {})
        self.predict.use_background(self.background)
        forwards = self._of(tuple(range(self.task.batch)))
        if not (locks or self._compares):
            return None, *forwards.unlocked(k, latents)
        if stored is None or not stored.covers(k, locks, self._compares):
            if not self.saturated:
                return forwards.run_along(k, latents, self.source_latent, alpha)
            source, kept = forwards.of_source(k, self.source_latent)
            return source, *self._partly(k, latents, alpha, kept)
        if not locks:
            return stored.predictions[k], *forwards.unlocked(k, latents)
        if self.saturated:
            return stored.predictions.get(k), *self._partly(k, latents, alpha, self.kept)
        return stored.predictions.get(k), *forwards.from_kept(k, latents, self.kept, alpha)

    def _of(self, samples: tuple[int, ...]) -> Forwards:
        """Of some of the samples; made anew in each step, so that a captured one reads the texts where they are."""
        return Forwards(self.task.of(samples), self.predict, self.timestep)

    def _partly(self, k: int, latents: Tensor, alpha: Tensor, kept: KeptKV) -> tuple[Tensor, Tensor | None]:
        """Both branches, of the saturated samples' foreground alone and of the others whole."""
        some = self.saturated
        others = tuple(i for i in range(self.task.batch) if i not in some)
        if not others:
            return self._sparse(k, some, latents, kept)
        # By slices, as an index made here would be a copy from the host.
        taken, rest = (torch.cat([latents[i : i + 1] for i in part]) for part in (some, others))
        alphas = torch.cat([alpha[i : i + 1] for i in others])
        sparse = self._sparse(k, some, taken, kept)
        whole = self._of(others).from_kept(k, rest, kept, alphas)
        at = {sample: place for place, sample in enumerate(some + others)}
        return tuple(
            None if a is None else torch.cat([torch.cat([a, b])[at[i] : at[i] + 1] for i in range(self.task.batch)])
            for a, b in zip(sparse, whole, strict=True)
        )

    def _sparse(self, k: int, samples: tuple[int, ...], latents: Tensor, kept: KeptKV) -> tuple[Tensor, Tensor | None]:
        if self._is_untouched:
            nothing = torch.zeros_like(latents)
            return nothing, None if self.task.negative is None else nothing
        return self._of(samples).of_foreground(k, latents, kept, self.region, self.rows)

    def tensors(self) -> dict[str, Tensor]:
        """All that a captured step reads of this, by name; the mask as a copy."""
        task = self.task
        named = {
            "tokens": task.mask.tokens.clone(), "background": self.background, "source latent": self.source_latent,
            "timestep": self.timestep, "computed": self.region and self.region.computed, "rows": self.rows,
        }  # fmt: skip
        for field in TEXTS:
            named |= {f"{field}.{name}": x for name, x in (getattr(task, field) or {}).items()}
        return {name: x for name, x in named.items() if x is not None}

    def use(self, tensors: dict[str, Tensor]) -> None:
        """Read these instead."""
        told = ((field, getattr(self.task, field)) for field in TEXTS)
        texts = {
            field: x.replace(**{name: tensors[f"{field}.{name}"] for name in x}) for field, x in told if x is not None
        }
        self.task = replace(self.task, mask=replace(self.task.mask, tokens=tensors["tokens"]), **texts)
        self.background, self.rows = tensors["background"], tensors.get("rows")
        self.source_latent, self.timestep = tensors["source latent"], tensors["timestep"]
        if self.region is not None:
            self.region = replace(self.region, computed=tensors["computed"])
