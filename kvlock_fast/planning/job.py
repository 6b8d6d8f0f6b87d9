"""An edit to be planned, and the bytes it needs in each tier and format.

Bytes of the cache are those of `StepLayout`: what is allocated. Activations are an estimate: what is alive in
a block of diffusers' own, within 8 %.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch

from kvlock_fast.cache.layout import KVShape, StepLayout
from kvlock_fast.parameters import is_whole
from kvlock_fast.planning import costs
from kvlock_fast.planning.model_size import ModelSize

DEVICE_SLOTS = 2
"""Arenas on the GPU in the tiers host and disk: the step at work and the next."""
STAGING_ARENAS = 1
"""Pinned arenas between disk and GPU."""


@dataclass(frozen=True)
class Bytes:
    """Bytes needed by place. gpu is 0 where models run on the CPU."""

    gpu: int
    host: int
    disk: int


@dataclass(frozen=True)
class Job:
    """An edit to be planned.

    height, width: in pixels, as the model takes them; background_tokens: those locked and stored; steps_stored: arenas
    of the cache; steps_locked: steps at which alpha can exceed 0 (None: those stored; more with a step stride, or
    where warm-up steps are not stored); steps_along: those of them at which the source runs along though a tier
    stores; prompts: edits of the source made together; edits: how often, with the same cache; layers: the locked
    ones, None for all; dtype: of the weights; variance_window: predictions kept for the variance; encoders_on_device:
    text encoders and autoencoder stay there; sparse_steps: how many steps compute the foreground alone, at least and at
    most (None: computation in full); steps_predicted: steps at which the source's own prediction is needed, as in a
    coupled edit; steps_guided: steps with two branches, where the edit is guided (None: all).
    """

    model: ModelSize
    frames: int
    height: int
    width: int
    background_tokens: int
    steps_stored: int
    num_steps: int
    prompts: int = 1
    guided: bool = True
    edits: int = 1
    steps_locked: int | None = None
    steps_along: int = 0
    layers: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.bfloat16
    variance_window: int = 10
    encoders_on_device: bool = True
    sparse_steps: tuple[int, int] | None = None
    steps_predicted: int = 0
    steps_guided: int | None = None

    def __post_init__(self):
        for name in ("frames", "height", "width", "num_steps", "prompts", "edits"):
            _check_whole(name, getattr(self, name), 1, None)
        _check_whole("background_tokens", self.background_tokens, 0, self.tokens)
        _check_whole("steps_locked", self.locked, 0, self.num_steps)
        _check_whole("steps_along", self.steps_along, 0, self.locked)
        _check_whole("steps_stored", self.steps_stored, 0, self.locked - self.steps_along)
        _check_whole("steps_predicted", self.steps_predicted, 0, self.num_steps)

    @property
    def locked(self) -> int:
        """Number of steps at which alpha can exceed 0."""
        return self.steps_stored if self.steps_locked is None else self.steps_locked

    @property
    def source_forwards(self) -> int:
        """Number of forwards of the source before the first edit, of a tier that stores."""
        return max(self.steps_stored, self.steps_predicted - self.steps_along)

    @cached_property
    def tokens(self) -> int:
        """Number of tokens of the video."""
        return prod(self.model.geometry.token_grid(self.frames, self.height, self.width))

    @property
    def all_tokens(self) -> int:
        """Number of tokens in self-attention: of video and text."""
        return self.tokens + self.model.text_tokens

    @property
    def foreground_tokens(self) -> int:
        return self.tokens - self.background_tokens

    def rows(self, prompts: int, lockstep: bool) -> int:
        """Number of samples in a forward: a branch or two of each prompt, and in lockstep the source."""
        return prompts * (2 if self.guided else 1) + lockstep

    @property
    def steps_alone(self) -> int:
        """Steps of a guided edit that run the prompt's branch alone."""
        return 0 if self.steps_guided is None or not self.guided else self.num_steps - self.steps_guided

    @cached_property
    def forward_seconds(self) -> float:
        """Seconds of a forward of one row."""
        return costs.forward_seconds(self.model, self.all_tokens)

    def layout(self, format: str) -> StepLayout:
        """Layout of one step's arena."""
        layers = tuple(range(self.model.layers)) if self.layers is None else self.layers
        shape = KVShape(layers, self.background_tokens, self.model.heads, self.model.head_dim)
        return _layout(shape, format, self.dtype)

    @property
    def naive_bytes_per_step(self) -> int:
        """Bytes of K and V in bf16 of every video token and every layer, of one branch."""
        return 2 * self.tokens * self.model.dim * self.model.layers * 2

    @property
    def weight_bytes(self) -> int:
        return self.model.weight_bytes(self.dtype, self.encoders_on_device)

    @property
    def activation_bytes(self) -> int:
        """Bytes alive at the peak inside a block, of one row."""
        return self.all_tokens * self.model.activation_bytes(self.dtype)

    @property
    def video_latent_bytes(self) -> int:
        """Bytes of one video's latents in fp32."""
        return 4 * self.model.channels * self.tokens * prod(self.model.geometry.patch_size)

    def latent_bytes(self, prompts: int) -> int:
        """Bytes of all latents in fp32.

        Each prompt has its latents, the next ones, the guided prediction, the clean one and the variance window; the
        source has its clean latents, the noise, and its path through all steps.
        """
        return self.video_latent_bytes * (prompts * (self.variance_window + 4) + self.num_steps + 3)

    def needed(self, tier: str, format: str | None, prompts: int, gpu: bool) -> Bytes:
        """Bytes that a way to run the job takes.

        Args:
            tier: where the source's keys and values come from.
            format: how they are packed, None in lockstep.
            prompts: prompts in a forward.
            gpu: whether there is a GPU; without one all memory is the host's.
        """
        device = self.weight_bytes + self.latent_bytes(prompts)
        device += self.rows(prompts, tier == "lockstep" or self.steps_along > 0) * self.activation_bytes
        arena = 0 if format is None else self.layout(format).nbytes
        stored = self.steps_stored * arena
        prediction = self.video_latent_bytes * self.dtype.itemsize // 4
        device += 0 if tier == "lockstep" else self.steps_predicted * prediction
        if self.sparse_steps is not None and (tier == "lockstep" or self.steps_along):
            device += self.layout("native").nbytes  # of the source's forward, which comes first
        device += {"resident": stored, "host": DEVICE_SLOTS * arena, "disk": DEVICE_SLOTS * arena}.get(tier, 0)
        host = {"host": stored, "disk": STAGING_ARENAS * arena * gpu}.get(tier, 0)
        path = self.num_steps * self.video_latent_bytes + self.source_forwards * prediction
        disk = stored + path if tier == "disk" else 0
        return Bytes(device, host, disk) if gpu else Bytes(0, device + host, disk)


@lru_cache(maxsize=256)
def _layout(shape: KVShape, format: str, dtype: torch.dtype) -> StepLayout:
    return StepLayout.usual(shape, format, dtype)


def _check_whole(name: str, value: int, least: int, most: int | None) -> None:
    if not is_whole(value, least, math.inf if most is None else most):
        bound = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {bound}, got {value!r}")
