"""Calibrated guidance: the projection s* and the guided prediction.

    s* = <c, u> / (|u|^2 + eps)         per sample, over all elements
    out = s* u + omega (c - s* u)       omega, s* per sample

`c` and `u` are the conditional and unconditional predictions [B, ...] (whatever the model predicts), samples of any
stride, each contiguous in itself. fp32 inside. The projection takes two launches: partial sums by at most MOST_PROGRAMS
programs a sample, then their sum, in a fixed order. Bytes moved: 2 reads; the guided prediction: 2 reads, 1 write.
Source: KV-Lock (arXiv 2603.09657); the same closed form as CFG-Zero* (arXiv 2503.18886).
"""

import math

import torch
from torch import Tensor

from kvlock_fast.kernels.epilogue_reference import EPS, cfg_projection_reference, guided_prediction_reference
from kvlock_fast.kernels.language import require_package_name, tl, triton
from kvlock_fast.kernels.launch import launch, runs_triton
from kvlock_fast.kernels.tiles import SUM_BLOCK, alignment, dense, narrow, samples, sum_partials

require_package_name(__name__)

# Not swept yet: 16 elements of each tensor a thread; 512 programs give every SM of an H200 about 4.
BLOCK, NUM_WARPS, MOST_PROGRAMS = 2048, 4, 512


