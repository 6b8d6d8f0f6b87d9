"""A denoising loop of diffusers' modular pipelines while it is locked: where the source is, its forwards, the lock."""

from typing import Any

import torch
from torch import Tensor

from kvlock_fast.errors import InputError
from kvlock_fast.integrations.attach import attach
from kvlock_fast.loop.schedule import can_lock, compares_with_source, zeroed_steps
from kvlock_fast.loop.solver import clean_and_noise
from kvlock_fast.models.schedulers import check_scheduler, noise_levels, prediction_of


class LockedRun:
    """The source's path and the lock of a denoising loop, beside diffusers' state."""

    def __init__(self, components: Any, guider: Any, steps: int, noise: Tensor, source: Any):
        """noise: where the edit starts [B, C, T, h, w]; source: the names of `modular.SOURCE` as attributes."""
        lock = guider.lock
        if lock.source_path != "renoise":
            raise InputError(f"source_path must be 'renoise' in a modular pipeline, got {lock.source_path!r}")
        check_scheduler(components.scheduler)
        self.components, self.source = components, source
        self.kind = prediction_of(components.scheduler)
        self.signal, self.sigmas = (x.to(noise.device) for x in noise_levels(components.scheduler))
        # One noise for the source and all samples, as in KVLockPipeline.
        self.noise = noise[:1].float()
        transformers = [components.transformer, getattr(components, "transformer_2", None)]
        self.kv = attach(
            [x for x in transformers if x is not None], source.foreground, lock=lock, num_steps=steps,
            guidance_scale=guider.guidance_scale,
        )  # fmt: skip
        self.prediction: Tensor | None = None
        self.locks = False

    def source_at(self, k: int) -> Tensor:
        """The source's latents [1, C, T, h, w] before step k, or (k = T) clean."""
        clean = self.source.source_latents.float()
        return clean if k == len(self.signal) - 1 else self.signal[k] * clean + self.sigmas[k] * self.noise

    def start(self, batch: int) -> Tensor:
        """The edit's starting latents [batch, C, T, h, w]."""
        return self.background(0, self.noise.expand(batch, *self.noise.shape[1:]))

    def background(self, k: int, latents: Tensor) -> Tensor:
        """The latents before step k, with the source's outside of the mask where the lock keeps it."""
        return self.kv.keep_background(latents, self.source_at(k)) if self.kv.lock.keeps_background else latents

    def forward_source(self, k: int, timestep: Tensor, dtype: torch.dtype, attention_kwargs: Any) -> None:
        """The source's forward of step k, where anything follows from it."""
        lock = self.kv.lock
        steps = len(self.signal) - 1
        zeroed = k < zeroed_steps(lock, steps)
        self.locks = not zeroed and can_lock(lock, steps, k)
        if not self.locks and (zeroed or not compares_with_source(lock)):
            return
        with self.kv.source():
            self.prediction = self._transformer(timestep)(
                hidden_states=self.source_at(k).to(dtype),
                timestep=timestep.expand(1).to(dtype),
                encoder_hidden_states=self.source.source_prompt_embeds.to(dtype),
                attention_kwargs=attention_kwargs,
                return_dict=False,
            )[0]

    def clean(self, k: int, latents: Tensor, pred: Tensor) -> tuple[Tensor, Tensor | None]:
        """The predicted clean latents of the edit, and of the source where its forward has run."""
        of_sample, of_pred = clean_and_noise(self.kind, self.signal[k], self.sigmas[k])[0]
        mine = of_sample * latents.float() + of_pred * pred.float()
        if self.prediction is None:
            return mine, None
        return mine, of_sample * self.source_at(k) + of_pred * self.prediction.float()

    def _transformer(self, timestep: Tensor) -> Any:
        components = self.components
        if getattr(components, "transformer_2", None) is None:
            return components.transformer
        low = timestep < components.config.boundary_ratio * components.num_train_timesteps
        return components.transformer_2 if low else components.transformer
