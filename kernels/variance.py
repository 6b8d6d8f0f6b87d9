"""The hallucination signal: how much the predicted clean latent moves over the last steps.

    var = mean over the foreground elements of the unbiased variance over the last n predictions     one scalar a sample

Two passes (mean, then squared deviations) in fp32, so that a large common offset costs no digits. Elements outside
the foreground are never read into the sum: NaN there does not come through, and the mean does not depend on the area.
Source: KV-Lock (arXiv 2603.09657), after the trajectory variance of Aithal et al. 2024.
"""

import torch
from torch import Tensor

from kvlock_fast.kernels.guard import require_package_name

require_package_name(__name__)


def windowed_variance_reference(history: Tensor, foreground: Tensor) -> Tensor:
    """history [n, B, C, T, H, W], foreground [B or 1, T, H, W] bool, never empty; [B] fp32."""
    inside = foreground[:, None].expand(history.shape[1:])
    wide = torch.promote_types(history.dtype, torch.float32)
    masked = torch.where(inside, history.to(wide), 0.0)
    variance = masked.var(dim=0, unbiased=True)
    return (variance.flatten(1).sum(1) / inside.flatten(1).sum(1)).float()


@torch.library.custom_op("kvlock_fast::windowed_variance", mutates_args=())
def _variance_op(history: Tensor, foreground: Tensor) -> Tensor:
    if not foreground.flatten(1).any(dim=1).all():  # the one host read; a loop checks its mask once instead
        raise ValueError(f"foreground is empty for a sample: {tuple(foreground.shape)} holds one without True")
    return windowed_variance_reference(history, foreground)


@_variance_op.register_fake
def _(history, foreground):
    return history.new_empty(history.shape[1], dtype=torch.float32)


def launch_windowed_variance(history: Tensor, foreground: Tensor) -> Tensor:
    """var [B] fp32. Raises ValueError on shapes that do not fit, n < 2, or an empty mask."""
    if history.ndim != 6 or not history.is_floating_point():
        raise ValueError(
            f"history must be floating-point [n, B, C, T, H, W], got {history.dtype} {tuple(history.shape)}"
        )
    if history.shape[0] < 2:
        raise ValueError(f"a variance needs at least 2 predictions, got history {tuple(history.shape)}")
    batch, volume = history.shape[1], tuple(history.shape[3:])
    if foreground.dtype != torch.bool:
        raise ValueError(f"foreground must be bool, got {foreground.dtype}")
    if foreground.ndim != 4 or foreground.shape[0] not in (1, batch) or tuple(foreground.shape[1:]) != volume:
        raise ValueError(f"foreground must be [{batch} or 1, {volume}], got {tuple(foreground.shape)}")
    return _variance_op(history, foreground)
