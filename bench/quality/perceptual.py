"""A learned distance of videos: ST-LPIPS, a shift-tolerant AlexNet with LPIPS' heads, from its published weights.

    pip install --no-deps stlpips_pytorch

The wheel is taken as data: its file of weights is read, its code is not imported (which needs torchvision). Network and
distance: Ghildyal and Liu, "Shift-tolerant Perceptual Similarity Metric" (arXiv 2207.13686); LPIPS: Zhang et al.,
"The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv 1801.03924).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kvlock_fast.errors import InputError

PACKAGE = "stlpips_pytorch"
FILE = "weights/vST0.0/alex_shift_tolerant.pth"
LEAST = 64
"""Shorter side, in pixels, that smaller frames are enlarged to: that of the patches it was trained on."""
CONVOLUTIONS = ("net.slice1.0", "net.slice2.5", "net.slice3.9", "net.slice4.11", "net.slice5.13")
"""The five convolutions; before the second and the third are a maximum over 3x3 and a blur, after the first a blur."""
BLURS = ("net.slice1.1.filt", "net.slice2.4.filt", "net.slice3.8.filt")

Distance = Callable[[np.ndarray, np.ndarray], float]


def installed_weights() -> Path | None:
    """File of the installed wheel; None where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    path = None if found is None or found.origin is None else Path(found.origin).parent / FILE
    return path if path is not None and path.is_file() else None


def learned_distance(path: Path) -> Distance:
    """A function of two videos uint8 [F, H, W, 3]: the mean distance of their frames, 0 for equal ones.

    Features of the second video are kept until another one is given. Raises InputError naming a file of other weights.
    """
    try:
        weights = torch.load(path, weights_only=True, map_location="cpu")
        names = [*BLURS, *(f"{name}.{part}" for name in CONVOLUTIONS for part in ("weight", "bias"))]
        names += [f"scaling_layer.{name}" for name in ("shift", "scale")] + [f"lin{i}.model.1.weight" for i in range(5)]
        weights = {name: weights[name] for name in names}
    except Exception as error:  # torch.load raises nearly anything at a file of another kind
        raise InputError(f"--lpips '{path}' is not ST-LPIPS' file of AlexNet: {error}") from error
    kept: list[tuple[np.ndarray, list[Tensor]]] = []

    def distance(video: np.ndarray, answer: np.ndarray) -> float:
        with torch.inference_mode():
            if not kept or kept[0][0] is not answer:
                kept[:] = [(answer, features(_as_frames(answer), weights))]
            pairs = zip(features(_as_frames(video), weights), kept[0][1], strict=True)
            heads = (weights[f"lin{i}.model.1.weight"] for i in range(5))
            return sum(float(F.conv2d((a - b) ** 2, w).mean()) for (a, b), w in zip(pairs, heads, strict=True))

    return distance


def features(frames: Tensor, weights: dict[str, Tensor]) -> list[Tensor]:
    """Features of the five layers for frames [N, 3, H, W] in -1..1, each of unit length over its channels."""
    x = (frames - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
    found = []
    for i, name in enumerate(CONVOLUTIONS):
        if i in (1, 2):
            x = _blurred(F.max_pool2d(x, 3, stride=1), weights[BLURS[i]])
        kernel = weights[f"{name}.weight"]
        x = F.conv2d(x, kernel, weights[f"{name}.bias"], padding=2 if kernel.shape[-1] > 3 else 1)
        x = F.relu(_blurred(x, weights[BLURS[0]]) if i == 0 else x)
        found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
    return found


def _blurred(x: Tensor, kernel: Tensor) -> Tensor:
    """Every channel blurred and halved; the edges are reflected by two pixels."""
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


def _as_frames(video: np.ndarray) -> Tensor:
    frames = torch.from_numpy(video).permute(0, 3, 1, 2).float() / 127.5 - 1
    if min(frames.shape[2:]) < LEAST:
        frames = F.interpolate(frames, scale_factor=LEAST / min(frames.shape[2:]), mode="bilinear", align_corners=False)
    return frames
