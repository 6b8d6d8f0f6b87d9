"""Everything that follows a step's forwards: guidance, the solver's step, and how much the next step locks.

    s*     = <c, u> / (|u|^2 + 1e-8)          v = s* u + omega (c - s* u)
    x0hat, x_{k+1} = the solver's row k of (x_k, v, history)       background from the source's path, if asked for
    var    = mean over the foreground of the variance of the last W x0hat, or the variance of their W means
    alpha, omega of step k + 1 from clamp(var / tau)

Layout [B, C, T, H, W]; see epilogue_state.py for the state and the table. fp32 inside. Three launches at most, two
without s*; no host reads; fixed order, so the same bits every run: (1) partial sums of s*; (2) s* again in every
program, the update, its entry in the window, partial sums of the variance; (3) the variance, alpha, omega, the trace,
the step's number. A call after the last step does nothing (the reference raises IndexError on the CPU). Bytes moved per
element with bf16 predictions: 8 (two predictions, twice), 12 (latents in, latents and x0hat out), 4 (n - 1) in blocks
that hold foreground, 4 for the source's path. Source: KV-Lock (arXiv 2603.09657).
"""

# To the checker `static_range` is no iterable: only the compiler walks it.
# pyright: reportGeneralTypeIssues=false

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.kernels.epilogue_reference import LEAST_TAU, step_epilogue_reference
from kvlock_fast.kernels.epilogue_state import Schedule, StepState, check_step, new_step_state
from kvlock_fast.kernels.guidance import EPS, guided, launch_projection_partials, projection
from kvlock_fast.kernels.language import require_package_name, tl, triton
from kvlock_fast.kernels.launch import launch, runs_triton
from kvlock_fast.kernels.tiles import SUM_BLOCK, alignment, sum_partials, volumes
from kvlock_fast.kernels.variance import unbiased_variance

require_package_name(__name__)

