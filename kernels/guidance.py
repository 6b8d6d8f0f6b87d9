"""Calibrated guidance: the projection s* and the guided prediction.

    s* = <c, u> / (|u|^2 + eps)         per sample, over all elements
    out = s* u + omega (c - s* u)       omega, s* per sample

`c` and `u` are the conditional and unconditional predictions [B, ...] (whatever the model predicts). fp32 inside.
Source: KV-Lock (arXiv 2603.09657); the same closed form as CFG-Zero* (arXiv 2503.18886).
"""

import torch
from torch import Tensor

from kvlock_fast.kernels.guard import require_package_name

require_package_name(__name__)


def cfg_projection_reference(cond: Tensor, uncond: Tensor, eps: float = 1e-8) -> Tensor:
    """s* as [B] fp32 of cond, uncond [B, ...]."""
    wide = torch.promote_types(cond.dtype, torch.float32)
    c, u = cond.flatten(1).to(wide), uncond.flatten(1).to(wide)
    return ((c * u).sum(1) / (u.square().sum(1) + eps)).float()


def guided_prediction_reference(cond: Tensor, uncond: Tensor, omega: Tensor, s_star: Tensor) -> Tensor:
    """The guided prediction of cond, uncond [B, ...] by omega, s_star [B]; fp32 (fp64 stays fp64)."""
    wide = torch.promote_types(cond.dtype, torch.float32)
    per_sample = (-1,) + (1,) * (cond.ndim - 1)
    base = s_star.to(wide).reshape(per_sample) * uncond.to(wide)
    return base + omega.to(wide).reshape(per_sample) * (cond.to(wide) - base)


@torch.library.custom_op("kvlock_fast::cfg_projection", mutates_args=())
def _projection_op(cond: Tensor, uncond: Tensor, eps: float) -> Tensor:
    return cfg_projection_reference(cond, uncond, eps)


@_projection_op.register_fake
def _(cond, uncond, eps):
    return cond.new_empty(cond.shape[0], dtype=torch.float32)


@torch.library.custom_op("kvlock_fast::guided_prediction", mutates_args=())
def _guided_op(cond: Tensor, uncond: Tensor, omega: Tensor, s_star: Tensor) -> Tensor:
    return guided_prediction_reference(cond, uncond, omega, s_star).to(cond.dtype).contiguous()


@_guided_op.register_fake
def _(cond, uncond, omega, s_star):
    return torch.empty_like(cond, memory_format=torch.contiguous_format)


def _check(cond: Tensor, uncond: Tensor) -> None:
    if cond.ndim < 2 or cond.shape != uncond.shape:
        raise ValueError(f"cond and uncond must share a shape [B, ...], got {tuple(cond.shape)}, {tuple(uncond.shape)}")
    if not (cond.is_floating_point() and uncond.is_floating_point()) or cond.dtype != uncond.dtype:
        raise ValueError(f"cond and uncond must share a floating-point dtype, got {cond.dtype} and {uncond.dtype}")


def launch_cfg_projection(cond: Tensor, uncond: Tensor, eps: float = 1e-8) -> Tensor:
    """s* [B] fp32. Raises ValueError on shapes or dtypes that do not fit."""
    _check(cond, uncond)
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    return _projection_op(cond, uncond, float(eps))


def launch_guided_prediction(cond: Tensor, uncond: Tensor, omega: Tensor, s_star: Tensor) -> Tensor:
    """The guided prediction in cond's dtype; omega, s_star [B]. Raises ValueError on shapes that do not fit."""
    _check(cond, uncond)
    for name, value in (("omega", omega), ("s_star", s_star)):
        if value.shape != (cond.shape[0],):
            raise ValueError(f"{name} must be a number or [{cond.shape[0]}], got {tuple(value.shape)}")
    return _guided_op(cond, uncond, omega, s_star)
