"""KV-Lock's guidance as a guider of diffusers: s*, and a scale that follows the variance of predicted clean latents.

    pred = s* uncond + omega (cond - s* uncond)

In `KVLockDenoiseStep` (modular.py) it also holds the lock on the transformer, around the forwards of both branches.
Alone, in the place of `ClassifierFreeGuidance` in any pipeline with guiders, it guides only.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor, nn

from kvlock_fast.config import LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.integrations.loop_schedule import LoopSchedule

if TYPE_CHECKING:
    from kvlock_fast.integrations.modular_run import LockedRun


def lock_of(lock: str | Mapping[str, Any] | LockConfig) -> LockConfig:
    """A preset by name, or fields of a `LockConfig`, with `preset` among them to begin with (else "kvlock")."""
    if isinstance(lock, LockConfig):
        return lock.in_own_loop()
    if isinstance(lock, str):
        lock = {"preset": lock}
    if not isinstance(lock, Mapping):
        raise InputError(f"lock must be a preset's name, fields of a LockConfig or one, got {type(lock).__name__}")
    try:
        return LockConfig.preset(
            lock.get("preset", "kvlock"), **{k: v for k, v in lock.items() if k != "preset"}
        ).in_own_loop()
    except ValueError as error:
        raise InputError(f"lock: {error}") from error


class KVLockGuidance(ClassifierFreeGuidance):
    """Guidance by s* and by a scale that follows the variance, as a guider of diffusers.

    Where the scale is 1, or the step out of [start, stop), there is no negative branch, as with
    `ClassifierFreeGuidance`; with lock="cfg" all of it is the same, bit for bit.

    Args:
        guidance_scale: omega0.
        lock: a preset's name, fields of a `LockConfig` with `preset` among them, or a `LockConfig`.
        num_train_timesteps: largest timestep of a flow, read where the guider does not see the scheduler.
        start, stop, enabled: as in diffusers' guiders.
    """

    use_original_formulation = False

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 5.0,
        lock: str | dict = "kvlock",
        num_train_timesteps: int = 1000,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super(ClassifierFreeGuidance, self).__init__(start, stop, enabled)  # whose own fields are no part of the config
        self.guidance_scale = guidance_scale
        self.lock = lock_of(lock)
        if self.lock.guidance_interval is not None:
            raise InputError(
                f"guidance_interval {self.lock.guidance_interval}: a guider's own start and stop say when it guides"
            )
        if isinstance(lock, LockConfig):
            self.register_to_config(lock=self.lock.as_dict())
        self.num_train_timesteps = num_train_timesteps
        self.run: LockedRun | None = None
        self._own: LoopSchedule | None = None
        self._latents: Tensor | None = None
        self._open = ExitStack()

    @property
    def schedule(self) -> LoopSchedule | None:
        """The schedule, with alpha, omega, s* and the variance; None before a step."""
        return self._own if self.run is None else self.run.kv

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.LongTensor) -> None:
        """Note the step, before it runs; the second of two guiders has the later steps of a run only."""
        before = self._step, self._num_inference_steps
        super().set_state(step, num_inference_steps, timestep)
        if step == 0 or before != (step - 1, num_inference_steps):
            self._own = None
        if self.run is not None:  # which two guiders may share, of two scales
            self.run.kv.guidance_scale = self.guidance_scale

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """Prepare a batch for each branch."""
        self._latents = None
        return super().prepare_inputs(data)

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """Prepare a batch for each branch from a modular pipeline's state."""
        self._latents = getattr(data, "latents", None)
        return super().prepare_inputs_from_block_state(data, input_fields)

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Open the lock before a branch's forward."""
        super().prepare_models(denoiser)
        if self.run is not None and self.run.locks:
            self._open.enter_context(self.run.kv.edit())

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Close the lock after a branch's forward."""
        self._open.close()

    def leave(self, run_error: BaseException) -> None:
        """Release the lock after a branch's forward has failed with `run_error`."""
        try:
            self._open.__exit__(type(run_error), run_error, run_error.__traceback__)
        except BaseException as error:
            if error is not run_error:
                raise

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """Combine both predictions; in fp32 where this is not diffusers' own guidance."""
        pred = pred_cond
        if self._enabled:
            schedule = self._schedule(pred_cond)
            if not self.lock.stock_guidance:
                pred_cond, pred_uncond = pred_cond.float(), None if pred_uncond is None else pred_uncond.float()
            pred = schedule.guide(pred_cond, pred_uncond)
            self._observe(schedule, pred)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _observe(self, schedule: LoopSchedule, pred: Tensor) -> None:
        if self.run is not None and self._latents is not None:
            schedule.observe(*self.run.clean(self._step, self._latents, pred))
        elif self._latents is not None:
            sigma = self._timestep / self.num_train_timesteps
            schedule.observe(self._latents.float() - sigma * pred.float(), None)
        elif schedule.lock.follows_variance:
            raise InputError(
                "omega follows the variance of the predicted clean latents, which this pipeline does not show its "
                "guider: take a lock of constant omega, such as 's-star-only'"
            )
        else:
            schedule.step += 1

    def _schedule(self, pred: Tensor) -> LoopSchedule:
        if self.run is not None:
            return self.run.kv
        if self._own is None:  # there is no mask: all is foreground
            tokens = pred.shape[2:].numel() if pred.ndim > 3 else pred.shape[1]
            foreground = torch.ones((1, tokens), dtype=torch.bool, device=pred.device)
            lock = replace(self.lock, alpha=0.0, background_latents="model", compute="full")
            self._own = LoopSchedule(lock, foreground, self._num_inference_steps, self.guidance_scale, (1, 1, 1))
            self._own.restart(self._step or 0)
        return self._own