@triton.jit
def _projection_partials_kernel(
    cond, uncond, foreground, partials,
    B, C, V,                                                    # samples; channels; elements a channel
    c_b, c_c, u_b, u_c, m_b,                                    # strides
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (P, B): program p adds up blocks p, p + P, ... of its sample's channels. partials [2, B, P]."""
    i_p, i_b, programs = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    per_channel = tl.cdiv(V, BLOCK)
    o = tl.arange(0, BLOCK)
    dot, square = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(i_p, C * per_channel, programs):
        i_c, first = (i // per_channel).to(tl.int64), (i % per_channel).to(tl.int64) * BLOCK
        inside = o < tl.multiple_of(V - first, ALIGN)
        c = tl.load(cond + tl.multiple_of(i_b * c_b + i_c * c_c + first, ALIGN) + o, mask=inside, other=0.0)
        u = tl.load(uncond + tl.multiple_of(i_b * u_b + i_c * u_c + first, ALIGN) + o, mask=inside, other=0.0)
        c, u = c.to(tl.float32), u.to(tl.float32)
        if foreground is not None:
            counts = tl.load(foreground + tl.multiple_of(i_b * m_b + first, ALIGN) + o, mask=inside, other=0)
            c, u = tl.where(counts, c, 0.0), tl.where(counts, u, 0.0)
        dot += c * u
        square += u * u
    tl.store(partials + i_b * programs + i_p, tl.sum(dot))
    tl.store(partials + (B + i_b) * programs + i_p, tl.sum(square))


@triton.jit
def projection(partials, i_b, B, count, eps, SUM_BLOCK: tl.constexpr):
    """s* of sample i_b from `partials` [2, B, count]."""
    dot = sum_partials(partials + i_b * count, count, SUM_BLOCK)
    return dot / (sum_partials(partials + (B + i_b) * count, count, SUM_BLOCK) + eps)


@triton.jit
def _projection_kernel(partials, s_star, B, count, eps, SUM_BLOCK: tl.constexpr):
    """Grid (B,)."""
    i_b = tl.program_id(0).to(tl.int64)
    tl.store(s_star + i_b, projection(partials, i_b, B, count, eps, SUM_BLOCK))


@triton.jit
def guided(c, u, omega, s_star):
    """s* u + omega (c - s* u)."""
    base = s_star * u
    return base + omega * (c - base)


@triton.jit
def _guided_kernel(cond, uncond, omega, s_star, out, N, c_b, u_b, BLOCK: tl.constexpr):
    """Grid (ceil(N / BLOCK), B); cond, uncond [B, N], out contiguous."""
    i_b, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    inside = o < N - first
    c = tl.load(cond + i_b * c_b + first + o, mask=inside).to(tl.float32)
    u = tl.load(uncond + i_b * u_b + first + o, mask=inside).to(tl.float32)
    value = guided(c, u, tl.load(omega + i_b), tl.load(s_star + i_b))
    tl.store(out + i_b * N + first + o, narrow(value, out.dtype.element_ty), mask=inside)


def launch_projection_partials(cond: Tensor, uncond: Tensor, foreground: Tensor | None = None) -> Tensor:
    """[2, B, P] fp32, whose sums over P are <c, u> and |u|^2 over all elements, or the foreground's.

    cond, uncond: [B, C, V] with V contiguous; foreground: [B or 1, V] bool, contiguous.
    """
    batch, channels, volume = cond.shape
    blocks = channels * triton.cdiv(volume, BLOCK)
    partials = torch.empty((2, batch, max(1, min(blocks, MOST_PROGRAMS))), device=cond.device)
    m_b = 0 if foreground is None or foreground.shape[0] == 1 else foreground.stride(0)
    strides = (*cond.stride()[:2], *uncond.stride()[:2], m_b)
    launch(
        _projection_partials_kernel, (partials.shape[2], batch),
        cond, uncond, foreground, partials, batch, channels, volume, *strides,
        ALIGN=alignment(volume, *strides), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return partials


def launch_cfg_projection(cond: Tensor, uncond: Tensor, eps: float = EPS) -> Tensor:
    """s* [B] fp32 of cond, uncond [B, ...], every sample contiguous."""
    partials = launch_projection_partials(samples(cond), samples(uncond))
    _, batch, count = partials.shape
    s_star = torch.empty(batch, device=cond.device)
    launch(_projection_kernel, (batch,), partials, s_star, batch, count, eps, SUM_BLOCK=SUM_BLOCK, num_warps=NUM_WARPS)
    return s_star


def launch_guided_prediction(cond: Tensor, uncond: Tensor, omega: Tensor, s_star: Tensor) -> Tensor:
    """The guided prediction in cond's dtype; cond, uncond [B, ...], every sample contiguous; omega, s_star [B] fp32."""
    out = torch.empty_like(cond, memory_format=torch.contiguous_format)
    c, u = samples(cond), samples(uncond)
    batch, _, elements = c.shape
    launch(
        _guided_kernel, (triton.cdiv(elements, BLOCK), batch),
        c, u, omega, s_star, out, elements, c.stride(0), u.stride(0), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


@torch.library.custom_op("kvlock_fast::cfg_projection", mutates_args=())
def _projection_op(cond: Tensor, uncond: Tensor, eps: float, backend: str) -> Tensor:
    if runs_triton(backend, cond, uncond):
        return launch_cfg_projection(dense(cond, 1), dense(uncond, 1), eps)
    return cfg_projection_reference(cond, uncond, eps)


_projection_op.register_fake(lambda cond, *_: cond.new_empty(cond.shape[0], dtype=torch.float32))


@torch.library.custom_op("kvlock_fast::guided_prediction", mutates_args=())
def _guided_op(cond: Tensor, uncond: Tensor, omega: Tensor, s_star: Tensor, backend: str) -> Tensor:
    if runs_triton(backend, cond, uncond, omega, s_star):
        scales = (x.to(torch.float32).contiguous() for x in (omega, s_star))
        return launch_guided_prediction(dense(cond, 1), dense(uncond, 1), *scales)
    return guided_prediction_reference(cond, uncond, omega, s_star).to(cond.dtype).contiguous()


_guided_op.register_fake(lambda cond, *_: torch.empty_like(cond, memory_format=torch.contiguous_format))


def _check(cond: Tensor, uncond: Tensor) -> None:
    if cond.ndim < 2 or cond.shape != uncond.shape:
        raise ValueError(f"cond and uncond must share a shape [B, ...], got {tuple(cond.shape)}, {tuple(uncond.shape)}")
    if not (cond.is_floating_point() and uncond.is_floating_point()) or cond.dtype != uncond.dtype:
        raise ValueError(f"cond and uncond must share a floating-point dtype, got {cond.dtype} and {uncond.dtype}")


def cfg_projection(cond: Tensor, uncond: Tensor, eps: float = EPS, *, backend: str = "auto") -> Tensor:
    """Project the conditional prediction on the unconditional: s* = <cond, uncond> / (|uncond|^2 + eps) per sample.

    Args:
        cond, uncond: conditional and unconditional prediction [B, ...], of one floating-point dtype.
        eps: what keeps the quotient finite, at least 0.
        backend: "auto", "reference" or "triton". Triton first copies a tensor whose samples are not contiguous.

    Returns: s* [B] fp32.
    Raises ValueError on shapes or dtypes that do not fit.
    """
    _check(cond, uncond)
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    return _projection_op(cond, uncond, float(eps), backend)


def per_sample(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """`value` as an fp32 tensor [B] on like's device. Raises ValueError unless it is a finite number or [B]."""
    if not isinstance(value, Tensor):
        if not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number or a tensor, got {value!r}")
        return torch.full((like.shape[0],), float(value), device=like.device, dtype=torch.float32)
    if value.shape != (like.shape[0],):
        raise ValueError(f"{name} must be a number or [{like.shape[0]}], got {tuple(value.shape)}")
    return value.to(device=like.device, dtype=torch.float32).contiguous()


def guided_prediction(
    cond: Tensor, uncond: Tensor, omega: float | Tensor, s_star: float | Tensor, *, backend: str = "auto"
) -> Tensor:
    """Guide a prediction: s* uncond + omega (cond - s* uncond).

    Args:
        cond, uncond: conditional and unconditional prediction [B, ...], of one floating-point dtype.
        omega, s_star: guidance scale, and the projection as `cfg_projection` gives it; numbers or [B].
        backend: "auto", "reference" or "triton". Triton first copies a tensor whose samples are not contiguous.

    Returns: the guided prediction [B, ...] in cond's dtype.
    Raises ValueError on shapes or dtypes that do not fit.
    """
    _check(cond, uncond)
    scales = per_sample("omega", omega, cond), per_sample("s_star", s_star, cond)
    return _guided_op(cond, uncond, *scales, backend)


def launch_shipped(architecture: int) -> None:
    """A launch of every configuration that ships, for the compiler's report: latents of Wan 480p, 81 frames."""
    scale = torch.empty(2, device="meta")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        cond, uncond = torch.empty(2, 2, 16, 21, 60, 104, dtype=dtype, device="meta")
        launch_cfg_projection(cond, uncond)
        launch_guided_prediction(cond, uncond, scale, scale)
