"""The tensor backend: the operations of KV-Lock, for any denoising loop.

Every function takes `backend="auto" | "reference" | "triton"`. "reference" is plain torch with fp32 inside: the
specification and the CPU implementation. "auto" takes the fastest implementation there is for the tensor's device.
Wrong shapes, dtypes or names raise ValueError saying what was given. All but `token_mask` are custom operators
(`torch.ops.kvlock_fast.*`), opaque to torch.compile. No gradients: editing is inference.

By themselves: token_mask, locked_attention, cfg_projection, guided_prediction, windowed_variance, quantize_kv. For the
fast path of a loop of one's own: `prologue` (norm, RoPE and blend in one pass) in front of `attention` or
`attention_fp8`, and `step_epilogue` (all that follows a step's forwards). "triton" also takes CPU tensors while
Triton's interpreter is on (TRITON_INTERPRET=1 before the first import), so that anyone can check a kernel.
"""

import math

import torch
from torch import Tensor

from kvlock_fast.kernels import guidance, quantize, variance
from kvlock_fast.kernels import locked_attention as locked
from kvlock_fast.kernels.attention import attention
from kvlock_fast.kernels.attention_fp8 import attention_fp8
from kvlock_fast.kernels.epilogue import step_epilogue
from kvlock_fast.kernels.epilogue_state import Schedule, StepState, new_step_state
from kvlock_fast.kernels.launch import BACKENDS
from kvlock_fast.kernels.prologue import Capture, Lock, Places, PrologueOutput, QKNorm, RoPE, prologue
from kvlock_fast.kernels.quantize import QuantizedKV
from kvlock_fast.masks import Geometry, project_mask
from kvlock_fast.renamed import renamed

__all__ = [
    "Capture",
    "Lock",
    "Places",
    "PrologueOutput",
    "QKNorm",
    "QuantizedKV",
    "RoPE",
    "Schedule",
    "StepState",
    "attention",
    "attention_fp8",
    "cfg_projection",
    "guided_prediction",
    "locked_attention",
    "new_step_state",
    "prologue",
    "quantize_kv",
    "step_epilogue",
    "token_mask",
    "windowed_variance",
]


renamed(window="variance_window")(Schedule)


def _per_sample(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """`value` as an fp32 tensor [B] on like's device."""
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=torch.float32).contiguous()
    if not (isinstance(value, (int, float)) and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number or a tensor, got {value!r}")
    return torch.full((like.shape[0],), float(value), device=like.device, dtype=torch.float32)


def token_mask(
    mask: Tensor,
    *,
    temporal_stride: int = 4,
    spatial_stride: int = 8,
    patch_size: tuple[int, int, int] = (1, 2, 2),
    causal: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Which tokens are foreground: those with any masked pixel under them.

    mask: bool [F, H, W] or [B, F, H, W], True on the foreground. Returns bool [B, S] (B = 1 for three dimensions),
    tokens in (t, h, w) raster order. `causal`: latent frame 0 is pixel frame 0 alone, latent frame i >= 1 covers pixel
    frames 4i-3 .. 4i (for a temporal stride of 4), else stride frames each. What a stride or a patch does not divide
    is padded with background at the end. Max-pooling on any device: there is no kernel to choose.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: one of {', '.join(BACKENDS)}")
    geometry = Geometry(temporal_stride, spatial_stride, tuple(patch_size), causal)
    return project_mask(mask, geometry).tokens


def locked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor | QuantizedKV,
    v_ref: Tensor | QuantizedKV,
    foreground: Tensor,
    alpha: float | Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
    attention: str = "auto",
) -> Tensor:
    """Attention whose background keys and values are blended with the source's by alpha.

    q [B, Sq, H, D]; k, v [B, S, H, D]; k_ref, v_ref [B, S, H, D], [1, S, H, D] or a QuantizedKV of such a shape;
    foreground bool [B or 1, S]; alpha a number in [0, 1] or [B] (a tensor's range is not checked: that would wait for
    the device); scale defaults to D ** -0.5. Returns [B, Sq, H, D] in q's dtype.
    K = m K + (1 - m) (alpha K_ref + (1 - alpha) K), V likewise (KV-Lock, arXiv 2603.09657). attention, where Triton
    serves: "fused" (one kernel), or a blend in front of "triton", "cudnn", "flash" or "sdpa"; "auto" goes by the shape.
    """
    if not isinstance(alpha, Tensor) and not (isinstance(alpha, (int, float)) and 0.0 <= alpha <= 1.0):
        raise ValueError(f"alpha must be a number between 0 and 1 or a tensor, got {alpha!r}")
    per_sample = _per_sample("alpha", alpha, q)
    return locked.locked_attention(q, k, v, k_ref, v_ref, foreground, per_sample, scale, backend, attention)


def cfg_projection(cond: Tensor, uncond: Tensor, eps: float = 1e-8, *, backend: str = "auto") -> Tensor:
    """s* = <cond, uncond> / (|uncond|^2 + eps) per sample, of predictions [B, ...]; [B] fp32."""
    return guidance.cfg_projection(cond, uncond, eps, backend)


def guided_prediction(
    cond: Tensor, uncond: Tensor, omega: float | Tensor, s_star: float | Tensor, *, backend: str = "auto"
) -> Tensor:
    """s* uncond + omega (cond - s* uncond) of predictions [B, ...]; omega, s_star numbers or [B]; in cond's dtype."""
    scales = _per_sample("omega", omega, cond), _per_sample("s_star", s_star, cond)
    return guidance.guided_prediction(cond, uncond, *scales, backend)


def windowed_variance(history: Tensor, foreground: Tensor, *, backend: str = "auto") -> Tensor:
    """The hallucination signal: the unbiased variance over the last n predictions, averaged over the foreground.

    history: [n, B, C, T, H, W], n >= 2 predicted clean latents; foreground: bool [B or 1, T, H, W], some True in each
    sample. Returns [B] fp32.
    """
    return variance.windowed_variance(history, foreground, backend)


def quantize_kv(
    x: Tensor,
    format: str = "fp8_e4m3",
    kind: str = "k",
    *,
    tokens: Tensor | None = None,
    tokens_per_scale: int = 1,
    backend: str = "auto",
) -> QuantizedKV:
    """Keys or values [B, S, H, D] packed in a format: native, bf16, fp8_e4m3, int8 or int4.

    kind: "k" or "v" (int4 groups keys along the tokens, values along the channels). tokens: int64 [N] indices below S
    (not checked on a GPU), to pack these tokens only, as [B, N, H, D], in the same pass. tokens_per_scale: 1, or 128
    for fp8 with one scale a head and 128 tokens. The result has `.dequantize(dtype)` and `.nbytes`.
    """
    return quantize.quantize_kv(x, format, kind, tokens=tokens, tokens_per_scale=tokens_per_scale, backend=backend)
