"""The base of all families' models: everything that the loop needs of a diffusers pipeline, with its defaults.

A family says how pixels become its latents (`geometry`, `encode_video`, `decode`, `draw_noise`), what its transformer
is told (`condition`) and how it is asked (`predict`). Much of that is data: the class attributes of `PipelineModel`.
Some pipelines guide by a component of their own, a "guider": `check_guider` says whether an edit can take its place.
"""

import weakref
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.locking.foreground import View, processors, whole_forward
from kvlock_fast.locking.lock import TransformerLock
from kvlock_fast.masks import Geometry, ProjectedMask, Region, project_mask
from kvlock_fast.models.autoencoder import decode_each, encode_mode
from kvlock_fast.models.protocols import Config, Guider, Pipeline, Solver, Transformer, transformer_name
from kvlock_fast.models.schedulers import shift_of

TEXT = {"encoder_hidden_states": "text"}
MASKED_TEXT = TEXT | {"encoder_attention_mask": "mask"}
WORDS_AND_LETTERS = MASKED_TEXT | {"encoder_hidden_states_2": "letters", "encoder_attention_mask_2": "letters_mask"}
"""Arguments of transformers, and the names of the conditioning tensors that they take."""
PLAIN = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0}


def check_guider(guider: Guider | None) -> None:
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


Made = TypeVar("Made")
Rope = tuple[Tensor, Tensor] | None
"""Cosine and sine of positions, each [1, S, 1, D]; None where tokens are given theirs otherwise."""


class PerClip:
    """Keeps results for the latest clip, by name: each is computed once, however many prompts go with the clip."""

    def __init__(self):
        self._clip: list[weakref.ref[Tensor]] = []
        self._made: dict[str, Any] = {}

    def __call__(self, clip: tuple[Tensor, ...], name: str, make: Callable[[], Made]) -> Made:
        """The result kept under this name for these very tensors, or else what `make` returns."""
        held = [tensor() for tensor in self._clip]
        if len(held) != len(clip) or any(a is not b for a, b in zip(held, clip, strict=True)):
            self._clip, self._made = [weakref.ref(tensor) for tensor in clip], {}
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


