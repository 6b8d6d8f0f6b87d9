"""What the loop needs of a model, and what the models of all families have of their diffusers pipelines.

A family's model says how pixels become its latents (`geometry`, `encode_video`, `decode`, `draw_noise`), what its
transformer is told (`condition`) and how it is asked (`predict`); all else has a default here.
Some pipelines guide by a component of their own, a "guider": `check_guider` says whether an edit can take its place.
"""

import weakref
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.masks import Geometry, ProjectedMask, project_mask
from kvlock_fast.models.autoencoder import decode_each, encode_mode
from kvlock_fast.models.registry import transformer_name

PLAIN = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0}


def check_guider(guider: Any) -> None:
    """Raise InputError unless it is classifier-free guidance at every step: an edit's guidance takes its place."""
    name, config = type(guider).__name__, getattr(guider, "config", {})
    remedy = "set pipe.guider = ClassifierFreeGuidance(), whose scale is the call's guidance_scale"
    if name != "ClassifierFreeGuidance":
        raise InputError(f"the pipeline's guider {name} is not supported: {remedy}")
    for setting, plain in PLAIN.items():
        if config.get(setting, plain) != plain:
            raise InputError(
                f"the pipeline's guider {name} with {setting}={config[setting]!r} is not supported: {remedy}"
            )


def is_on(guider: Any) -> bool:
    """Whether a pipeline's guider guides: not without one, and not where it is switched off."""
    return guider is not None and bool(guider.config.get("enabled", True))


Made = TypeVar("Made")


class PerClip:
    """Keeps what was made of the latest clip, by name: made once, however many prompts go with the clip."""

    def __init__(self):
        self._clip: list[weakref.ref[Tensor]] = []
        self._made: dict[str, object] = {}

    def __call__(self, clip: tuple[Tensor, ...], name: str, make: Callable[[], Made]) -> Made:
        """What was made of these very tensors under this name, or else what `make` gives."""
        held = [tensor() for tensor in self._clip]
        if len(held) != len(clip) or any(a is not b for a, b in zip(held, clip, strict=True)):
            self._clip, self._made = [weakref.ref(tensor) for tensor in clip], {}
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


