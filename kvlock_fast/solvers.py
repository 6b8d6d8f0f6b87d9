"""The ODE's steps: from noise (k = 0) to the clean latent (k = T), by the scheduler the model ships with.

Flow matching: x = (1 - sigma) x0 + sigma n, the model predicts v = n - x0, so x0hat = x - sigma v.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.errors import InputError
from kvlock_fast.tables import solver_table

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler")


class FlowSolver:
    """A diffusers scheduler of a flow-matching model, stepped by number. Works on a copy: runs do not meet."""

    def __init__(self, scheduler: Any, num_steps: int, device: torch.device):
        """Raises InputError for a scheduler that is not flow matching or adds noise of its own."""
        check_scheduler(scheduler)
        self.scheduler = copy.deepcopy(scheduler)
        self._start = num_steps, device
        self.restart()
        self.timesteps = self.scheduler.timesteps
        self.sigmas = self.scheduler.sigmas.to(device=device, dtype=torch.float32)
        self.table = _table(scheduler, num_steps)
        if len(self.timesteps) != num_steps or len(self.sigmas) != num_steps + 1:
            name = type(scheduler).__name__
            raise InputError(f"scheduler {name} made {len(self.timesteps)} timesteps for {num_steps} steps")

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def num_train_timesteps(self) -> int:
        """What a timestep counts to."""
        return getattr(self.scheduler, "config", {}).get("num_train_timesteps", 1000)

    def restart(self) -> None:
        """Forget the steps taken: the next one is step 0."""
        num_steps, device = self._start
        _ready(self.scheduler, num_steps, device)

    def step(self, k: int, prediction: Tensor, sample: Tensor) -> Tensor:
        """x_{k+1} from the prediction at x_k; called once for each k, in order."""
        return self.scheduler.step(prediction, self.timesteps[k], sample, return_dict=False)[0]

    def add_noise(self, k: int, clean: Tensor, noise: Tensor) -> Tensor:
        """x_k of a clean latent: (1 - sigma_k) clean + sigma_k noise, fp32; k = T is the last sigma's."""
        sigma = self.sigmas[k]
        return (1 - sigma) * clean + sigma * noise

    def predict_clean(self, k: int, prediction: Tensor, sample: Tensor) -> Tensor:
        """x0hat_k = x_k - sigma_k v, fp32."""
        return sample.float() - self.sigmas[k] * prediction.float()

    def timestep_at(self, k: int) -> Tensor:
        """The timestep of sigma_k, for k = T too (where the scheduler has none)."""
        if k < self.num_steps:
            return self.timesteps[k]
        return (self.sigmas[k] * self.num_train_timesteps).to(self.timesteps.dtype)


def _table(scheduler: Any, num_steps: int) -> Tensor | None:
    """The solver's coefficients [T, 3, 3 + J] (tables.py); None for a scheduler that has to be called itself."""
    fresh = copy.deepcopy(scheduler)
    fresh.set_timesteps(num_steps)
    try:
        return solver_table(fresh)
    except InputError:
        return None


def check_scheduler(scheduler: Any) -> None:
    """Raise InputError unless the scheduler integrates a flow-matching ODE from noise to data.

    One that is not known is tried: with the true velocity it has to go down the line from noise to data.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    if config.get("use_dynamic_shifting"):
        raise InputError(f"scheduler {name} with use_dynamic_shifting=True (a shift by resolution) is not supported")
    if config.get("invert_sigmas"):
        raise InputError(f"scheduler {name} with invert_sigmas=True (time runs backwards) is not supported")
    if config.get("stochastic_sampling") or str(config.get("algorithm_type", "")).startswith("sde"):
        raise InputError(f"scheduler {name} adds noise at every step: the source's path would not be the edit's")
    flow = name == "FlowMatchEulerDiscreteScheduler" or (
        config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    )
    if name in FLOW_SCHEDULERS and flow:
        return
    reason = "it is not flow matching" if name in FLOW_SCHEDULERS else _strays(scheduler)
    if reason is not None:
        kind = config.get("prediction_type", "unknown")
        raise InputError(
            f"scheduler {name} (prediction type {kind!r}) is not supported, as {reason}: use flow matching, "
            f"by one of {', '.join(FLOW_SCHEDULERS)}"
        )


def _strays(scheduler: Any, steps: int = 8) -> str | None:
    """Why a scheduler does not follow the flow, tried on four numbers; None if it does."""
    scheduler = copy.deepcopy(scheduler)
    clean, noise = torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.0, 0.25, -0.5, -2.0]]).view(2, 1, 1, 1, 2, 2)
    try:
        _ready(scheduler, steps, torch.device("cpu"))
        timesteps, sigmas = scheduler.timesteps, scheduler.sigmas.float()
        if len(timesteps) != steps or len(sigmas) != steps + 1:
            return f"it makes {len(timesteps)} timesteps and {len(sigmas)} sigmas for {steps} steps"
        if not 0.5 < sigmas[0] <= 1.001:
            return f"its sigmas begin at {sigmas[0]:.3g}, and a flow's at 1"
        x = (1 - sigmas[0]) * clean + sigmas[0] * noise
        for timestep, sigma in zip(timesteps, sigmas[1:], strict=True):
            x = scheduler.step(noise - clean, timestep, x, return_dict=False)[0]
            if not torch.allclose(x.float(), (1 - sigma) * clean + sigma * noise, rtol=1e-3, atol=1e-3):
                return f"with the true velocity it leaves the line from noise to data at sigma {sigma:.3g}"
    except Exception as error:  # whatever a foreign class raises
        return f"its steps cannot be taken ({type(error).__name__}: {error})"
    return None


def _ready(scheduler: Any, num_steps: int, device: torch.device) -> None:
    """Set its timesteps, at the first of them."""
    scheduler.set_timesteps(num_steps, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
