"""The transformer's forwards under the lock: one at a time (`Predictor`), and those of a denoising step (`Forwards`).

A step has two verbs. `source_kv` finds the source's keys and values: a pass before has stored them, a forward of the
source makes them now, or the source's row rides in the edit's own batch. `edit` runs the edit's branches, whose
background is blended with them, and in foreground-only steps computes the foreground's tokens alone.
"""

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.config import LockConfig
from kvlock_fast.locking.lock import KeptKV, Mode, TransformerLock, blend_weight
from kvlock_fast.locking.parallel import shard_of
from kvlock_fast.loop.foreground import edit_region
from kvlock_fast.loop.ranges import layer_ranges
from kvlock_fast.loop.schedule import asks_source, can_lock, in_interval, zeroed_steps
from kvlock_fast.loop.solver import Solver
from kvlock_fast.loop.source import SourcePath, StoredSource
from kvlock_fast.loop.task import Task, Texts
from kvlock_fast.loop.trace import Recorder
from kvlock_fast.loop.windows import Stretch
from kvlock_fast.masks import Region
from kvlock_fast.models.base import ForegroundModel, PipelineModel
from kvlock_fast.nvtx import span


class Predictor:
    """The model's transformers, with the lock attached while the context is open."""

    def __init__(
        self,
        model: PipelineModel,
        solver: Solver,
        lock: LockConfig,
        background: Tensor,
        recorder: Recorder,
        processors: str = "auto",
    ):
        """Look up what every step needs; attach nothing yet.

        Args:
            model: the family's model (models/base.py).
            solver: the scheduler's steps.
            lock: the lock's settings.
            background: indices [N] of the tokens whose K and V are kept apart from the batch.
            recorder: counts the forwards.
            processors: the attention processors of locked layers, as `KVLockPipeline` has them.
        """
        self.model, self.solver, self.lock, self.recorder = model, solver, lock, recorder
        self.processors = processors
        self.background = background
        self.locks: list[TransformerLock] = []
        self.times: list[Tensor] = [model.time_at(solver, k) for k in range(solver.num_steps + 1)]
        self._exit = ExitStack()
        self._stages = [model.stage_at(t, solver.num_train_timesteps) for t in solver.timesteps.tolist()]
        self._stages.append(self._stages[-1])
        self._serving = [model.transformer_of(stage) for stage in self._stages]
        self._sizes: dict[torch.Size, tuple[int, int | None]] = {}

    def __enter__(self) -> "Predictor":
        with ExitStack() as attached:  # what is attached comes off again if one of two transformers is refused
            for transformer in self.model.transformers if self.lock.locks else ():
                arch, layers = self.model.arch, self.lock.layers
                lock = TransformerLock(transformer, arch, layers, self.background, self.processors)
                lock.state.bias = self.lock.background_bias
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

    def midway(self, k: int) -> Tensor:
        """The timestep [] halfway between x_k and x_{k+1} of a flow: times are linear in sigma."""
        both = torch.stack([self.times[k], self.times[k + 1]])
        return both.double().mean().to(both.dtype)

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
        """Predict at latents [rows, C, T, H, W], told `text` of each row.

        Args:
            k: the step, which decides the transformer.
            latents: the rows of the batch.
            text: what the model is told of each.
            mode: what the lock does to keys and values in this forward.
            weight: the blend's weight [rows, S] fp32, where the mode blends.
            kept: the source's keys and values, or where they are kept.
            timestep: [], None for the solver's own.

        Returns:
            The prediction [rows, C, T, H, W], in the model's dtype.
        """
        which, at = self._serving[k], self.times[k] if timestep is None else timestep
        self.recorder.forwards += latents.shape[0]
        if not self.locks:
            return self.model.predict(which, latents, at, text)
        if latents.shape not in self._sizes:
            self._sizes[latents.shape] = self.model.tokens_of(latents), self.model.tokens_ahead(latents)
        tokens, ahead = self._sizes[latents.shape]
        with self.locks[which].forward(mode, weight, kept, tokens, ahead=ahead):
            return self.model.predict(which, latents, at, text)

    def foreground(
        self, k: int, latents: Tensor, text: Conditioning, region: Region, kept: KeptKV, rows: Tensor | None,
        timestep: Tensor,
    ) -> Tensor:  # fmt: skip
        """Predict for the region's tokens, 0 elsewhere; rows: which of the tokens kept are background."""
        self.recorder.forwards += latents.shape[0]
        lock = self.locks[self._serving[k]]
        assert isinstance(self.model, ForegroundModel)
        with lock.forward(Mode.FOREGROUND, kept=kept):
            return self.model.predict_foreground(lock, latents, timestep, text, region, self.background, rows)


