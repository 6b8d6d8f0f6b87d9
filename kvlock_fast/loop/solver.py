"""The ODE's steps: from noise (k = 0) to the clean latent (k = T), by the scheduler the model ships with.

x_k = a_k x0 + b_k n (schedulers.py); from the sample and the model's prediction follow x0hat and the noise n.

Every deterministic step is linear in the sample and the outputs so far, so a solver is a table [steps, 3, 3 + J]. Entry
k weighs (x, v, corrected, m_1, ..., m_J), with m_j the predicted clean latent of step k - j, for three results: the
predicted clean latent, the next sample, the next corrected one (kernels/epilogue_state.py). Flow Euler and DDIM have
closed forms. A multistep scheduler is asked: given unit vectors in place of tensors, its own step returns the weights.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.errors import InputError
from kvlock_fast.models.protocols import Scheduler
from kvlock_fast.models.schedulers import (
    EDM,
    EXPLODING,
    FLOW,
    NO_SETTINGS,
    REVERSED_FLOW,
    check_scheduler,
    ddim_levels,
    make_ready,
    noise_levels,
    prediction_of,
)  # fmt: skip

X, V, CORRECTED, PAST = 0, 1, 2, 3
CLEAN, NEXT, KEPT = 0, 1, 2


def solver_table(scheduler: Scheduler) -> Tensor:
    """The table of a diffusers scheduler whose timesteps are set and no step taken: fp32, on the CPU.

    Raises InputError for a scheduler without a table: an unknown one, one that is not linear, one on its way.
    """
    name = type(scheduler).__name__
    if name not in TABLES:
        raise InputError(f"scheduler {name} has no table: one of {', '.join(TABLES)}")
    if getattr(scheduler, "_step_index", None) is not None:
        raise InputError(f"scheduler {name} has taken a step already: set its timesteps again")
    for setting, allowed in LINEAR.items():
        value = allowed[0] if (name, setting) in IGNORED else scheduler.config.get(setting, allowed[0])
        if value not in allowed:
            raise InputError(f"scheduler {name} with {setting}={value!r} has no table: not linear in predicted latents")
    table = TABLES[name](scheduler)
    if not table.isfinite().all():
        raise InputError(f"scheduler {name} has no table: its steps are not finite in fp64")
    return table.float()


def _flow_euler(scheduler: Scheduler) -> Tensor:
    """x0hat = x - sigma v, or x + (1 - sigma) v where time is reversed;  x' = x + (sigma' - sigma) v."""
    if prediction_of(scheduler) == EXPLODING:
        return _exploding_euler(scheduler)
    sigma, after = (s.double().cpu() for s in (scheduler.sigmas[:-1], scheduler.sigmas[1:]))
    ones = torch.ones_like(sigma)
    to_clean = 1 - sigma if scheduler.config.get("invert_sigmas") else -sigma
    return _one_step(clean=(ones, to_clean), next=(ones, after - sigma))


def _exploding_euler(scheduler: Scheduler) -> Tensor:
    """x0hat is the prediction;  x' = x + (sigma' - sigma) (x - x0hat) / sigma."""
    sigma, after = (s.double().cpu() for s in (scheduler.sigmas[:-1], scheduler.sigmas[1:]))
    kept = after / sigma
    return _one_step(clean=(torch.zeros_like(sigma), torch.ones_like(sigma)), next=(kept, 1 - kept))


def _ddim(scheduler: Scheduler) -> Tensor:
    """x' = sqrt(a') x0hat + sqrt(1 - a') eps, with x0hat and eps as the prediction type has them (DDIM, eq. 12)."""
    kept, after = ddim_levels(scheduler)
    clean, eps = clean_and_noise(scheduler.config.prediction_type, kept.sqrt(), (1 - kept).sqrt())
    of_sample, of_prediction = (after.sqrt() * c + (1 - after).sqrt() * e for c, e in zip(clean, eps, strict=True))
    return _one_step(clean, next=(of_sample, of_prediction))


Weights = tuple[Tensor, Tensor]


def clean_and_noise(prediction: str, signal: Tensor, noise: Tensor) -> tuple[Weights, Weights]:
    """What sample and prediction weigh in x0hat, and in the noise, where x = signal x0 + noise n.

    prediction: what the model predicts (schedulers.py).
    """
    zeros, ones = torch.zeros_like(signal), torch.ones_like(signal)
    return {
        "flow_prediction": lambda: ((ones, -noise), (ones, signal)),
        "reversed_flow": lambda: ((ones, noise), (ones, -signal)),
        "epsilon": lambda: ((1 / signal, -noise / signal), (zeros, ones)),
        "v_prediction": lambda: ((signal, -noise), (noise, signal)),
        "sample": lambda: ((zeros, ones), (1 / noise, -signal / noise)),
        EXPLODING: lambda: ((zeros, ones), (1 / noise, -signal / noise)),
    }[prediction]()


def _one_step(clean: tuple[Tensor, Tensor], next: tuple[Tensor, Tensor]) -> Tensor:
    """A table of weights of x and v alone."""
    table = torch.zeros(len(clean[0]), 3, PAST, dtype=torch.float64)
    for row, weights in ((CLEAN, clean), (NEXT, next)):
        table[:, row, X], table[:, row, V] = weights
    return table


def _multistep(scheduler: Scheduler) -> Tensor:
    """UniPC and DPM-Solver++, by their own steps on unit vectors, in fp64 as far as they let us."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.sigmas = scheduler.sigmas.double()
    scheduler.set_begin_index(0)
    order = scheduler.config.solver_order
    # [1, 1, n]: the schedulers' sums over stages want a batch and a channel.
    unit = torch.eye(PAST + order, dtype=torch.float64)[:, None, None]
    corrects = hasattr(scheduler, "last_sample")
    rows = []
    for k, timestep in enumerate(scheduler.timesteps):
        scheduler.model_outputs = [unit[PAST + j] for j in reversed(range(order))]
        if corrects and k > 0:
            scheduler.last_sample = unit[CORRECTED]
        after = scheduler.step(unit[V], timestep, unit[X], return_dict=False)[0]
        kept = scheduler.last_sample if corrects else torch.zeros_like(after)
        rows.append(torch.stack([scheduler.model_outputs[-1], after, kept]).view(3, -1).double())
    table = torch.stack(rows)
    if not table[:, NEXT, CORRECTED].any():
        table[:, KEPT] = 0
    used = table[:, :, PAST:].any(dim=0).any(dim=0).nonzero()
    return table[:, :, : PAST + (int(used[-1]) + 1 if len(used) else 0)].contiguous()


# What a setting may be, where a scheduler has it; the first stands for those that do not.
LINEAR = {
    "stochastic_sampling": (False, None),
    "algorithm_type": ("dpmsolver++",),
    "predict_x0": (True,),
    "thresholding": (False,),
    "clip_sample": (False,),
    "solver_p": (None,),
}
# Settings that diffusers has for a scheduler, and does not follow.
IGNORED = {("CogVideoXDDIMScheduler", "clip_sample")}

TABLES: dict[str, Callable[[Scheduler], Tensor]] = {
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    EDM: _exploding_euler,
    "DDIMScheduler": _ddim,
    "CogVideoXDDIMScheduler": _ddim,
    "UniPCMultistepScheduler": _multistep,
    "DPMSolverMultistepScheduler": _multistep,
}

NOISE = 1


class Solver:
    """A diffusers scheduler, stepped by number. Works on a copy: runs do not meet.

    prediction: what the model predicts (schedulers.py); signal, sigmas: a and b [T + 1], fp32; table: the steps as
    coefficients, None for a scheduler that has to be called itself.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        num_steps: int,
        device: torch.device,
        settings: Mapping[str, Any] = NO_SETTINGS,
        skip: int = 0,
    ):
        """settings: what the model's pipeline gives to `set_timesteps` beside the number of steps, as sigmas or mu;
        skip: how many of the first steps are left out: step 0 is then the first that is taken.

        Raises InputError for a scheduler that is not supported, or cannot make so many steps.
        """
        if skip >= num_steps:
            raise InputError(f"skip {skip} leaves none of {num_steps} steps")
        check_scheduler(scheduler, shifts="mu" in settings)
        name = type(scheduler).__name__
        self.scheduler = copy.deepcopy(scheduler)
        self.prediction = prediction_of(scheduler)
        self.skip = skip
        self._start = num_steps, device, settings, skip
        try:
            self.restart()
        except (ValueError, TypeError) as error:  # the second where it does not know one of the settings
            raise InputError(f"scheduler {name} cannot make {num_steps} steps: {error}") from error
        self.timesteps = self.scheduler.timesteps
        self.signal, self.sigmas = (x.to(device) for x in noise_levels(self.scheduler))
        self.table = _table(scheduler, num_steps, settings, skip)
        if len(self.timesteps) != num_steps - skip or len(self.sigmas) != num_steps - skip + 1:
            raise InputError(f"scheduler {name} made {len(self.timesteps) + skip} timesteps for {num_steps} steps")
        if not self.sigmas.isfinite().all():
            raise InputError(f"scheduler {name} cannot make {num_steps} steps: its sigmas are not finite")
        if self.prediction == "epsilon" and self.signal[0] == 0:
            raise InputError(
                f"scheduler {name} begins at pure noise (rescale_betas_zero_snr=True), where a prediction of type "
                "'epsilon' says nothing of the clean latent"
            )

    @property
    def num_steps(self) -> int:
        """Those that are taken."""
        return len(self.timesteps)

    @property
    def num_train_timesteps(self) -> int:
        """What a timestep counts to."""
        return getattr(self.scheduler, "config", {}).get("num_train_timesteps", 1000)

    @property
    def _is_flow(self) -> bool:
        return self.prediction in (FLOW, REVERSED_FLOW)

    def restart(self) -> None:
        """Forget the steps taken: the next one is step 0."""
        make_ready(self.scheduler, *self._start)

    def step(self, k: int, prediction: Tensor, sample: Tensor) -> Tensor:
        """x_{k+1} from the prediction at x_k; called once for each k, in order."""
        if self.prediction == EXPLODING:
            return self._step_down(k, prediction, sample)
        return self.scheduler.step(prediction, self.timesteps[k], sample, return_dict=False)[0]

    def _step_down(self, k: int, clean: Tensor, sample: Tensor) -> Tensor:
        """The same by the predicted clean latent, in the order of Cosmos' pipelines."""
        step, timestep = self.scheduler.step, self.timesteps[k]
        if type(self.scheduler).__name__ == EDM:
            return step(clean, timestep, sample, return_dict=False, pred_original_sample=clean)[0]
        noise = (sample - clean) / self.scheduler.sigmas[k]
        return step(noise, timestep, sample, return_dict=False)[0]

    def start(self, noise: Tensor) -> Tensor:
        """What denoising starts from: the noise, as wide as the scheduler has it then."""
        return noise * self.scheduler.config.sigma_max if self.prediction == EXPLODING else noise

    def add_noise(self, k: int, clean: Tensor, noise: Tensor) -> Tensor:
        """x_k of a clean latent: a_k clean + b_k noise, fp32; k = T is where the last step ends."""
        return self.signal[k] * clean + self.sigmas[k] * noise

    def predict_clean(self, k: int, prediction: Tensor, sample: Tensor) -> Tensor:
        """x0hat_k, fp32."""
        return self._mix(CLEAN, k, prediction, sample)

    def slope(self, k: int, prediction: Tensor, sample: Tensor) -> Tensor:
        """What `rise` follows: a flow's velocity towards noise, or a diffusion's noise; fp32."""
        if self._is_flow:
            return prediction.float() if self.prediction == FLOW else -prediction.float()
        return self._mix(NOISE, k, prediction, sample)

    def rise(self, k: int, sample: Tensor, slope: Tensor) -> Tensor:
        """x_k from x_{k+1}, against the time of denoising: Euler's step in b of a flow, in b / a of a diffusion.

        The second is DDIM's own step (eq. 13 of arXiv 2010.02502), taken upwards.
        """
        if self._is_flow:
            return sample + (self.sigmas[k] - self.sigmas[k + 1]) * slope
        kept = self.signal[k] / self.signal[k + 1]
        return kept * sample + (self.sigmas[k] - kept * self.sigmas[k + 1]) * slope

    def drop(self, k: int, sample: Tensor, slope: Tensor) -> Tensor:
        """x_{k+1} from x_k of a flow, by Euler's step along `slope`, as `rise` upwards."""
        return sample + (self.sigmas[k + 1] - self.sigmas[k]) * slope

    def timestep_at(self, k: int) -> Tensor:
        """The timestep of x_k, for k = T too (where the scheduler has none)."""
        if k < self.num_steps:
            return self.timesteps[k]
        if not self._is_flow:
            return torch.zeros_like(self.timesteps[-1])
        counted = self.sigmas if self.prediction == FLOW else self.signal
        return (counted[k] * self.num_train_timesteps).to(self.timesteps.dtype)

    def _mix(self, which: int, k: int, prediction: Tensor, sample: Tensor) -> Tensor:
        """x0hat or the noise of a prediction at x_k, fp32."""
        of_sample, of_prediction = clean_and_noise(self.prediction, self.signal[k], self.sigmas[k])[which]
        return of_sample * sample.float() + of_prediction * prediction.float()


def _table(scheduler: Scheduler, num_steps: int, settings: Mapping[str, Any], skip: int) -> Tensor | None:
    """The solver's coefficients [T, 3, 3 + J]; None for a scheduler that has to be called itself."""
    fresh = copy.deepcopy(scheduler)
    make_ready(fresh, num_steps, torch.device("cpu"), settings, skip)
    try:
        return solver_table(fresh)
    except InputError:
        return None