# Not swept yet: 4 elements a thread, so that fp32 moves in 16 bytes; with 8, ptxas of Triton 3.6 spills.
BLOCK, NUM_WARPS, UNROLL = 1024, 8, 2
# All that a thread can have: left to itself the assembler spills a few for the sake of a fuller processor.
REGISTERS = min(255, (1 << 16) // (32 * NUM_WARPS))


@triton.jit
def _term(row, i, x):
    """Weight i of a table's row times x; 0 where the weight is 0, whatever x holds."""
    w = tl.load(row + i)
    return tl.where(w == 0, 0.0, w * x)


@triton.jit
def _clamp(x, low, high):
    """Clamp like torch.clamp: NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _update_kernel(
    cond, uncond, foreground, source_path, projections, table, omega0, omega, step,  # read; those absent are None
    latents, corrected, window,                                                      # read and written
    s_star, partials, now,                                                           # written; now: the step's number
    steps, B, C, V, R, W, zero_init_steps, programs, eps,                            # sizes; programs of launch 1
    c_b, c_c, u_b, u_c, m_b, x_r,                                                    # strides; x_r: the window's
    HISTORY: tl.constexpr, EVERYWHERE: tl.constexpr, MEAN: tl.constexpr,             # J; the variance's region, kind
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, SUM_BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(V / BLOCK), C, B): a block of one channel. partials [3, B, C * ceil(V / BLOCK)]: sum, count, bad."""
    i_c, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    leads = (tl.program_id(0) == 0) & (i_c == 0)
    k = tl.load(step)
    # Launch 3 counts the step while some of its programs may not have begun: they read the number here.
    tl.store(now, k, mask=leads & (i_b == 0))
    if k >= steps:
        return
    first = tl.program_id(0).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    inside = o < tl.multiple_of(V - first, ALIGN)
    o_x = tl.multiple_of((i_b * C + i_c) * V + first, ALIGN) + o
    x = tl.load(latents + o_x, mask=inside, other=0.0)
    v = tl.load(cond + tl.multiple_of(i_b * c_b + i_c * c_c + first, ALIGN) + o, mask=inside, other=0.0).to(tl.float32)
    s = 1.0
    if uncond is not None:
        u = tl.load(uncond + tl.multiple_of(i_b * u_b + i_c * u_c + first, ALIGN) + o, mask=inside, other=0.0)
        if projections is not None:
            s = projection(projections, i_b, B, programs, eps, SUM_BLOCK)
            s = tl.where((tl.load(omega0 + k) > 1) & (k >= zero_init_steps), s, 1.0)
        v = guided(v, u.to(tl.float32), tl.load(omega + i_b), s)
    tl.store(s_star + i_b, s, mask=leads)
    v = tl.where(k < zero_init_steps, 0.0, v)

    to_x0hat = table + k * (3 * (3 + HISTORY))
    to_next, to_corrected = to_x0hat + (3 + HISTORY), to_x0hat + 2 * (3 + HISTORY)
    x0hat = _term(to_x0hat, 0, x) + _term(to_x0hat, 1, v)
    after = _term(to_next, 0, x) + _term(to_next, 1, v)
    if corrected is not None:
        old = tl.load(corrected + o_x, mask=inside, other=0.0)
        after += _term(to_next, 2, old)
        new = _term(to_corrected, 0, x) + _term(to_corrected, 1, v) + _term(to_corrected, 2, old)
    for j in tl.static_range(1, HISTORY + 1):
        m = tl.load(window + ((k - j + R) % R).to(tl.int64) * x_r + o_x, mask=inside, other=0.0)
        after += _term(to_next, 2 + j, m)
        if corrected is not None:
            new += _term(to_corrected, 2 + j, m)
    if corrected is not None:
        tl.store(corrected + o_x, new, mask=inside)
    counts = inside
    if foreground is not None:
        marked = tl.load(foreground + tl.multiple_of(i_b * m_b + first, ALIGN) + o, mask=inside, other=0).to(tl.int1)
        if source_path is not None:
            o_s = tl.multiple_of(((k + 1).to(tl.int64) * C + i_c) * V + first, ALIGN) + o
            after = tl.where(marked, after, tl.load(source_path + o_s, mask=inside, other=0.0))
        if not EVERYWHERE:
            counts = marked
    tl.store(latents + o_x, after, mask=inside)
    tl.store(window + (k % R).to(tl.int64) * x_r + o_x, x0hat, mask=inside)

    n, count = tl.minimum(k + 1 - zero_init_steps, W), tl.sum(counts.to(tl.int32))
    total = 0.0
    if MEAN:
        total = tl.sum(tl.where(counts, x0hat, 0.0))
    elif (n >= 2) & (count > 0):
        variance = unbiased_variance(x0hat, window + o_x, inside, k, n, R, x_r, UNROLL)
        total = tl.sum(tl.where(counts, variance, 0.0))
    bad = tl.sum((inside & ~(tl.abs(after) < float("inf"))).to(tl.int32))
    blocks = tl.num_programs(0) * C
    at = partials + i_b * blocks + i_c * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, total)
    tl.store(at + B * blocks, count.to(tl.float32))
    tl.store(at + 2 * B * blocks, bad.to(tl.float32))


