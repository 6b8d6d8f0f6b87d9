"""The schedulers of diffusers that an edit can follow: deterministic ones, of a flow or of a diffusion.

x_k = a_k x0 + b_k n. A flow has a = 1 - sigma, b = sigma and predicts v = n - x0 ("flow_prediction"), or counts sigma
from noise to data, a = sigma, b = 1 - sigma, and predicts x0 - n ("reversed_flow", as Mochi); a diffusion has
a^2 + b^2 = 1 and predicts the noise n ("epsilon"), a n - b x0 ("v_prediction") or x0 itself ("sample"). Where noise
is added to a signal that stays, a = 1 and b = sigma, as Cosmos has it, the model says x0 ("exploding").
"""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.errors import InputError
from kvlock_fast.models.protocols import Scheduler

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
DDIM_SCHEDULERS = ("DDIMScheduler", "CogVideoXDDIMScheduler")
DIFFUSION_SCHEDULERS = (*DDIM_SCHEDULERS, *FLOW_SCHEDULERS[1:])
WITHOUT_NOISE: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType({
    "CogVideoXDPMScheduler": ("CogVideoXDDIMScheduler", {"timestep_spacing": "trailing"}),
    "EulerAncestralDiscreteScheduler": ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}),
})  # fmt: skip
"""For schedulers that models ship and that add noise at every step: one that does not, and what it is told beside
their config.
"""
DIFFUSION_PREDICTIONS = ("epsilon", "v_prediction", "sample")
NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})
FLOW = "flow_prediction"
REVERSED_FLOW = "reversed_flow"
EXPLODING = "exploding"
EDM = "EDMEulerScheduler"


def shift_of(scheduler: Scheduler, tokens: int) -> float:
    """mu: the shift of a schedule by resolution, as several families' pipelines give it to their scheduler.

    It lies on a straight line through two lengths of sequence, by the scheduler's config: diffusers' `calculate_shift`,
    the SD3 paper (arXiv 2403.03206), section 5.3.2.
    """
    config = scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return tokens * slope + (low - slope * few)


def prediction_of(scheduler: Scheduler) -> str:
    """The meaning of the model's output for a scheduler: DIFFUSION_PREDICTIONS, FLOW, REVERSED_FLOW or EXPLODING."""
    config = getattr(scheduler, "config", {})
    if "sigma_data" in config and type(scheduler).__name__ in (EDM, FLOW_SCHEDULERS[0]):
        return EXPLODING  # the second as Cosmos 2's pipelines configure it
    diffusion = type(scheduler).__name__ in DIFFUSION_SCHEDULERS and not config.get("use_flow_sigmas")
    if diffusion:
        return config.get("prediction_type", "unknown")
    return REVERSED_FLOW if config.get("invert_sigmas") else FLOW


def check_scheduler(scheduler: Scheduler, flow: bool | str | None = None, shifts: bool = False) -> None:
    """Raise InputError unless the scheduler integrates an ODE from noise to data, without noise of its own.

    flow: whether the model predicts a flow's velocity, "reversed" where its sigmas count from noise to data,
    "exploding" where the signal stays; None: whatever the scheduler says; shifts: whether it is given a shift by
    resolution. One that is not known is tried: with the true velocity it has to go down the line from noise to data.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    if config.get("use_dynamic_shifting") and not shifts:
        raise InputError(f"scheduler {name} with use_dynamic_shifting=True (a shift by resolution) is not supported")
    inverted = bool(config.get("invert_sigmas"))
    if flow is not None and inverted != (flow == "reversed"):
        against = "from noise to data" if flow == "reversed" else "from data to noise"
        raise InputError(f"scheduler {name} with invert_sigmas={inverted} is not supported: the model counts {against}")
    if name in WITHOUT_NOISE and flow is not True:
        other, changes = WITHOUT_NOISE[name]
        told = ", ".join(["pipe.scheduler.config", *(f"{key}={value!r}" for key, value in changes.items())])
        raise InputError(
            f"scheduler {name} adds noise at every step, so that the source's path would not be the edit's: set "
            f"pipe.scheduler = {other}.from_config({told})"
        )
    if config.get("stochastic_sampling") or str(config.get("algorithm_type", "")).startswith("sde"):
        raise InputError(f"scheduler {name} adds noise at every step: the source's path would not be the edit's")
    kind = prediction_of(scheduler)
    if EXPLODING in (kind, flow):
        if kind != flow and flow is not None:
            raise InputError(f"scheduler {name} is not supported: its noise is not what the model was trained on")
        return
    if kind in DIFFUSION_PREDICTIONS:
        if flow:
            _refuse(name, kind, "the model predicts a flow's velocity", FLOW_SCHEDULERS)
        return
    reason = _no_flow(scheduler)
    if reason is None and flow is False:
        reason = "the model was not trained on a flow"
    if reason is not None:
        known = DIFFUSION_SCHEDULERS if flow is False else FLOW_SCHEDULERS
        _refuse(name, config.get("prediction_type", "unknown"), reason, known)


def _refuse(name: str, kind: str, reason: str, known: tuple[str, ...]) -> None:
    kinds = "flow matching" if known is FLOW_SCHEDULERS else " or ".join(DIFFUSION_PREDICTIONS)
    raise InputError(
        f"scheduler {name} (prediction type {kind!r}) is not supported, as {reason}: use {kinds}, "
        f"by one of {', '.join(known)}"
    )


def _no_flow(scheduler: Scheduler) -> str | None:
    """Why a scheduler that is not one of a diffusion does not follow a flow; None if it does."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    if name == "FlowMatchEulerDiscreteScheduler":
        return None
    if name in DIFFUSION_SCHEDULERS:
        flow = config.get("use_flow_sigmas") and config.get("prediction_type") == FLOW
        return None if flow else "it is not flow matching"
    return _strays(scheduler)


