"""Between pixels and what the autoencoder takes and gives."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def to_model(video: np.ndarray) -> torch.Tensor:
    """uint8 [B, F, H, W, 3] to float32 [B, 3, F, H, W] in -1..1."""
    return torch.from_numpy(video).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_pixels(video: torch.Tensor) -> np.ndarray:
    """float [B, 3, F, H, W] in -1..1 to uint8 [B, F, H, W, 3]."""
    return ((video.float().permute(0, 2, 3, 4, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays, in dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


@torch.no_grad()
def round_trip(vae: nn.Module, video: np.ndarray) -> np.ndarray:
    """uint8 [B, F, H, W, 3] through the autoencoder (posterior's mode) and back."""
    return to_pixels(vae.decode(vae.encode(to_model(video)).latent_dist.mode()).sample)
