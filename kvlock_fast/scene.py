"""A source made ready for edits: fitted to the model, encoded or taken from a cache, with its starting noise."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.cache.entry import EntryWriter
from kvlock_fast.cache.saved_source import SavedSource
from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import select_layers
from kvlock_fast.loop.forwards import Predictor
from kvlock_fast.loop.graph import CapturedLoops
from kvlock_fast.loop.solver import Solver
from kvlock_fast.loop.source import Prediction, SourcePath, invert, renoise, shift_latents
from kvlock_fast.loop.stored_source import Source, SourceMaker, check_saved, saved_path, source_facts
from kvlock_fast.loop.trace import Recorder
from kvlock_fast.loop.windows import Stretch, Windows, blend, stretches
from kvlock_fast.masks import ProjectedMask
from kvlock_fast.models.base import PipelineModel
from kvlock_fast.nvtx import span

Progress = Callable[[str, int, int], None]


@dataclass
class Scene:
    """A source as the model takes it.

    Args:
        frames: uint8 [F, H, W, 3].
        count: how many of them to give back.
        saved: the cache that the user named.
        windows: of a clip that goes through the model in stretches.
        loops: where steps are captured.
        kept_loops: those of earlier calls, whose memory can be had back.
        clean, noise: the clean latent [1, C, T, h, w] and the noises [N, C, T, h, w], from `place` on.
        pixels: the mask bool [F, H, W].
        guidance_scale: the call's.
        processors: the attention of locked layers.
        shared: whether other processes have part of its tokens.
        generator: where noise is drawn from.
    """

    model: PipelineModel
    lock: LockConfig
    solver: Solver
    frames: Tensor
    count: int
    mask: ProjectedMask
    source_prompt: str
    saved: SavedSource | None
    windows: Windows | None = None
    loops: CapturedLoops | None = None
    kept_loops: CapturedLoops | None = None
    clean: Tensor | None = None
    noise: Tensor | None = None
    pixels: Tensor | None = None
    guidance_scale: float = 1.0
    processors: str = "auto"
    shared: bool = False
    generator: torch.Generator | None = None

    def place(self, clean: Tensor | None, latents: Tensor | None, generator: torch.Generator | None) -> None:
        """Fix the clean latent [1, C, T, h, w] and the starting noise, or take both from the saved source."""
        self.generator = generator
        if self.saved is None:
            assert clean is not None
            drawn = start_noise(self.model, latents, clean, generator)
            self.clean, self.noise = clean, self._noises(drawn, seeded=latents is not None)
            return
        start = self.saved.start
        seeded = latents is not None or generator is not None
        if seeded and not self.saved.inverted:  # an inverted source ends in a noise of its own
            drawn = start_noise(self.model, latents, start.to(self.mask.tokens.device), generator)
            if not torch.equal(self.model.first_latents(drawn, self.given).cpu(), start):
                folder = self.saved.folder
                raise InputError(f"cache '{folder}' was made with other noise than generator or latents give")
        layers = select_layers(len(self.model.arch.attentions(self.model.transformers[0])), self.lock.layers)
        if self.lock.foreground_mix and len(self.saved.background) < self.mask.tokens.numel():
            raise InputError(
                f"cache '{self.saved.folder}' holds the background's tokens only, and foreground_mix "
                f"{self.lock.foreground_mix} needs the foreground's too: make it with the same foreground_mix"
            )
        check_saved(self.saved, self.facts(self.saved.latents.get("noise", start)), layers, self.mask.tokens)

    @property
    def placed(self) -> tuple[Tensor, Tensor]:
        """The clean latent and the noises, once `place` has fixed them for a source that is not saved."""
        assert self.clean is not None and self.noise is not None
        return self.clean, self.noise

    def _noises(self, drawn: Tensor, seeded: bool) -> Tensor:
        """The noises [N, C, T, h, w] of the source's path: the one that was drawn, and more where the lock asks.

        Number i comes from a generator seeded by the call's seed and i, so that every way of running draws the same.
        seeded: whether the first was given, and nothing is to be left to chance.
        """
        count = self.solver.num_steps if self.lock.noises == "fresh" else int(self.lock.noises)
        seed = 0 if seeded or count == 1 else int(torch.randint(2**62, ()))
        seed = seed if self.generator is None else self.generator.initial_seed()
        more = (self.model.draw_noise(drawn.shape, generator_of(seed, i), drawn.device) for i in range(1, count))
        return torch.cat([self.model.first_latents(noise, self.given) for noise in (drawn, *more)])

    def facts(self, noise: Tensor) -> dict[str, Any]:
        """Collect what tells this source from others, for a cache."""
        return source_facts(self.model, self.solver, self.lock, self.given, self.source_prompt, noise)

    @property
    def given(self) -> Given:
        """The source and its mask, as a model may be conditioned on them."""
        return Given(self.frames, self.pixels, self.mask, self.guidance_scale)

    @property
    def given_source(self) -> Given:
        """The same for the source's own pass."""
        scale = self.lock.source_guidance
        return self.given if scale is None else replace(self.given, guidance_scale=scale)

    def source_negative(self, prompt: str) -> Conditioning | None:
        """Encode the negative prompt of a source that is guided by itself; None where it is not guided."""
        scale = self.lock.source_guidance
        if scale is None and self.lock.method == "flowedit":
            scale = self.guidance_scale
        if scale is None or not self.model.guided(scale):
            return None
        return self.model.condition_source([prompt], self.given_source)

    def draw(self) -> Tensor:
        """More noise, of the latents' shape."""
        like = self.placed[0] if self.saved is None else self.saved.start
        drawn = self.model.draw_noise(like.shape, self.generator, self.mask.tokens.device)
        return self.model.first_latents(drawn, self.given)

    def background(self) -> Tensor:
        """Indices [N] of the tokens whose K and V are kept: a saved source's may be more than the mask leaves."""
        if self.saved is not None:
            return self.saved.background.to(self.mask.tokens.device, copy=True)
        return self.kept_of(self.mask)

    def kept_of(self, mask: ProjectedMask) -> Tensor:
        """Indices [N] of the background's tokens, or of all where the foreground is mixed with the source too."""
        kept = torch.ones_like(mask.tokens) if self.lock.foreground_mix else ~mask.tokens
        return kept[0].nonzero()[:, 0]

    def stretches(self) -> list[Stretch]:
        """Cut the clip into what goes through the model at once."""
        return stretches(self.mask, self.windows, self.model.geometry)

    def stage(self, k: int) -> int:
        """0, or 1 in the low-noise steps of a model that has two stages."""
        return self.model.stage_at(float(self.solver.timesteps[k]), self.solver.num_train_timesteps)

    def predictor(self, recorder: Recorder) -> Predictor:
        """The model, which has the lock attached while the context is open."""
        return Predictor(self.model, self.solver, self.lock, self.background(), recorder, self.processors)

    def path(
        self, predict: Predictor, text: Conditioning, negative: Conditioning | None, recorder: Recorder
    ) -> SourcePath:
        """Where the source is at each step, and where the edit starts; negative: of a source guided by itself."""
        with recorder.stage("source path"):
            path = self._path(predict, text, negative)
            if not self.lock.latents_shift:
                return path
            fresh = self.draw() if self.noise is None else self.noise[:1]
            shifted = shift_latents(path.start, fresh, self.mask.latents, self.lock.latents_shift)
            return SourcePath(path.path, shifted, path.noise)

    def _path(self, predict: Predictor, text: Conditioning, negative: Conditioning | None) -> SourcePath:
        if self.saved is not None:
            return saved_path(self.saved, self.solver, self.mask.tokens.device)
        if self.lock.source_path == "renoise":
            return renoise(*self.placed, self.solver)
        prediction = partial(_own_prediction, predict, text, self.stretches())
        scale = self.lock.source_guidance
        if negative is not None and scale is not None:
            prediction = partial(
                _guided_prediction, prediction, partial(_own_prediction, predict, negative, self.stretches()),
                self.model.combine, self.model.omega0(scale),
            )  # fmt: skip
        return invert(self.placed[0], self.solver, prediction, self.lock.inversion_solver)

    def save(
        self,
        text: Conditioning,
        cache: CacheConfig,
        writer: EntryWriter,
        recorder: Recorder,
        progress: Progress,
        notes: dict[str, Any],
        negative: Conditioning | None = None,
    ) -> dict[str, Any]:
        """Run the source into an entry; the facts of its manifest."""
        with self.predictor(recorder) as predict:
            source = Source(self.path(predict, text, negative, recorder), text, self.background())
            maker = SourceMaker(source, predict, cache, partial(progress, "source pass"))
            if not maker.steps:
                raise InputError("no step of this lock and cache would be stored: there is nothing to keep")
            return maker.write(writer, self.facts(self.placed[1]), **notes)


