"""A run's state on the device from step to step, and the numbers that decide how much it locks.

A solver is a table [steps, 3, 3 + J], as every deterministic step is linear in what it is given. Entry k weighs

    (x, v, corrected, m_1, ..., m_J)        latents, prediction, corrected latents, the J last predicted clean latents

for three results: the predicted clean latents x0hat (of x and v alone), the next latents, and the next corrected
latents (UniPC's corrector; of all of them as they were before the step). A weight of 0 means "not read".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlock_fast.kernels.language import require_package_name

require_package_name(__name__)

TRACE_COLUMNS = ("variance", "alpha", "omega", "s_star", "non_finite")
WORDS = {
    "s_star_region": ("all", "foreground"),
    "detection": ("foreground", "global"),
    "reduction": ("elements", "mean"),
}


@dataclass(frozen=True)
class StepState:
    """The device's memory of a run of B samples; everything contiguous, and fp32 but for `step`.

    latents: x_k [B, C, T, H, W]. window: [R, B, C, T, H, W], x0hat of step k in entry k % R. step: k, int32 [1]. alpha,
    omega: [B], of step k. later_alpha: [B], of step k + 1, where alpha lags by two steps. s_star, variance: [B], of the
    step before. trace: [steps, B, 5], TRACE_COLUMNS of each step: alpha, omega and s* as used in it, the variance after
    it, whether its latents hold NaN or inf. table: the solver. omega0: [steps], the guidance scale asked for; at most 1
    means that guidance is not the lock's business. corrected: as latents, where the solver has a corrector. means:
    [steps, B], x0hat of each step averaged over the foreground, where the schedule's reduction is "mean".
    """

    latents: Tensor
    window: Tensor
    step: Tensor
    alpha: Tensor
    omega: Tensor
    s_star: Tensor
    variance: Tensor
    trace: Tensor
    table: Tensor
    omega0: Tensor
    corrected: Tensor | None = None
    later_alpha: Tensor | None = None
    means: Tensor | None = None

    @property
    def history(self) -> int:
        """J, how many past x0hat the solver reads."""
        return self.table.shape[2] - 3


@dataclass(frozen=True)
class Schedule:
    """Numbers that decide when to lock and how to guide.

    variance_window: W, predictions the variance looks back on. alpha: a fixed number, or None for the variance's.
    dynamic_omega: whether omega follows the variance. tau: a number, or fp32 [1 or B] (the source's own variance, then
    at least 1e-12). b: the largest factor on omega0. first_dynamic_step: where the variance begins to decide; before
    it, and until min_predictions (2 to W) exist, alpha = warmup_alpha and omega = omega0. alpha_floor, omega_floor:
    their least values from then on. alpha_snap: from here on alpha counts as 1. alpha_lag: 1, or 2 to have alpha
    follow the variance of the step before the last, so that it is known a step ahead. s_star: whether guidance is
    calibrated by s*. s_star_region ("all", "foreground") and detection ("foreground", "global"): the elements that
    s* and the variance are taken over. zero_init_steps: first steps whose prediction is taken as 0 and does not
    count. reduction: "elements" averages the variances of the elements, "mean" takes the variance of their average.
    """

    variance_window: int = 10
    alpha: float | None = None
    dynamic_omega: bool = True
    tau: float | Tensor = 0.01
    b: float = 2.0
    first_dynamic_step: int = 0
    warmup_alpha: float = 1.0
    alpha_floor: float = 0.0
    omega_floor: float = 0.0
    s_star: bool = True
    s_star_region: str = "all"
    detection: str = "foreground"
    zero_init_steps: int = 0
    alpha_snap: float = 1.0
    alpha_lag: int = 1
    reduction: str = "elements"
    min_predictions: int = 2

    def __post_init__(self):
        if self.variance_window < 2:
            raise ValueError(f"variance_window must be at least 2, got {self.variance_window}")
        if not 2 <= self.min_predictions <= self.variance_window:
            bound = f"from 2 to variance_window {self.variance_window}"
            raise ValueError(f"min_predictions must be {bound}, got {self.min_predictions}")
        if self.alpha_lag not in (1, 2):
            raise ValueError(f"alpha_lag must be 1 or 2, got {self.alpha_lag}")
        for name, allowed in WORDS.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


def new_step_state(latents: Tensor, table: Tensor, omega0: float | Sequence[float], schedule: Schedule) -> StepState:
    """The state before step 0, on the latents' device.

    latents: [B, C, T, H, W], copied. table: [steps, 3, 3 + J] on the CPU (kvlock_fast.tables). omega0: one for all
    steps, or one for each.
    """
    batch, (steps, _, inputs) = latents.shape[0], table.shape
    scales = list(omega0) if isinstance(omega0, Sequence) else [omega0] * steps
    if len(scales) != steps:
        raise ValueError(f"omega0 must be a number or {steps} of them, got {len(scales)}")
    device = latents.device
    latents = latents.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    entries = max(2, min(schedule.variance_window, steps), inputs - 2)
    ones, nan = torch.ones(batch, dtype=torch.float32, device=device), float("nan")
    alpha = ones * (schedule.warmup_alpha if schedule.alpha is None else schedule.alpha)
    return StepState(
        latents=latents,
        window=torch.empty((entries, *latents.shape), dtype=torch.float32, device=device),
        step=torch.zeros(1, dtype=torch.int32, device=device),
        alpha=alpha,
        omega=ones * scales[0],
        s_star=ones.clone(),
        variance=ones * nan,
        trace=torch.full((steps, batch, len(TRACE_COLUMNS)), nan, dtype=torch.float32, device=device),
        table=table.to(device, torch.float32).contiguous(),
        omega0=torch.tensor(scales, dtype=torch.float32, device=device),
        corrected=torch.empty_like(latents) if table[:, 1, 2].any() else None,
        later_alpha=alpha.clone() if schedule.alpha_lag == 2 else None,
        means=torch.full((steps, batch), nan, device=device) if schedule.reduction == "mean" else None,
    )


def check_step(
    state: StepState,
    cond: Tensor,
    uncond: Tensor | None,
    foreground: Tensor,
    schedule: Schedule,
    source_path: Tensor | None,
) -> None:
    """Raise ValueError, saying what was given, unless everything fits together."""
    _check_state(state, schedule)
    _check_devices(state.latents.device, cond=cond, uncond=uncond, foreground=foreground, source_path=source_path)
    shape = tuple(state.latents.shape)
    for name, x in (("cond", cond), ("uncond", uncond)):
        if x is None:
            continue
        if tuple(x.shape) != shape or not x.is_floating_point() or x.dtype != cond.dtype:
            raise ValueError(f"{name} must be floating-point {shape}, both alike, got {x.dtype} {tuple(x.shape)}")
        if not x[:1, :1].is_contiguous():
            raise ValueError(f"{name} must be contiguous along T, H, W, got strides {x.stride()} of {shape}")
    volume = shape[2:]
    if foreground.dtype != torch.bool or foreground.ndim != 4 or foreground.shape[0] not in (1, shape[0]):
        raise ValueError(f"foreground must be bool [{shape[0]} or 1, {volume}], got {foreground.dtype}")
    if tuple(foreground.shape[1:]) != volume or not foreground.is_contiguous():
        raise ValueError(f"foreground must be contiguous [{shape[0]} or 1, {volume}], got {tuple(foreground.shape)}")
    if source_path is not None:
        _check_tensor("source_path", source_path, (state.table.shape[0] + 1, 1, *shape[1:]))
    if isinstance(schedule.tau, Tensor):
        _check_tensor("tau", schedule.tau, (schedule.tau.numel(),))
        if schedule.tau.numel() not in (1, shape[0]):
            raise ValueError(f"tau must be [1] or [{shape[0]}], got {tuple(schedule.tau.shape)}")


def _check_state(state: StepState, schedule: Schedule) -> None:
    if state.latents.ndim != 5 or state.table.ndim != 3:
        got = f"{tuple(state.latents.shape)} and {tuple(state.table.shape)}"
        raise ValueError(f"latents must be [B, C, T, H, W] and the table [steps, 3, 3 + J], got {got}")
    shape, steps, entries = tuple(state.latents.shape), state.table.shape[0], state.window.shape[0]
    sizes = {
        "latents corrected": shape,
        "window": (entries, *shape),
        "alpha omega s_star variance later_alpha": shape[:1],
        "trace": (steps, shape[0], len(TRACE_COLUMNS)),
        "means": (steps, shape[0]),
        "table": (steps, 3, max(3, state.table.shape[2])),
        "omega0": (steps,),
    }
    if (state.later_alpha is None) != (schedule.alpha_lag == 1):
        raise ValueError(f"the state was made for another alpha_lag than {schedule.alpha_lag}")
    if (state.means is None) != (schedule.reduction == "elements"):
        raise ValueError(f"the state was made for another reduction than {schedule.reduction!r}")
    for name, size in ((name, size) for names, size in sizes.items() for name in names.split()):
        if getattr(state, name) is not None:
            _check_tensor(name, getattr(state, name), size)
    _check_tensor("step", state.step, (1,), torch.int32)
    needed = max(2, min(schedule.variance_window, steps), state.history + 1)
    if entries < needed:
        raise ValueError(f"window must hold at least {needed} predictions, got {entries}")


def _check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise ValueError(f"{name} must be on {device} as the latents are, got {x.device}")


def _check_tensor(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype or not x.is_contiguous():
        layout = "" if x.is_contiguous() else ", not contiguous"
        raise ValueError(f"{name} must be contiguous {dtype} {shape}, got {x.dtype} {tuple(x.shape)}{layout}")
