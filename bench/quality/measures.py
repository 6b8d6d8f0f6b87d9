"""What the table's columns are, from pixels. All videos uint8 [F, H, W, 3], masks bool [F, H, W], True where edited.

Raw is the model's own video; delivered is that pasted into the source, as `kvlock-fast edit` writes it.

success       whether the edit shows what was asked (the judge); only where the truth is known. `one_object`,
              `second_object`: the same by what the clip shows; `second_whole`: beside a second object, by captions of
              the whole clip
whole_frame   PSNR of the whole raw clip to the true answer, in dB; background alone can be won by not editing
lpips         learned distance of the whole raw clip to the true answer (perceptual.py), where its weights are there; of
              clips without a true answer that of the background to the source's
consistency   mean cosine similarity of the edited object with itself, one frame before and in the first frame, in
              windows that follow its path, each window's mean taken away; as VBench's subject consistency weighs
              the two, with pixels in place of DINO's features
psnr, ssim    of the raw background against the source's; delivered_psnr: of the delivered one, 100 where it is exact
own_error     mean square error of the raw background (0 to 1), less that of the row `ceiling` on the same edit
seam          root mean square error, 0 to 255, of the raw ring of 4 pixels (at a side of 64) around the mask
delivered_seam  root mean square step, 0 to 255, across the mask's edge in the delivered video, less the true answer's
              own steps where it is known
flicker       mean change from frame to frame of the background, less the source's own; 0 is as calm as the source
seconds       of the edit alone, without the source's pass that rows share
peak_bytes    the most memory that was held during the edit: the device's, or all of the process's on a CPU
"""

from __future__ import annotations

import resource
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench.quality.perceptual import Distance
from kvlock_fast.media import metrics
from kvlock_fast.media.paste import composite

COLUMNS = ("success", "one_object", "second_object", "second_whole", "whole_frame", "lpips", "consistency", "psnr",
           "delivered_psnr", "own_error", "ssim", "seam", "delivered_seam", "flicker", "seconds",
           "peak_bytes")  # fmt: skip
EXACT = 100.0
"""Stands for the PSNR of equal pixels, which is infinite, in dB."""


def background_figures(video: np.ndarray, source: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """psnr, ssim, seam, flicker. A mask of everything leaves no background: nothing."""
    outside = ~mask
    if not outside.any():
        return {}
    found = {
        "psnr": min(metrics.psnr(video, source, outside), EXACT),
        "ssim": metrics.ssim(video, source, outside),
    }
    seam = metrics.seam(source, mask, video)
    if seam is not None:
        found["seam"] = seam
    if len(video) > 1 and (outside[:-1] & outside[1:]).any():
        found["flicker"] = metrics.flicker(video, outside) - metrics.flicker(source, outside)
    return found


def answer_figures(video: np.ndarray, answer: np.ndarray, distance: Distance | None) -> dict[str, float]:
    """whole_frame, and lpips where there is a learned distance."""
    found = {"whole_frame": min(metrics.psnr(video, answer), EXACT)}
    return found if distance is None else found | {"lpips": distance(video, answer)}


def delivered_figures(
    video: np.ndarray, source: np.ndarray, mask: np.ndarray, answer: np.ndarray | None
) -> dict[str, float]:
    """delivered_psnr, delivered_seam. A mask of everything or nothing has no edge: nothing."""
    outside = ~mask
    if not outside.any() or not mask.any():
        return {}
    pasted = composite(source, video, mask)
    found = {"delivered_psnr": min(metrics.psnr(pasted, source, outside), EXACT)}
    step = metrics.edge_step(mask, pasted, answer)
    return found if step is None else found | {"delivered_seam": step}


def own_error(psnr: float, ceiling: float) -> float:
    """Mean square error (0 to 1) that the edit adds to the autoencoder's, from the PSNR of both, in dB."""
    return 10 ** (-psnr / 10) - 10 ** (-ceiling / 10)


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