class PipelineModel:
    """What the loop needs of a diffusers pipeline, as far as families agree."""

    arch: ArchSpec
    geometry: Geometry
    two_stages = False
    shifts_by_size = False
    """Whether `timesteps_settings` gives a scheduler with dynamic shifting its mu."""
    told_of_frames = False
    """Whether what the transformer is told belongs to frames of the clip, which then cannot be cut into stretches."""
    why_not_captured: str | None = None
    """What in a forward of diffusers' own, such as a read from the device, a captured step would miss."""
    guided_if_asked = False
    """Whether a negative branch is run only where a negative prompt is given: by models that may be distilled."""
    most_text = 512
    """Text tokens that the model may be given, for planning."""
    usual_extent: tuple[int | None, int | None, int | None] = None, None, None
    """Frames, height and width of a call that gives none, where the pipeline's call has no number for it."""
    latents_dtype: torch.dtype = torch.float32
    """Of the latents between steps, in the family's pipeline."""

    def __init__(self, pipe: Any):
        """Raises InputError for a pipeline of another kind."""
        transformers = [t for t in (pipe.transformer, getattr(pipe, "transformer_2", None)) if t is not None]
        for transformer in transformers:
            name = transformer_name(transformer)
            if name not in self.arch.transformers:
                raise InputError(f"the model is not of the family {self.arch.family}: it has a {name}")
        self.pipe = pipe
        self.transformers: list[nn.Module] = transformers

    @classmethod
    def arch_of(cls, transformer: nn.Module) -> ArchSpec:
        """What locking must know of a transformer of the family, without its pipeline."""
        return cls.arch

    @property
    def config(self) -> Any:
        """Of the (first) transformer."""
        return self.transformers[0].config

    @property
    def latent_channels(self) -> int:
        """Of the latents between steps."""
        return self.config.in_channels

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    @property
    def modules(self) -> list[nn.Module]:
        """All whose weights a source's keys and values come from."""
        parts = getattr(self.pipe, "components", None) or vars(self.pipe)
        named = (
            parts.get(name) for name in sorted(parts) if name == "vae" or name.startswith(("text_enc", "image_enc"))
        )
        return [*self.transformers, *(part for part in named if isinstance(part, nn.Module))]

    def facts(self, given: Given) -> dict[str, Any]:
        """What decides, beside weights and words, what a forward of the source gives."""
        return {}

    def stage_at(self, timestep: float, num_train_timesteps: int) -> int:
        """0, or 1 where low noise has a stage of its own."""
        return 0

    def transformer_of(self, stage: int) -> int:
        """Which of the transformers serves a stage."""
        return 0

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """What the family's pipeline gives to `set_timesteps` beside the number of steps: sigmas, mu. In pixels."""
        return {}

    def guided(self, guidance_scale: float) -> bool:
        """Whether a negative branch is run at this scale: not by models that were distilled to do without."""
        return guidance_scale > 1

    def omega0(self, guidance_scale: float) -> float:
        """The scale as the loop counts it, where 1 adds nothing to the conditional prediction."""
        return guidance_scale

    def time_at(self, solver: Any, k: int) -> Tensor:
        """What `predict` is given as the timestep of x_k [], for k = T too: the scheduler's own."""
        return solver.timestep_at(k)

    def combine(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Both branches as the family's pipeline guides them, in its order of operations; scale: by `omega0`."""
        return uncond + scale * (cond - uncond)

    def settle(self, cond: Tensor, uncond: Tensor | None, scale: float, latents: Tensor, sigma: Tensor) -> Tensor:
        """What the family's pipeline gives its scheduler, of a prediction or both branches', at latents of a sigma."""
        return cond if uncond is None else self.combine(cond, uncond, scale)

    def project(self, pixels: Tensor) -> ProjectedMask:
        """A mask bool [F, H, W] as the model has it."""
        return project_mask(pixels, self.geometry)

    def tokens_of(self, latents: Tensor) -> int:
        """Of the video in latents [B, C, T, h, w]."""
        return prod(-(-size // p) for size, p in zip(latents.shape[-3:], self.geometry.patch_size, strict=True))

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """[len(prompts), L, C] in the transformer's dtype."""
        raise NotImplementedError

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """What the transformer is told of each of the prompts."""
        return Conditioning(text=self.encode_prompts(prompts))

    def tokens_ahead(self, latents: Tensor) -> int | None:
        """How many tokens of other frames self-attentions have in front of those of latents [..., T, h, w]."""
        return None

    def condition_source(self, prompts: list[str], given: Given) -> Conditioning:
        """The same for the source's own pass, of which nothing is to be changed."""
        return self.condition(prompts, given)

    def may_change(self, pixels: Tensor) -> Tensor:
        """Of a mask bool [F, H, W], what the model can change at all. Raises InputError where that is nothing."""
        return pixels

    def condition_negative(self, prompt: str, prompts: list[str], given: Given) -> Conditioning:
        """What it is told of the negative prompt beside each of the prompts."""
        return self.condition([prompt], given).expand(len(prompts))

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """[1, C, T, h, w] fp32, as the family's pipeline draws it."""
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def first_latents(self, noise: Tensor, given: Given) -> Tensor:
        """What the family's pipeline starts from, of the noise drawn: the noise, where nothing is mixed into it."""
        return noise

    def last_latents(self, latents: Tensor, told: Conditioning) -> Tensor:
        """What the family's pipeline makes of the last step's latents [B, C, T, h, w], told so of each sample."""
        return latents

    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [F, H, W, 3] to normalised latents [1, C, T, h, w] fp32, by the posterior's mode."""
        return self._normalised(encode_mode(self.pipe.vae, frames, self.device))

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        """Normalised latents [B, C, T, h, w] of so many frames to uint8 [B, F, H, W, 3] on the CPU."""
        return decode_each(self.pipe.vae, self._denormalised(latents), tiled)

    def _normalised(self, latents: Tensor) -> Tensor:
        """The autoencoder's own latents fp32 as the model knows them."""
        return latents * self.pipe.vae.config.scaling_factor

    def _denormalised(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder knows them, scaled in its dtype as the pipelines do."""
        return latents.to(self.pipe.vae.dtype) / self.pipe.vae.config.scaling_factor

    def own_frames(self, video: Tensor, count: int) -> Tensor:
        """Of decoded frames [F, H, W, 3], those of a source that had so many before it was brought to the model's."""
        return video[:count]

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The prediction [B, C, T, h, w] of a transformer, at latents [B, ...], timestep [], told so of each sample.

        In the dtype in which the family's pipeline gives it to the scheduler.
        """
        raise NotImplementedError