class PipelineModel:
    """A diffusers pipeline as the loop sees it. A family overrides the data and methods where it differs."""

    arch: ArchSpec
    two_stages: bool = False
    """Whether low noise has a transformer, or a guidance scale, of its own."""
    shifts_by_size: bool = False
    """Whether `timesteps_settings` gives a scheduler with dynamic shifting its mu."""
    evenly_spaced: bool = False
    """Whether the pipeline gives its scheduler sigmas that are evenly spaced from 1."""
    told_of_frames: bool = False
    """Whether the conditioning belongs to frames of the clip, which then cannot be cut into stretches."""
    told_names: Mapping[str, str] = TEXT
    """Conditioning by the names of the transformer's arguments; a tensor that is not there is given as None."""
    told_scale: bool = False
    """Whether the transformer takes the guidance scale as an input, so that there is no negative branch."""
    has_guider: bool = False
    """Whether the pipeline guides by a component, which may be off or missing."""
    why_not_captured: str | None = None
    """Reason why a step cannot be captured, such as a read from the device in diffusers' forward; None: it can."""
    guided_if_asked: bool = False
    """Whether a negative branch is run only where a negative prompt is given: by models that may be distilled."""
    most_text: int = 512
    """Text tokens that the model may be given, for planning."""
    usual_extent: tuple[int | None, int | None, int | None] = None, None, None
    """Frames, height and width of a call that gives none, where the pipeline's call has no number for it."""
    in_model_dtype: bool = False
    """Whether the pipeline draws noise and keeps latents between steps in the transformer's dtype, and not in fp32."""
    time_in_model_dtype: bool = False
    """Whether the transformer is given the time in its own dtype."""
    time_by_token: bool = False
    """Whether the transformer is given a timestep for each token, by `token_times`."""
    time_unit: int = 1
    """Divides the time that the transformer is given."""

    def __init__(self, pipe: Pipeline):
        """Raises InputError for a pipeline of another kind."""
        transformers = [t for t in (pipe.transformer, getattr(pipe, "transformer_2", None)) if t is not None]
        for transformer in transformers:
            name = transformer_name(transformer)
            if name not in self.arch.transformers:
                raise InputError(f"the model is not of the family {self.arch.family}: it has a {name}")
        self.pipe = pipe
        self.transformers: list[Transformer] = transformers
        self.arch = self.arch_of(transformers[0])
        self._made = PerClip()
        self._kept: dict[tuple[Any, ...], Any] = {}
        self.check()

    def check(self) -> None:
        """Raise InputError for a pipeline that the family's class of transformer is there for, but not this model."""

    def kept(self, key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """The result of `make`, kept by key for good: captured steps read tensors where they are."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @classmethod
    def arch_of(cls, transformer: Transformer) -> ArchSpec:
        """The facts that locking needs for a transformer of the family, without its pipeline."""
        return cls.arch

    @property
    def config(self) -> Config:
        """Config of the (first) transformer."""
        return self.transformers[0].config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the (first) transformer."""
        return self.transformers[0].dtype

    @property
    def latents_dtype(self) -> torch.dtype:
        """Dtype of the latents between steps, in the family's pipeline."""
        return self.dtype if self.in_model_dtype else torch.float32

    @property
    def latent_channels(self) -> int:
        """Channels of the latents between steps."""
        return self.config.in_channels

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    @property
    def modules(self) -> list[nn.Module]:
        """All modules whose weights decide a source's keys and values."""
        parts = getattr(self.pipe, "components", None) or vars(self.pipe)
        named = (
            parts.get(name) for name in sorted(parts) if name == "vae" or name.startswith(("text_enc", "image_enc"))
        )
        return [*self.transformers, *(part for part in named if isinstance(part, nn.Module))]

    @property
    def geometry(self) -> Geometry:
        """How pixels become latents, and latents tokens."""
        vae, patch = self.pipe.vae, self.config.patch_size
        tokens = self.config.get("patch_size_t") or 1, patch, patch
        return Geometry(vae.temporal_compression_ratio, vae.spatial_compression_ratio, tokens)

    def facts(self, given: Given) -> dict[str, Any]:
        """Values that decide, beside weights and words, what a forward of the source gives."""
        return {"guidance_scale": given.guidance_scale} if self.told_scale else {}

    def stage_at(self, timestep: float, num_train_timesteps: int) -> int:
        """0, or 1 where low noise has a stage of its own."""
        return 0

    def transformer_of(self, stage: int) -> int:
        """Number of the transformer that serves a stage."""
        return 0

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """The pipeline's arguments of `set_timesteps` beside the number of steps: sigmas, mu. Extent in pixels."""
        return {"sigmas": np.linspace(1.0, 0.0, num_steps + 1)[:-1]} if self.evenly_spaced else {}

    def shifted_sigmas(self, num_steps: int, tokens: int) -> Mapping[str, Any]:
        """Evenly spaced sigmas, from 1 to 1 / num_steps, and the shift mu for so many tokens."""
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": shift_of(self.pipe.scheduler, tokens)}

    def guided(self, guidance_scale: float) -> bool:
        """Whether a negative branch is run at this scale."""
        guider = self.pipe.guider if self.has_guider else None
        on = guider is not None and bool(guider.config.get("enabled", True))
        return guidance_scale > 1 and not self.told_scale and (on or not self.has_guider)

    def omega0(self, guidance_scale: float) -> float:
        """The scale as the loop counts it, where 1 adds nothing to the conditional prediction."""
        return guidance_scale

    def time_at(self, solver: Solver, k: int) -> Tensor:
        """The timestep [] of x_k that `predict` is given, for k = T too: the scheduler's own."""
        return solver.timestep_at(k)

    def combine(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Both branches as the family's pipeline guides them, in its order of operations; scale: by `omega0`."""
        return uncond + scale * (cond - uncond)

    def settle(self, cond: Tensor, uncond: Tensor | None, scale: float, latents: Tensor, sigma: Tensor) -> Tensor:
        """The output that the family's pipeline gives its scheduler, from one branch or both.

        Args:
            cond: the conditional prediction.
            uncond: the negative branch's prediction; None where there is none.
            scale: the guidance scale, by `omega0`.
            latents: the latents that both were predicted at.
            sigma: their noise level.
        """
        return cond if uncond is None else self.combine(cond, uncond, scale)

    def project(self, pixels: Tensor) -> ProjectedMask:
        """A mask bool [F, H, W] as the model has it."""
        return project_mask(pixels, self.geometry)

    def tokens_of(self, latents: Tensor) -> int:
        """Number of the video's tokens in latents [B, C, T, h, w]."""
        return prod(-(-size // p) for size, p in zip(latents.shape[-3:], self.geometry.patch_size, strict=True))

    def tokens_ahead(self, latents: Tensor) -> int | None:
        """Number of tokens of other frames that self-attentions have in front of those of latents [..., T, h, w]."""
        return None

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Embeddings [len(prompts), L, C] of the prompts, in the transformer's dtype."""
        raise NotImplementedError

    def words(self, prompts: list[str], **more: Any) -> Any:
        """Results of the pipeline's `encode_prompt` for prompts without a negative one."""
        return self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=self.device, **more)

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """Conditioning of the transformer for each of the prompts."""
        return Conditioning(text=self.encode_prompts(prompts))

    def text_and(self, prompts: list[str], **shared: Tensor) -> Conditioning:
        """Text of each of the prompts, beside tensors [1, ...] that they share."""
        every = {name: x.expand(len(prompts), *x.shape[1:]) for name, x in shared.items()}
        return Conditioning(text=self.encode_prompts(prompts), **every)

    def masked_text(self, prompts: list[str], most: int, **more: Any) -> Conditioning:
        """Text [n, L, C] in the transformer's dtype and its mask [n, L], of at most so many tokens."""
        text, mask, _, _ = self.words(prompts, max_sequence_length=most, **more)
        return Conditioning(text=text.to(self.dtype), mask=mask)

    def condition_source(self, prompts: list[str], given: Given) -> Conditioning:
        """Conditioning for the source's own pass, in which nothing is to be changed."""
        return self.condition(prompts, given)

    def condition_negative(self, prompt: str, prompts: list[str], given: Given) -> Conditioning:
        """Conditioning for the negative prompt, beside each of the prompts."""
        return self.condition([prompt], given).expand(len(prompts))

    def may_change(self, pixels: Tensor) -> Tensor:
        """The part of a mask bool [F, H, W] that the model can change. Raises InputError where there is none."""
        return pixels

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Noise [1, C, T, h, w] fp32, as the family's pipeline draws it."""
        return self._drawn(shape, generator, device).float()

    def _drawn(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Noise as diffusers draws it, in a dtype, by default that of the latents between steps."""
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(shape, generator=generator, device=device, dtype=dtype or self.latents_dtype)

    def first_latents(self, noise: Tensor, given: Given) -> Tensor:
        """The latents that the family's pipeline starts from, given the noise drawn."""
        return noise

    def last_latents(self, latents: Tensor, told: Conditioning) -> Tensor:
        """The pipeline's result for the last step's latents [B, C, T, h, w] and the conditioning of each sample."""
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
        """The first `count` of decoded frames [F, H, W, 3]: those of a source before it was filled up."""
        return video[:count]

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The prediction [B, C, T, h, w] of a transformer, in the dtype in which the pipeline hands it on.

        Args:
            which: the transformer's number.
            latents: [B, C, T, h, w].
            timestep: [].
            told: the conditioning of each sample.
        """
        transformer = self.transformers[which]
        prediction = transformer(
            hidden_states=self.entering(latents, told).to(transformer.dtype),
            timestep=self.times(timestep, latents),
            **self.beside(told, latents),
            return_dict=False,
        )[0]
        return self.leaving(prediction, latents)

    def entering(self, latents: Tensor, told: Conditioning) -> Tensor:
        """The transformer's input for the latents [B, ...]."""
        return latents

    def leaving(self, prediction: Tensor, latents: Tensor) -> Tensor:
        """The transformer's output as a prediction for the latents [B, ...]."""
        return prediction

    def beside(self, told: Conditioning, latents: Tensor) -> dict[str, Any]:
        """The transformer's other inputs, by its own names."""
        return {name: told.get(key) for name, key in self.told_names.items()}

    def times(self, timestep: Tensor, latents: Tensor) -> Tensor:
        """The timestep [] as the transformer takes it, for each sample of latents [B, ...], or each of its tokens."""
        if self.time_by_token:
            return self.token_times(timestep, latents)
        timestep = timestep.expand(len(latents))
        timestep = timestep.to(self.dtype) if self.time_in_model_dtype else timestep
        return timestep if self.time_unit == 1 else timestep / self.time_unit

    def token_times(self, timestep: Tensor, latents: Tensor, computed: Tensor | None = None) -> Tensor:
        """The timestep [] for each of the tokens [B, N] of latents [B, ...], or for those that are computed."""
        raise NotImplementedError


class ForegroundModel(PipelineModel):
    """A model that can compute some of its tokens alone, by the transformer's own parts on rows of the sequence.

    All but self-attention works token by token; self-attention sees the rest of the sequence as the source's keys and
    values, which the lock holds (locking/foreground.py). The blocks are the transformer's own, compiled or not.
    """

    processor: Any
    """Attention processor in place of diffusers' own, while not all tokens are there."""

    def predict_foreground(
        self, lock: TransformerLock, latents: Tensor, timestep: Tensor, told: Conditioning, region: Region,
        background: Tensor, rows: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The prediction [B, C, T, h, w] at the region's tokens, and 0 elsewhere.

        Args:
            lock: holds the background's K and V.
            latents: [B, C, T, h, w], whole.
            timestep: [].
            told: the conditioning of each sample.
            region: the tokens that are computed.
            background: indices of the tokens that the lock holds.
            rows: which of these lie outside the mask; None: all.
        """
        transformer, computed = lock.transformer, region.computed
        assert isinstance(transformer, Transformer)
        x, beside = self.entering(latents, told).to(transformer.dtype), self.beside(told, latents)
        seen = background if rows is None else background.index_select(0, rows)
        words = told["text"].shape[1] if self.arch.text == "prefix" else 0
        with whole_forward(transformer):
            rope = self._rope(transformer, x, beside)
            lock.state.view = View(words + region.foreground, rows, _at(rope, seen))
            with processors(lock.attentions, self.processor):
                out = self._forward_some(transformer, x, timestep, beside, computed, _at(rope, computed))
        grid = [size // patch for size, patch in zip(latents.shape[2:], self.geometry.patch_size, strict=True)]
        whole = out.new_zeros(len(out), prod(grid), *out.shape[2:]).index_copy_(1, computed, out)
        return whole.unflatten(1, grid).permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _rope(self, transformer: Transformer, x: Tensor, beside: Mapping[str, Any]) -> Rope:
        """Cosine and sine of all tokens' positions."""
        raise NotImplementedError

    def _forward_some(
        self,
        transformer: Transformer,
        x: Tensor,
        timestep: Tensor,
        beside: Mapping[str, Any],
        computed: Tensor,
        rope: Rope,
    ) -> Tensor:
        """The output for the tokens `computed` [N], as patches [B, N, pt, ph, pw, C]; x: the input, whole."""
        raise NotImplementedError


def _at(rope: Rope, tokens: Tensor) -> Rope:
    """Cosine and sine of some tokens, each [1, N, 1, D]."""
    return None if rope is None else (rope[0].index_select(1, tokens), rope[1].index_select(1, tokens))


class ChannelNormModel(PipelineModel):
    """A model whose latents are normalised by the autoencoder's `latents_mean` and `latents_std`, one a channel."""

    def _normalised(self, latents: Tensor) -> Tensor:
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std

    def _denormalised(self, latents: Tensor) -> Tensor:
        mean, std = self._latent_statistics(latents)
        return latents.float() * std + mean

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [1, C, 1, 1, 1] fp32, on the latents' device."""
        config = self.pipe.vae.config
        return by_channel(config.latents_mean, latents), by_channel(config.latents_std, latents)


def by_channel(values: Any, latents: Tensor) -> Tensor:
    """Numbers, one a channel, as [1, C, 1, 1, 1] fp32 on the latents' device."""
    return torch.tensor(values, dtype=torch.float32, device=latents.device).view(1, -1, 1, 1, 1)


def without_first_frame(pixels: Tensor, kind: str = "image-to-video") -> Tensor:
    """A mask bool [F, H, W] without the first frame, which the model holds. Raises InputError if nothing is left."""
    if not pixels[1:].any():
        raise InputError(f"mask marks the first frame only, which this {kind} model takes as it is")
    return torch.cat([torch.zeros_like(pixels[:1]), pixels[1:]])
