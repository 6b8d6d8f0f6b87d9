"""The transformer's forwards under the lock: who shares a batch, and where the source's K and V come from.

A step asks of the whole clip or of one stretch of it, and of some samples for their foreground alone.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.cache.store import Packed
from kvlock_fast.conditioning import Conditioning
from kvlock_fast.locking.lock import KeptKV, Mode, blend_weight
from kvlock_fast.loop.foreground import edit_region
from kvlock_fast.loop.predictor import Predictor, Task
from kvlock_fast.loop.schedule import can_lock, compares_with_source
from kvlock_fast.loop.source import SourcePath, StoredSource
from kvlock_fast.masks import Region
from kvlock_fast.nvtx import span


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
