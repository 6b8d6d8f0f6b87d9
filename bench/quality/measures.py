"""What the table's columns are, from pixels. All videos uint8 [F, H, W, 3], masks bool [F, H, W], True where edited.

success       whether the edit shows what was asked (the judge); only where the truth is known
consistency   mean cosine similarity of the edited object with itself, one frame before and in the first frame, in
              windows that follow its path, each window's mean taken away; as VBench's subject consistency weighs
              the two, with pixels in place of DINO's features
psnr, ssim    of the background against the source's; lpips too, where the package and its weights are there
seam          root mean square error, 0 to 255, of the ring of 4 pixels (at a side of 64) around the mask
flicker       mean change from frame to frame of the background, less the source's own; 0 is as calm as the source
seconds       of the edit alone, without the source's pass that rows share
peak_bytes    the most memory that was held during the edit: the device's, or all of the process's on a CPU
"""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kvlock_fast.demo.world import grow
from kvlock_fast.media import metrics

COLUMNS = ("success", "consistency", "psnr", "ssim", "lpips", "seam", "flicker", "seconds", "peak_bytes")
RING = 4 / 64


def background_figures(video: np.ndarray, source: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """psnr, ssim, lpips where it can be had, seam, flicker. A mask of everything leaves no background: nothing."""
    outside = ~mask
    if not outside.any():
        return {}
    found = {
        "psnr": min(metrics.psnr(video, source, outside), 100.0),  # of equal pixels it is infinite
        "ssim": metrics.ssim(video, source, outside),
    }
    perceptual = lpips_model()
    if perceptual is not None:
        found["lpips"] = perceptual(np.where(mask[..., None], source, video), source)
    ring = grow(mask, max(1, round(RING * min(mask.shape[1:])))) & outside
    if ring.any():
        error = (video[ring].astype(np.float64) - source[ring]) ** 2
        found["seam"] = math.sqrt(float(error.mean()))
    if len(video) > 1 and (outside[:-1] & outside[1:]).any():
        found["flicker"] = metrics.flicker(video, outside) - metrics.flicker(source, outside)
    return found


def consistency(video: np.ndarray, path: np.ndarray, radius: float) -> float | None:
    """Of what is seen along a path [F, 2] (x, y) in pixels, NaN where it is not; None with fewer than two frames."""
    from scipy.ndimage import map_coordinates

    reach = np.arange(-round(radius), round(radius) + 1)
    windows = []
    for frame, (x, y) in zip(video.astype(np.float32), path - 0.5, strict=True):
        if np.isfinite(x):
            grid = np.meshgrid(y + reach, x + reach, indexing="ij")
            crop = np.stack([map_coordinates(frame[..., c], grid, order=1, mode="nearest") for c in range(3)])
            windows.append(crop.ravel() - crop.mean())
    if len(windows) < 2:
        return None
    unit = [window / max(float(np.linalg.norm(window)), 1e-6) for window in windows]
    before = [float(a @ b) for a, b in pairwise(unit)]
    first = [float(unit[0] @ b) for b in unit[1:]]
    return float(np.mean(before) + np.mean(first)) / 2


def path_of_mask(mask: np.ndarray) -> tuple[np.ndarray, float]:
    """The middle of each frame's mask, (x, y) in pixels [F, 2], NaN where it is empty; and a radius for all frames."""
    middles, sizes = np.full((len(mask), 2), np.nan), [1]
    for i, frame in enumerate(mask):
        rows, columns = frame.any(1).nonzero()[0], frame.any(0).nonzero()[0]
        if len(rows):
            middles[i] = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
            sizes.append(max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1)
    return middles, max(sizes) / 2


@lru_cache(maxsize=1)
def lpips_model() -> Callable[[np.ndarray, np.ndarray], float] | None:
    """The mean over frames of LPIPS (Alex), if its package and weights are there; None if not."""
    try:
        import lpips
        import torch

        net = lpips.LPIPS(net="alex", verbose=False).eval()
    except Exception:  # not installed, or its weights cannot be had
        return None

    def measure(a: np.ndarray, b: np.ndarray) -> float:
        x, y = (torch.from_numpy(v).permute(0, 3, 1, 2).float() / 127.5 - 1 for v in (a, b))
        with torch.inference_mode():
            return float(net(x, y).mean())

    return measure


class PeakMemory:
    """The most memory held since `__enter__`: `bytes`, of the device, or of the process where models run on the CPU."""

    def __init__(self, device: Any):
        self.device, self.bytes = device, 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # not on Linux
                Path("/proc/self/clear_refs").write_text("5")  # the process's peak is forgotten
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            import torch

            self.bytes = torch.cuda.max_memory_allocated(self.device)
            return
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            self.bytes = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            self.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