def _strays(scheduler: Scheduler, steps: int = 8) -> str | None:
    """Why a scheduler does not follow the flow, tried on four numbers; None if it does."""
    scheduler = copy.deepcopy(scheduler)
    clean, noise = torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.0, 0.25, -0.5, -2.0]]).view(2, 1, 1, 1, 2, 2)
    try:
        make_ready(scheduler, steps, torch.device("cpu"))
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


def make_ready(
    scheduler: Scheduler, num_steps: int, device: torch.device, settings: Mapping[str, Any] = NO_SETTINGS, skip: int = 0
) -> None:
    """Set its timesteps, at the first of them; settings: more for `set_timesteps`, such as sigmas, which then count.

    skip: leaves out so many of the first; the scheduler has no history at the one it begins with.
    """
    steps = () if "sigmas" in settings or "timesteps" in settings else (num_steps,)
    scheduler.set_timesteps(*steps, device=device, **settings)
    config = getattr(scheduler, "config", {})
    if type(scheduler).__name__ == FLOW_SCHEDULERS[0] and config.get("final_sigmas_type") == "sigma_min":
        scheduler.sigmas[-1] = scheduler.sigmas[-2]  # as Cosmos 2's pipelines do
    if skip:
        scheduler.timesteps = scheduler.timesteps[skip:]
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = scheduler.sigmas[skip:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def noise_levels(scheduler: Scheduler) -> tuple[Tensor, Tensor]:
    """a and b [T + 1] fp32 of a scheduler whose timesteps are set: of each step, and of where the last one ends."""
    kind = prediction_of(scheduler)
    if kind in (FLOW, REVERSED_FLOW):
        sigmas = scheduler.sigmas.float()
        return (1 - sigmas, sigmas) if kind == FLOW else (sigmas, 1 - sigmas)
    if kind == EXPLODING:
        sigmas = scheduler.sigmas.float()
        return torch.ones_like(sigmas), sigmas
    if type(scheduler).__name__ in DDIM_SCHEDULERS:
        here, after = ddim_levels(scheduler)
        kept = torch.cat([here, after[-1:]])
        return kept.sqrt().float(), (1 - kept).sqrt().float()
    ratio = scheduler.sigmas.double()  # b / a
    signal = (1 + ratio.square()).rsqrt()
    return signal.float(), (ratio * signal).float()


def ddim_levels(scheduler: Scheduler) -> tuple[Tensor, Tensor]:
    """a^2 [T] fp64 on the CPU, at each step of a DDIM scheduler and after it."""
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    timesteps, kept = scheduler.timesteps.cpu(), scheduler.alphas_cumprod.double().cpu()
    before = timesteps - stride
    return kept[timesteps], torch.where(before >= 0, kept[before], scheduler.final_alpha_cumprod.double().cpu())
