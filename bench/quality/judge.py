"""Reads colour, shape and place of the object in a video from its pixels alone; no model, no knowledge of the seed.

Colour: backgrounds are dull and the palette strong, so saturated pixels vote for the palette's nearest hue; the colour
with the largest connected patch wins. Shape: the patches of all frames are laid over each other, and the mean is
correlated with every shape drawn in several sizes and degrees of blur (an autoencoder's corners are round).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kvlock_fast.demo.scene import COLOURS, SHAPES
from kvlock_fast.demo.world import EditCase, grow, shape_distance

# Saturation from which a pixel may belong to an object: backgrounds reach 0.36, colours start at 0.77.
_SATURATED = 0.5
# A patch of fewer pixels (at a side of 64) is no object: the smallest true one has 130.
_SMALLEST = 40 / 64**2


@dataclass(frozen=True)
class Verdict:
    """What is seen. `colour` and `shape` are None when there is no object.

    `centres` float [F, 2]: (x, y) of the patch as fractions of (width, height), NaN in frames without one;
    `presence`: share of frames with a patch; `fit`: the shape's correlation, up to 1; `patch` bool [F, H, W].
    """

    colour: str | None
    shape: str | None
    centres: np.ndarray
    presence: float
    fit: float
    patch: np.ndarray


def judge(video: np.ndarray, region: np.ndarray | None = None) -> Verdict:
    """Find the object in uint8 [F, H, W, 3], inside `region` (bool [F, H, W]) if given."""
    closest = nearest_colour(video)
    if region is not None:
        closest = np.where(region, closest, -1)
    patches = {name: _largest_patches(closest == i) for i, name in enumerate(COLOURS)}
    colour = max(patches, key=lambda name: patches[name].sum())
    patch = patches[colour]
    if not patch.any():
        nothing = np.full((len(video), 2), np.nan)
        return Verdict(None, None, nothing, 0.0, 0.0, patch)
    middles = _centroids(patch)
    seen = _overlaid(_cover(video, colour), middles)
    shapes, templates = _templates(len(seen), min(patch.shape[1:]))
    fits = templates @ _standard(seen)
    best = int(fits.argmax())
    return Verdict(colour, shapes[best], middles, float(patch.any((1, 2)).mean()), float(fits[best]), patch)


def edit_is_right(case: EditCase, video: np.ndarray) -> bool:
    """Whether uint8 [F, H, W, 3] shows what the edit asked for: its colour and shape, where the true object moves.

    The object must be seen in nine frames of ten, on average within a tenth of the picture of its true place, and no
    second object may have appeared elsewhere. A rim of a twelfth of the picture around the mask counts as its place.
    """
    around = grow(case.mask, min(video.shape[1:3]) // 12)
    seen, thing = judge(video, around), case.target.scene.objects[0]
    if (seen.colour, seen.shape) != (thing.colour, thing.shape) or seen.presence < 0.9:
        return False
    distance = np.hypot(*(seen.centres - _centroids(case.target.mask)).T)
    stray = judge(video, ~around)
    return bool(np.nanmean(distance) < 0.1 and stray.presence < 0.5)


def nearest_colour(video: np.ndarray) -> np.ndarray:
    """Index into the palette of every saturated pixel, -1 for the others; int8 [F, H, W]."""
    rgb = video.astype(np.float32)
    low, high = rgb.min(-1), rgb.max(-1)
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    # Hue as a direction: what is left of a colour without its grey part.
    tint, palette = rgb - rgb.mean(-1, keepdims=True), palette - palette.mean(-1, keepdims=True)
    tint /= np.linalg.norm(tint, axis=-1, keepdims=True) + 1e-6
    palette /= np.linalg.norm(palette, axis=-1, keepdims=True)
    index = (tint @ palette.T).argmax(-1)
    strong = (high - low > _SATURATED * high) & (high > 90)
    return np.where(strong, index, -1).astype(np.int8)


def _largest_patches(mask: np.ndarray) -> np.ndarray:
    """The largest connected patch of each frame of bool [F, H, W], or nothing where it is too small."""
    from skimage.measure import label

    smallest = _SMALLEST * min(mask.shape[1:]) ** 2
    kept = np.zeros_like(mask)
    for frame, out in zip(mask, kept, strict=True):
        if frame.sum() < smallest:
            continue
        labels = label(frame, connectivity=2)
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        if sizes.max() >= smallest:
            out |= labels == sizes.argmax()
    return kept


def _centroids(patch: np.ndarray) -> np.ndarray:
    """(x, y) of the centroid in each frame of bool [F, H, W] as fractions of (width, height), [F, 2]; NaN if empty."""
    _, height, width = patch.shape
    area = np.where(patch.any((1, 2)), patch.sum((1, 2)), np.nan)
    x = (patch.sum(1) * (np.arange(width) + 0.5)).sum(1) / area / width
    y = (patch.sum(2) * (np.arange(height) + 0.5)).sum(1) / area / height
    return np.stack([x, y], -1)


def _cover(video: np.ndarray, colour: str) -> np.ndarray:
    """How much of each pixel is of that colour, by its tint alone; float [F, H, W] in 0..1."""
    palette = np.array(COLOURS[colour], dtype=np.float32)
    direction = palette - palette.mean()
    tint = (video.astype(np.float32) - palette.mean()) @ direction / (direction @ direction)
    # Backgrounds have a little of any tint.
    behind = np.median(tint)
    return np.clip((tint - behind) / (1 - behind), 0, 1)


def _overlaid(cover: np.ndarray, middles: np.ndarray) -> np.ndarray:
    """The mean over frames of windows around `middles` (fractions; NaN: no window), float [N, N], N = 0.6 sides."""
    from scipy.ndimage import map_coordinates

    _, height, width = cover.shape
    reach = round(0.3 * min(height, width))
    offsets = np.arange(-reach, reach + 1)
    windows = []
    for frame, (x, y) in zip(cover, middles * (width, height) - 0.5, strict=True):
        if np.isfinite(x):
            grid = np.meshgrid(y + offsets, x + offsets, indexing="ij")
            windows.append(map_coordinates(frame, grid, order=1, mode="constant"))
    return np.mean(windows, axis=0)


@lru_cache(maxsize=4)
def _templates(size: int, side: int) -> tuple[list[str], np.ndarray]:
    """Every shape in several sizes and blurs: their names, and the pictures as rows of unit length [n, size * size]."""
    from scipy.ndimage import gaussian_filter

    offsets = np.arange(size) - size // 2
    names, rows = [], []
    for shape in SHAPES:
        middle = _middle(shape)
        for radius in np.linspace(0.13, 0.27, 15) * side:
            x, y = np.meshgrid(offsets / radius, offsets / radius + middle)
            drawn = np.clip(0.5 - shape_distance(shape, x, y) * radius, 0, 1)
            for blur in (0.4, 1.2, 2.0):
                names.append(shape)
                rows.append(_standard(gaussian_filter(drawn, blur * side / 64)))
    return names, np.array(rows)


def _standard(picture: np.ndarray) -> np.ndarray:
    """A picture as a vector of mean 0 and length 1."""
    flat = picture.ravel() - picture.mean()
    return flat / max(np.linalg.norm(flat), 1e-6)


def _middle(shape: str) -> float:
    """The y of a shape's centroid at radius 1, by counting."""
    axis = np.linspace(-1.5, 1.5, 601)
    inside = shape_distance(shape, *np.meshgrid(axis, axis)) <= 0
    return float((inside.sum(1) * axis).sum() / inside.sum())