@triton.jit
def _schedule_kernel(
    partials, now, omega0, tau_at, s_star,                                           # read
    alpha, later_alpha, omega, variance, trace, step, means,                         # written, but for variance read
    steps, B, blocks, W, zero_init_steps, min_predictions, first_dynamic_step, t_b,
    tau, b, warmup_alpha, alpha_floor, alpha_snap, omega_floor, least_tau,
    DYNAMIC_ALPHA: tl.constexpr, DYNAMIC_OMEGA: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B,)."""
    i_b = tl.program_id(0).to(tl.int64)
    k = tl.load(now)
    if k >= steps:
        return
    at = partials + i_b * blocks
    total = sum_partials(at, blocks, SUM_BLOCK)
    elements = sum_partials(at + B * blocks, blocks, SUM_BLOCK)
    bad = sum_partials(at + 2 * B * blocks, blocks, SUM_BLOCK)
    n = tl.minimum(k + 1 - zero_init_steps, W)
    exists, value = n >= 2, total / elements
    if means is not None:
        at = means + k.to(tl.int64) * B + i_b
        tl.store(at, value)
        sums, squares = 0.0, 0.0
        for age in range(1, n):
            d = tl.load(at - age * B) - value
            sums += d
            squares += d * d
        value = (squares - sums * sums / n) / tl.maximum(n - 1, 1)
        value = tl.where(value < 0, 0.0, value)
    value = tl.where(exists, value, float("nan"))
    tl.store(variance + i_b, value)
    row = trace + (k.to(tl.int64) * B + i_b) * 5
    tl.store(row, value)
    tl.store(row + 1, tl.load(alpha + i_b))
    tl.store(row + 2, tl.load(omega + i_b))
    tl.store(row + 3, tl.load(s_star + i_b))
    tl.store(row + 4, (bad > 0).to(tl.float32))

    if tau_at is not None:
        tau = tl.load(tau_at + i_b * t_b)
        tau = tl.where(tau < least_tau, least_tau, tau)
    ratio = value / tau
    decides = n >= min_predictions
    dynamic = (k + 1 >= first_dynamic_step) & decides
    if DYNAMIC_ALPHA:
        lag = 1 if later_alpha is None else 2
        followed = _clamp(ratio, alpha_floor, 1.0)
        followed = tl.where(followed >= alpha_snap, 1.0, followed)
        after = tl.where((k + lag >= first_dynamic_step) & decides, followed, warmup_alpha)
        if later_alpha is not None:
            known = tl.load(later_alpha + i_b)
            tl.store(later_alpha + i_b, after)
            after = known
        tl.store(alpha + i_b, after)
    scale = tl.load(omega0 + tl.minimum(k + 1, steps - 1))
    if DYNAMIC_OMEGA:
        follows = dynamic & (scale > 1)
        scale = tl.where(follows, _clamp(scale * _clamp(ratio, 0.0, b), omega_floor, float("inf")), scale)
    tl.store(omega + i_b, scale)
    tl.store(step, k + 1, mask=i_b == 0)


def launch_step_epilogue(
    state: StepState,
    cond: Tensor,
    uncond: Tensor | None,
    foreground: Tensor,
    schedule: Schedule,
    source_path: Tensor | None = None,
) -> None:
    """Advance `state` by one step. Arguments as `step_epilogue`."""
    (batch, channels), steps = cond.shape[:2], state.table.shape[0]
    c, u = volumes(cond), None if uncond is None else volumes(uncond)
    mask = foreground.view(foreground.shape[0], -1)
    volume, m_b = c.shape[2], 0 if foreground.shape[0] == 1 else mask.stride(0)
    projections = None
    if u is not None and schedule.s_star:
        projections = launch_projection_partials(c, u, mask if schedule.s_star_region == "foreground" else None)
    grid = (triton.cdiv(volume, BLOCK), channels, batch)
    blocks, everywhere = grid[0] * channels, schedule.detection == "global"
    partials = torch.empty((3, batch, blocks), device=cond.device)
    now = torch.empty(1, dtype=torch.int32, device=cond.device)
    strides = (*c.stride()[:2], *((0, 0) if u is None else u.stride()[:2]), m_b, state.window.stride(0))
    counting = (schedule.variance_window, schedule.zero_init_steps)
    launch(
        _update_kernel, grid,
        c, u, mask if source_path is not None or not everywhere else None, source_path, projections,
        state.table, state.omega0, state.omega, state.step, state.latents, state.corrected, state.window,
        state.s_star, partials, now,
        steps, batch, channels, volume, state.window.shape[0], *counting,
        0 if projections is None else projections.shape[2], EPS, *strides,
        HISTORY=state.history, EVERYWHERE=everywhere, MEAN=schedule.reduction == "mean",
        ALIGN=alignment(volume, *strides), BLOCK=BLOCK, SUM_BLOCK=SUM_BLOCK, UNROLL=UNROLL, num_warps=NUM_WARPS,
        maxnreg=REGISTERS,
    )  # fmt: skip
    tau_at, tau = (schedule.tau, 1.0) if isinstance(schedule.tau, Tensor) else (None, schedule.tau)
    launch(
        _schedule_kernel, (batch,),
        partials, now, state.omega0, tau_at, state.s_star,
        state.alpha, state.later_alpha if schedule.alpha is None else None, state.omega, state.variance, state.trace,
        state.step, state.means, steps, batch, blocks, *counting, schedule.min_predictions, schedule.first_dynamic_step,
        0 if tau_at is None or tau_at.numel() == 1 else 1, tau,
        schedule.b, schedule.warmup_alpha, schedule.alpha_floor, schedule.alpha_snap, schedule.omega_floor,
        LEAST_TAU,
        DYNAMIC_ALPHA=schedule.alpha is None, DYNAMIC_OMEGA=schedule.dynamic_omega and u is not None,
        SUM_BLOCK=SUM_BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


STATE, SCHEDULE = ([field.name for field in fields(kind)] for kind in (StepState, Schedule))
STATE_WRITTEN = [name for name in STATE if name not in ("table", "omega0")]
_TYPES = {int: "int", bool: "bool", str: "str", float: "float", float | None: "float?", float | Tensor: "float"}


def _schema() -> str:
    """The operator's arguments: the state's tensors, the step's, tau where it is a tensor, the schedule's numbers."""
    state = []
    for i, field in enumerate(fields(StepState)):
        written = f"(a{i}!)" if field.name in STATE_WRITTEN else ""
        state.append(f"Tensor{written}{'?' if field.default is None else ''} {field.name}")
    step = ["Tensor cond", "Tensor? uncond", "Tensor foreground", "Tensor? source_path", "Tensor? tau_at"]
    schedule = [f"{_TYPES[field.type]} schedule_{field.name}" for field in fields(Schedule)]
    return f"({', '.join((*state, *step, *schedule, 'str backend'))}) -> ()"


@torch.library.custom_op("kvlock_fast::step_epilogue", mutates_args=STATE_WRITTEN, schema=_schema())
def _step_epilogue_op(*arguments: Any) -> None:
    state, rest = StepState(*arguments[: len(STATE)]), arguments[len(STATE) :]
    (cond, uncond, foreground, source_path, tau_at), numbers, backend = rest[:5], rest[5:-1], rest[-1]
    schedule = Schedule(*numbers)
    if tau_at is not None:
        schedule = replace(schedule, tau=tau_at)
    triton = not (backend == "auto" and cond.is_cpu) and runs_triton(backend, state.latents, cond, foreground)
    advance = launch_step_epilogue if triton else step_epilogue_reference
    advance(state, cond, uncond, foreground, schedule, source_path)


_step_epilogue_op.register_fake(lambda *_: None)


def step_epilogue(
    state: StepState,
    cond: Tensor,
    uncond: Tensor | None,
    foreground: Tensor,
    schedule: Schedule,
    source_path: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Advance `state` by one step, in place.

    Args:
        state: the run's state, as `new_step_state` makes it.
        cond, uncond: the model's predictions [B, C, T, H, W] at state.latents, contiguous along T, H, W (samples and
            channels of any stride); uncond None without classifier-free guidance.
        foreground: bool [B or 1, T, H, W], some True in each sample.
        schedule: when to lock and how to guide.
        source_path: fp32 [steps + 1, 1, C, T, H, W], whose entry k + 1 replaces the background after step k; None
            leaves the background as it is.
        backend: "auto", "reference" or "triton".

    Raises ValueError on shapes, dtypes or layouts that do not fit.
    """
    check_step(state, cond, uncond, foreground, schedule, source_path)
    numbers = (getattr(schedule, name) for name in SCHEDULE)
    _step_epilogue_op(
        *(getattr(state, name) for name in STATE), cond, uncond, foreground, source_path,
        schedule.tau if isinstance(schedule.tau, Tensor) else None,
        *(1.0 if isinstance(x, Tensor) else x for x in numbers), backend,
    )  # fmt: skip


