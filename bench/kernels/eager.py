"""The peers written in plain torch: what an eager pipeline does where this project has a kernel.

Norms and rotations as diffusers has them, the lock as lines of torch on tokens that lie foreground first. Each can be
given to torch.compile as it is.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlock_fast.kernels.epilogue_state import Schedule, StepState
from kvlock_fast.kernels.prologue import QKNorm, RoPE

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def normalise(x: Tensor, heads: int, kind: str, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x [B, S, H*D] normalised, as [B, S, H, D]."""
    if kind == "rms_across_heads":
        return F.rms_norm(x, (x.shape[2],), weight, eps).unflatten(2, (heads, -1))
    x = x.unflatten(2, (heads, -1))
    if kind == "layer":
        return F.layer_norm(x, x.shape[3:], weight, bias, eps)
    return F.rms_norm(x, x.shape[3:], weight, eps) if kind == "rms" else x


def rotate(x: Tensor, rope: RoPE | None) -> Tensor:
    """As diffusers' apply_rotary_emb for Wan."""
    if rope is None:
        return x
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * rope.cos - x2 * rope.sin
    out[..., 1::2] = x1 * rope.sin + x2 * rope.cos
    return out.type_as(x)


def prologue(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    norm: QKNorm,
    rope: RoPE | None,
    foreground: int,
    k_source: Tensor | None = None,
    v_source: Tensor | None = None,
    alpha: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, S, H, D] for the attention; the background blended with the source's K/V [1, S - F, H, D].

    v is blended in place, as nobody else needs a projection's output.
    """
    q = rotate(normalise(q, heads, norm.kind, norm.q_weight, norm.q_bias, norm.eps), rope)
    k = rotate(normalise(k, heads, norm.kind, norm.k_weight, norm.k_bias, norm.eps), rope)
    v = v.unflatten(2, (heads, -1))
    if k_source is not None:
        w = alpha.to(k.dtype)[:, None, None, None]
        k[:, foreground:].lerp_(k_source.expand_as(k[:, foreground:]), w)
        v[:, foreground:].lerp_(v_source.expand_as(v[:, foreground:]), w)
    return q, k, v


def blend_kv(
    k: Tensor, v: Tensor, k_ref: Tensor, v_ref: Tensor, foreground: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """K', V' of tokens in any order under a mask [1, S]."""
    w = torch.where(foreground, 0.0, alpha[:, None]).to(k.dtype)[:, :, None, None]
    return torch.lerp(k, k_ref.expand_as(k), w), torch.lerp(v, v_ref.expand_as(v), w)


def step_epilogue(
    state: StepState,
    cond: Tensor,
    uncond: Tensor,
    foreground: Tensor,
    schedule: Schedule,
    source: Tensor,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the loop after its forwards, as a pipeline in torch does it: latents, and the next alpha and omega.

    k: the step's number, which a loop on the host knows. source: the source path's latents after this step.
    """
    c, u = cond.float(), uncond.float()
    s_star = (c * u).flatten(1).sum(1) / (u.square().flatten(1).sum(1) + 1e-8)
    base = s_star.view(-1, 1, 1, 1, 1) * u
    prediction = base + state.omega.view(-1, 1, 1, 1, 1) * (c - base)
    row = state.table[k]
    x0hat = row[0, 0] * state.latents + row[0, 1] * prediction
    latents = row[1, 0] * state.latents + row[1, 1] * prediction
    inside = foreground[:, None]
    latents = torch.where(inside, latents, source)
    state.window[k % state.window.shape[0]] = x0hat
    history = state.window[: min(k + 1, state.window.shape[0])]
    per_element = torch.where(inside, history.var(dim=0), 0.0)
    variance = per_element.flatten(1).sum(1) / inside.expand_as(latents).flatten(1).sum(1)
    ratio = variance / schedule.tau
    alpha = ratio.clamp(schedule.alpha_floor, 1.0)
    omega = (state.omega0[k] * ratio.clamp(0.0, schedule.b)).clamp_min(schedule.omega_floor)
    return latents, alpha, omega