@dataclass(frozen=True)
class Part:
    """A stretch of the clip, the source's path in it, and its keys and values for the steps that they cover.

    background: indices [N] of the tokens that are kept of the source.
    """

    stretch: Stretch
    path: SourcePath
    stored: StoredSource | None
    background: Tensor


@dataclass(frozen=True)
class SourceKV:
    """The source at a step, as the edit's forwards need it.

    prediction: its own [1, C, n, h, w], where it was made; kept: its background's K and V by layer, None where nothing
    is locked; row: its latent [1, C, n, h, w], where they come from a row of its own in the edit's batch instead.
    """

    prediction: Tensor | None = None
    kept: KeptKV | None = None
    row: Tensor | None = None


Velocities = tuple[Tensor | None, Tensor, Tensor | None]
"""Predictions of the source [1, C, n, h, w] (None where nobody asks), and of the edit's conditional and unconditional
branch [B, C, n, h, w] (None without guidance).
"""
Branches = tuple[Tensor, Tensor | None]
"""The two of the edit."""


class Forwards:
    """The forwards of a step, of the whole clip or of one stretch.

    Whatever changes from step to step stays at one address, so that a step can be captured. `inputs` puts step k's in
    place, with its way:

        zero        no forward: the prediction is taken as 0
        unlocked    the edit's forwards alone, nothing of the source
        along       the source runs along: its forward gives K, V and prediction, or its row in the edit's batch does
        stored      its K and V, and its prediction where that is asked for, come from an earlier pass
        compared    the same of a step that does not lock: its prediction alone
    """

    def __init__(self, task: Task, predict: Predictor, part: Part, timestep: Tensor, skips: bool = False):
        """timestep: where each step's is read from []; skips: whether a step may turn out to need no guidance."""
        lock, self.predict, self.timestep = task.lock, predict, timestep
        self.stretch, self.path, self.stored, self.background = part.stretch, part.path, part.stored, part.background
        self.foreground, self.mix, self.batch = part.stretch.mask.tokens, lock.foreground_mix, task.batch
        steps, sparse = range(predict.solver.num_steps), lock.compute == "foreground"
        self.asked = asks_source(lock)
        zeroed = zeroed_steps(lock, len(steps))
        self.locks = [k >= zeroed and can_lock(lock, len(steps), k) for k in steps]
        self.ways = ["zero" if k < zeroed else self._way(k) for k in steps]

        told = [x for x in (task.source_prompt, task.negative, task.prompt) if x is not None]
        together = (lock.locks or predict.model.arch.one_call) and Conditioning.fit(told)
        self.batched = lock.guidance_batching == "batched" or (lock.guidance_batching == "auto" and together)
        two = task.negative is not None
        self.guides = [two and in_interval(lock.guidance_interval, len(steps), k) for k in steps]
        apart = sparse or any(way not in ("zero", "along") for way in self.ways)
        may_skip = two and (skips or not all(self.guides))
        self.texts = Texts.of(
            task, both=self.batched and apart, all=self.batched and "along" in self.ways, alone=may_skip
        )
        self.unguided = self.texts.unguided

        # Of the step whose inputs are in place:
        self.way, self.saturated, self.guided = "zero", (), two
        self.kept: KeptKV | None = None
        self.source_latent = part.path.at(0).clone()
        self.prediction: Tensor | None = None
        if self.asked and part.stored is not None and part.stored.predictions:
            self.prediction = next(iter(part.stored.predictions.values())).clone()

        self.region: Region | None = None
        self.rows: Tensor | None = None
        if sparse:
            self.region = edit_region(part.stretch.mask, lock)
            outside = ~self.foreground[0].index_select(0, self.background)
            self.rows = None if outside.all() else outside.nonzero()[:, 0]

    def _way(self, k: int) -> str:
        locks = self.locks[k]
        if not (locks or self.asked):
            return "unlocked"
        if self.stored is None or not self.stored.covers(k, locks, self.asked):
            return "along"
        return "stored" if locks else "compared"

    @contextmanager
    def inputs(self, k: int, saturated: tuple[int, ...], unguided: bool = False) -> Iterator[Hashable]:
        """Put step k's inputs in place while the context is open.

        Yields the step's kind: steps of one kind take the same kernels at the same addresses. It holds all that a step
        takes of k by value, since a captured step has the k that it was captured with.

        saturated: the samples whose alpha is 1, for which the foreground is enough; unguided: whether the scale of
        guidance has turned out to be 1.
        """
        self.source_latent.copy_(self.path.path[k])
        self.way, self.saturated, self.kept = self.ways[k], saturated, None
        self.guided = self.guides[k] and not unguided
        if self._is_untouched and len(saturated) == self.batch and not self.asked:
            self.way = "unlocked"  # nothing is computed at all
        if self.stored is not None and self.prediction is not None and self.way in ("stored", "compared"):
            self.prediction.copy_(self.stored.predictions[k])
        kind = self.way, self.predict.stage(k), self.locks[k], saturated, self.guided
        if self.way == "stored":
            assert self.stored is not None
            with self.stored.store.read(self.stored.slots[k]) as packed:
                self.kept = {**packed}
                yield *kind, next(iter(packed.values())).codes.data_ptr()
        else:
            yield kind

    @property
    def token_counts(self) -> list[int]:
        """Tokens that are computed of each sample, in the step whose inputs are in place."""
        whole = 0 if self.way == "zero" else self.foreground.shape[1]
        alone = whole if self.region is None else len(self.region.computed)
        return [alone if i in self.saturated else whole for i in range(self.batch)]

    def source_kv(self, k: int, source_latent: Tensor) -> SourceKV:
        """Find the source's keys and values at its latent of step k [1, C, n, h, w], or have its forward make them."""
        self.predict.use_background(self.background)
        if self.way == "unlocked":
            return SourceKV()
        if self.way != "along":
            assert self.stored is not None
            return SourceKV(self.prediction if self.asked else None, self.kept)
        if self.batched and not self.saturated:
            return SourceKV(row=source_latent)
        kept: KeptKV = {}
        with span("forward source"):
            mode = self._locked(Mode.CAPTURE) if self.locks[k] else Mode.OFF
            prediction = self._predict(k, source_latent, self.texts.source, mode, kept=kept)
        return SourceKV(prediction, kept if self.locks[k] else None)

    def edit(self, k: int, latents: Tensor, alpha: Tensor, kv: SourceKV) -> Velocities:
        """Predict at latents [B, C, n, h, w], the background's K and V blended with the source's by alpha [B].

        Without guidance, by no scale or one of 1, the prompt's branch alone is run.
        """
        texts = self.texts if self.guided else self.unguided
        if kv.row is not None:
            with span("forward all"):
                rows = torch.cat([kv.row, *[latents.float()] * self.branches])
                weight = self._weight(alpha.repeat(self.branches)) if self.locks[k] else None
                mode = Mode.OFF if weight is None else self._locked(Mode.IN_BATCH)
                out = self._predict(k, rows, texts.all, mode, weight)
            return out[:1], *self._split(out[1:])
        if self.saturated:
            return kv.prediction, *self._partly(k, latents, alpha, kv.kept, texts)
        return kv.prediction, *self._whole(k, latents, alpha, kv.kept, texts)

    @property
    def branches(self) -> int:
        """Forwards a sample, in the step whose inputs are in place."""
        return 2 if self.guided else 1

    def _whole(self, k: int, latents: Tensor, alpha: Tensor, kept: KeptKV | None, texts: Texts) -> Branches:
        """Both branches of every token, in one forward or one after the other; kept None: nothing is locked."""
        mode = Mode.OFF if kept is None else self._locked(Mode.STORED)
        weight = None if kept is None else self._weight(alpha)
        if texts.both is not None:
            weight = None if weight is None else weight.repeat(self.branches, 1)
            with span("forward edit"):
                rows = torch.cat([latents.float()] * self.branches)
                return self._split(self._predict(k, rows, texts.both, mode, weight, kept))
        with span("forward edit"):
            cond = self._predict(k, latents, texts.prompt, mode, weight, kept)
        if texts.negative is None:
            return cond, None
        with span("forward edit"):
            return cond, self._predict(k, latents, texts.negative, mode, weight, kept)

    def _partly(self, k: int, latents: Tensor, alpha: Tensor, kept: KeptKV | None, texts: Texts) -> Branches:
        """Both branches, of the saturated samples' foreground alone and of the others whole."""
        some = self.saturated
        others = tuple(i for i in range(self.batch) if i not in some)
        if not others:
            return self._sparse(k, latents, kept, texts)
        # By slices, as an index made here would be a copy from the host.
        taken, rest = (torch.cat([latents[i : i + 1] for i in part]) for part in (some, others))
        alphas = torch.cat([alpha[i : i + 1] for i in others])
        sparse = self._sparse(k, taken, kept, texts.samples(some))
        whole = self._whole(k, rest, alphas, kept, texts.samples(others))
        at = {sample: place for place, sample in enumerate(some + others)}

        def in_order(parts: list[Tensor]) -> Tensor:
            rows = torch.cat(parts)
            return torch.cat([rows[at[i] : at[i] + 1] for i in range(self.batch)])

        (cond, uncond), (other_cond, other_uncond) = sparse, whole
        if uncond is None or other_uncond is None:
            return in_order([cond, other_cond]), None
        return in_order([cond, other_cond]), in_order([uncond, other_uncond])

    def _sparse(self, k: int, latents: Tensor, kept: KeptKV | None, texts: Texts) -> Branches:
        """Both branches of the region's tokens, in front of the source's background; 0 elsewhere."""
        if self._is_untouched:
            nothing = torch.zeros_like(latents)
            return nothing, None if texts.negative is None else nothing
        region, rows = self.region, self.rows
        assert region is not None and kept is not None

        def predict(latents: Tensor, text: Conditioning) -> Tensor:
            with span("forward foreground"):
                return self.predict.foreground(k, latents, text, region, kept, rows, self.timestep)

        if texts.both is not None:
            return self._split(predict(torch.cat([latents.float()] * self.branches), texts.both))
        return predict(latents, texts.prompt), None if texts.negative is None else predict(latents, texts.negative)

    @property
    def _is_untouched(self) -> bool:
        """Whether there is nothing that the foreground alone would compute."""
        return self.region is not None and not len(self.region.computed)

    def _predict(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.predict(*args, **kwargs, timestep=self.timestep)

    def _locked(self, mode: Mode) -> Mode:
        return mode if self.predict.locks else Mode.OFF

    def _weight(self, alpha: Tensor) -> Tensor:
        """The blend's weight [rows, S] fp32, of alpha [rows]."""
        return blend_weight(alpha, self.foreground, self.mix)

    def _split(self, out: Tensor) -> Branches:
        """Conditional and unconditional rows of a batch of both."""
        *uncond, cond = out.chunk(self.branches)
        return cond, uncond[0] if uncond else None

    def tensors(self) -> dict[str, Tensor]:
        """All that a captured step reads of this, by name; the mask as a copy."""
        named = {
            "tokens": self.foreground.clone(), "background": self.background, "source latent": self.source_latent,
            "timestep": self.timestep, "prediction": self.prediction, "rows": self.rows,
            "computed": self.region and self.region.computed,
            **self.texts.tensors(),
        }  # fmt: skip
        return {name: x for name, x in named.items() if x is not None}

    def use(self, tensors: dict[str, Tensor]) -> None:
        """Read these instead."""
        self.texts = self.texts.use(tensors)
        self.unguided = self.texts.unguided
        self.foreground, self.background, self.rows = tensors["tokens"], tensors["background"], tensors.get("rows")
        self.source_latent, self.timestep = tensors["source latent"], tensors["timestep"]
        self.prediction = tensors.get("prediction")
        if self.region is not None:
            self.region = replace(self.region, computed=tensors["computed"])