def launch_shipped(architecture: int) -> None:
    """A launch of every configuration that ships, for the compiler's report: latents of Wan 480p and CogVideoX.

    A one-step solver, DPM++ 2M and UniPC; with all that can be there, and without.
    """
    wan, cogvideox, on_foreground = (21, 60, 104), (13, 60, 90), Schedule(s_star_region="foreground")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for volume, history, corrects in ((wan, 0, False), (wan, 1, False), (wan, 2, True), (cogvideox, 0, False)):
            cond, uncond = torch.empty(2, 2, 16, *volume, dtype=dtype, device="meta")
            foreground = torch.empty(1, *volume, dtype=torch.bool, device="meta")
            table = torch.zeros(50, 3, 3 + history)
            table[:, 1, 2] = corrects
            lagging = replace(on_foreground, alpha_lag=2)
            launch_step_epilogue(new_step_state(cond, table, 5.0, lagging), cond, uncond, foreground, lagging)
            state = new_step_state(cond, table, 5.0, on_foreground)
            path = torch.empty(51, 1, 16, *volume, device="meta")
            launch_step_epilogue(state, cond, uncond, foreground, on_foreground, path)
            plain = Schedule(tau=state.variance, alpha=1.0, dynamic_omega=False, s_star=False, detection="global")
            launch_step_epilogue(state, cond, None, foreground, plain)
            launch_step_epilogue(state, cond, uncond, foreground, Schedule())
            mean = Schedule(reduction="mean")
            launch_step_epilogue(new_step_state(cond, table, 5.0, mean), cond, uncond, foreground, mean)
