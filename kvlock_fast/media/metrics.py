"""How far an edit lies from its source, and how calm it is. All on uint8-scaled frames, in float64 or near it.

Each function takes `[F, H, W, 3]` or `[F, H, W]` with values from 0 to 255, and `where`, a bool `[F, H, W]` that says
which pixels count (all of them by default).
"""

from __future__ import annotations

import math

import numpy as np

from kvlock_fast.media.fitting import by_distance

RING = 4 / 64
"""Width of the ring of a raw seam, as a share of the smaller side."""

# Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", section III.C.
_SIGMA, _RADIUS = 1.5, 5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB over all counted pixels and frames at once; inf where they are equal.

    Raises ValueError for differing shapes or an empty `where`.
    """
    where = _checked(a, b, where)
    total = 0.0
    for x, y, w in zip(a, b, where, strict=True):
        difference = (x.astype(np.float64) - y).reshape(*w.shape, -1)
        total += float(np.einsum("hwc,hwc->hw", difference, difference)[w].sum())
    channels = a.shape[3] if a.ndim == 4 else 1
    error = total / (int(where.sum()) * channels)
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> float:
    """Structural similarity: Gaussian window (sigma 1.5, 11 wide), per channel, averaged over the counted pixels.

    The windows reach over the picture's edge by reflection, and those pixels count like all others. Raises ValueError
    for differing shapes or an empty `where`.
    """
    return _ssim_in(a, b, [_checked(a, b, where)])[0]


def _ssim_in(a: np.ndarray, b: np.ndarray, regions: list[np.ndarray]) -> list[float]:
    """The mean similarity in each region, none of them empty; the map of a frame is made once."""
    totals = [0.0] * len(regions)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if any(region[i].any() for region in regions):
            similarity = _ssim_map(x, y)
            totals = [total + float(similarity[r[i]].sum()) for total, r in zip(totals, regions, strict=True)]
    return [total / int(region.sum()) for total, region in zip(totals, regions, strict=True)]


def flicker(video: np.ndarray, where: np.ndarray | None = None) -> float:
    """Mean absolute difference between neighbouring frames, 0 to 255, over pixels that count in both.

    Raises ValueError for fewer than two frames, or where no pixel counts in two neighbouring frames.
    """
    where = _checked(video, video, where)
    if len(video) < 2:
        raise ValueError("flicker needs at least two frames")
    total, count = 0.0, 0
    for before, after, both in zip(video[:-1], video[1:], where[:-1] & where[1:], strict=True):
        difference = np.abs(after[both].astype(np.float64) - before[both])
        total, count = total + float(difference.sum()), count + difference.size
    if count == 0:
        raise ValueError("no pixel counts in two neighbouring frames")
    return total / count


def seam(source: np.ndarray, mask: np.ndarray, edited: np.ndarray) -> float | None:
    """Root mean square error, 0 to 255, in the ring around the mask; None where there is no ring.

    source, edited: uint8 `[F, H, W, 3]`; mask: bool `[F, H, W]`. The ring is RING of the smaller side wide.
    """
    width = max(1, round(RING * min(mask.shape[1:])))
    ring = by_distance(mask, lambda distance: distance <= width, chessboard=True) & ~mask
    return math.sqrt(float(((edited[ring].astype(np.float64) - source[ring]) ** 2).mean())) if ring.any() else None


def edge_step(mask: np.ndarray, edited: np.ndarray, answer: np.ndarray | None = None) -> float | None:
    """Root mean square step, 0 to 255, between neighbouring pixels of which one is in the mask; None without such.

    edited: uint8 `[F, H, W, 3]`; mask: bool `[F, H, W]`; answer: a true answer, whose own steps are taken away.
    """
    total, count = 0.0, 0
    for i, inside in enumerate(mask):
        frame = edited[i].astype(np.float32) - (0 if answer is None else answer[i])
        for axis in (0, 1):
            steps = np.diff(frame, axis=axis)[np.diff(inside, axis=axis)]
            total, count = total + float(np.square(steps, dtype=np.float64).sum()), count + steps.size
    return math.sqrt(total / count) if count else None


def _checked(a: np.ndarray, b: np.ndarray, where: np.ndarray | None) -> np.ndarray:
    if a.shape != b.shape or a.ndim not in (3, 4):
        raise ValueError(f"two videos [F, H, W, 3] or [F, H, W] of one shape are needed, not {a.shape} and {b.shape}")
    if where is None:
        return np.ones(a.shape[:3], dtype=bool)
    if where.shape != a.shape[:3] or where.dtype != bool:
        raise ValueError(f"where must be bool {list(a.shape[:3])}, not {where.dtype} {list(where.shape)}")
    if not where.any():
        raise ValueError("where is empty: no pixel counts")
    return where


def _ssim_map(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """SSIM of two pictures `[H, W, C]` or `[H, W]` at every pixel, the mean over channels: float64 `[H, W]`."""
    from scipy.ndimage import gaussian_filter

    # Variances are differences of large squares: around zero they lose less in float32.
    first, second = (p.reshape(*p.shape[:2], -1).transpose(2, 0, 1).astype(np.float32) - 127.5 for p in (x, y))
    stack = np.stack([first, second, first * first, second * second, first * second])
    # Beyond the edge by reflection: d c b a | a b c d | d c b a.
    blurred = gaussian_filter(stack, _SIGMA, mode="reflect", radius=_RADIUS, axes=(2, 3))
    mean_x, mean_y, xx, yy, xy = blurred.astype(np.float64)
    xx, yy, xy = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    mean_x, mean_y = mean_x + 127.5, mean_y + 127.5
    similarity = (2 * mean_x * mean_y + _C1) * (2 * xy + _C2) / ((mean_x**2 + mean_y**2 + _C1) * (xx + yy + _C2))
    return similarity.mean(0)


def measure_edit(source: np.ndarray, mask: np.ndarray, edited: np.ndarray) -> dict[str, float | None]:
    """How background and foreground of the model's frames compare with the source, and how calm they are.

    source, edited: uint8 `[F, H, W, 3]`; mask: bool `[F, H, W]`, True on the foreground. For each region its PSNR (dB,
    inf where equal), SSIM and flicker, and the source's flicker beside it; and the seam around the mask. None: no pixel
    of the video counts.
    """
    regions = {name: where for name, where in (("background", ~mask), ("foreground", mask)) if where.any()}
    similarity = dict(zip(regions, _ssim_in(source, edited, list(regions.values())), strict=True))
    measured: dict[str, float | None] = {}
    for name in ("background", "foreground"):
        where = regions.get(name)
        measured[f"{name}_psnr"] = None if where is None else psnr(source, edited, where)
        measured[f"{name}_ssim"] = similarity.get(name)
        still = where is None or len(source) < 2 or not (where[:-1] & where[1:]).any()
        measured[f"{name}_flicker"] = None if still else flicker(edited, where)
        measured[f"{name}_flicker_source"] = None if still else flicker(source, where)
    measured["seam"] = seam(source, mask, edited)
    return measured


def measure_delivered(source: np.ndarray, mask: np.ndarray, edited: np.ndarray) -> dict[str, float | None]:
    """How well a delivered video keeps its source, and how well the edit joins it.

    source, edited: uint8 `[F, H, W, 3]`; mask: bool `[F, H, W]`, True where the edit is. delivered_psnr: of the
    background (dB, inf where equal); delivered_seam: the step across the mask's edge, as no true answer is known here.
    None: no pixel counts.
    """
    outside = ~mask
    return {
        "delivered_psnr": psnr(source, edited, outside) if outside.any() else None,
        "delivered_seam": edge_step(mask, edited),
    }