def _own_prediction(predict: Predictor, text: Conditioning, parts: list[Stretch], latents: Tensor, k: float) -> Tensor:
    """The source's own prediction [1, ...] at x_k, nothing locked; k + 0.5 is halfway to x_{k+1}."""
    with span("forward source"):
        step = int(k)
        time = None if step == k else predict.midway(step)
        said = [predict(step, part.of(latents), text, timestep=time) for part in parts]
    return said[0] if len(parts) == 1 else blend(said, parts)


def _guided_prediction(
    cond: Prediction,
    uncond: Prediction,
    combine: Callable[[Tensor, Tensor, float], Tensor],
    scale: float,
    latents: Tensor,
    k: float,
) -> Tensor:
    """Guide the source by its own two predictions, as the family's pipeline guides."""
    return combine(cond(latents, k), uncond(latents, k), scale)


def start_noise(
    model: PipelineModel, latents: Tensor | None, clean: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Draw the noise the edit starts from, [1, C, T, h, w] fp32, or take the latents that were given."""
    if latents is None:
        return model.draw_noise(clean.shape, generator, clean.device)
    if not isinstance(latents, Tensor):
        raise InputError(f"latents must be a torch.Tensor, got {type(latents).__name__}")
    if latents.shape != clean.shape:
        raise InputError(f"latents must be {tuple(clean.shape)}, got {tuple(latents.shape)}")
    return latents.to(device=clean.device, dtype=torch.float32)


def generator_of(seed: int, number: int) -> torch.Generator:
    """The generator of one of several noises, on the CPU: draws of one seed that do not meet those of another."""
    mixed = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little") >> 1)
