"""The tensor backend: the operations of KV-Lock, for any denoising loop.

Every function takes `backend="auto" | "reference" | "triton"`. "reference" is plain torch with fp32 inside: the
specification and the CPU implementation. "auto" takes the fastest implementation there is for the tensor's device.
Wrong shapes, dtypes or names raise ValueError saying what was given. All but the masks are custom operators
(`torch.ops.kvlock_fast.*`), opaque to torch.compile. No gradients: editing is inference.

By themselves: token_mask, latent_mask, locked_attention, cfg_projection, guided_prediction, windowed_variance,
quantize_kv. For the fast path of a loop of one's own: `prologue` (norm, RoPE and blend in one pass) in front of
`attention` or `attention_fp8`, and `step_epilogue` (all that follows a step's forwards). "triton" also takes CPU
tensors while Triton's interpreter is on (TRITON_INTERPRET=1 before the first import), so that anyone can check a
kernel.
"""

from torch import Tensor

from kvlock_fast.kernels import epilogue_state
from kvlock_fast.kernels.attention import attention
from kvlock_fast.kernels.attention_fp8 import attention_fp8
from kvlock_fast.kernels.epilogue import step_epilogue
from kvlock_fast.kernels.epilogue_state import StepState, new_step_state
from kvlock_fast.kernels.guidance import cfg_projection, guided_prediction
from kvlock_fast.kernels.launch import BACKENDS
from kvlock_fast.kernels.locked_attention import locked_attention
from kvlock_fast.kernels.prologue import Capture, Lock, Places, PrologueOutput, QKNorm, RoPE, prologue
from kvlock_fast.kernels.quantize import QuantizedKV, quantize_kv
from kvlock_fast.kernels.variance import windowed_variance
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
    "latent_mask",
    "locked_attention",
    "new_step_state",
    "prologue",
    "quantize_kv",
    "step_epilogue",
    "token_mask",
    "windowed_variance",
]


@renamed(window="variance_window")
class Schedule(epilogue_state.Schedule):
    __doc__ = epilogue_state.Schedule.__doc__


def token_mask(
    mask: Tensor,
    *,
    temporal_stride: int = 4,
    spatial_stride: int = 8,
    patch_size: tuple[int, int, int] = (1, 2, 2),
    causal: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Project a pixel mask to tokens: a token is foreground where any pixel under it is.

    Max-pooling on any device: there is no kernel to choose.

    Args:
        mask: bool [F, H, W] or [B, F, H, W], True on the foreground.
        temporal_stride: pixel frames per latent frame.
        spatial_stride: pixels per latent along height and width.
        patch_size: latents (t, h, w) per token. Where a stride or a patch does not divide, background is padded at the
            end.
        causal: latent frame 0 is pixel frame 0 alone, and latent frame i >= 1 covers pixel frames 4i-3 .. 4i (for a
            temporal stride of 4); False: every latent frame covers a stride of frames.
        backend: one of "auto", "reference" and "triton".

    Returns: bool [B, S] (B = 1 for a mask of three dimensions), tokens in (t, h, w) raster order.
    Raises ValueError on another dtype, shape or backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: one of {', '.join(BACKENDS)}")
    geometry = Geometry(temporal_stride, spatial_stride, patch_size, causal)
    return project_mask(mask, geometry).tokens


def latent_mask(mask: Tensor, *, temporal_stride: int = 4, spatial_stride: int = 8, causal: bool = True) -> Tensor:
    """Project a pixel mask to latents: a latent is foreground where any pixel under it is.

    Args:
        mask: bool [F, H, W] or [B, F, H, W], True on the foreground.
        temporal_stride, spatial_stride, causal: as for `token_mask`.

    Returns: bool [B, T, h, w] (B = 1 for a mask of three dimensions).
    Raises ValueError on another dtype or shape.
    """
    return project_mask(mask, Geometry(temporal_stride, spatial_stride, (1, 1, 1), causal)).latents
