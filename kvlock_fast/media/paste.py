"""An edit pasted into its source: outside the mask the source's own pixels, at its edge a fade and matched colours.

Formulas for the correction u of the colours inside the mask; at its edge u is the source minus the edit:
[harmonic] Laplace's equation, Lu = 0: Perez, Gangnet, Blake 2003, "Poisson image editing", guided by the edit.
[screened] Lu = u / REACH^2: Bhat, Curless, Cohen, Zitnick 2008, "Fourier analysis of the 2D screened Poisson equation".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kvlock_fast.errors import InputError
from kvlock_fast.media.fitting import by_distance, resize_video
from kvlock_fast.parameters import is_whole
from kvlock_fast.settings import FEATHER, PASTE, PASTES

REACH = 2.0
"""Pixels of the edit in which a screened correction falls to 1/e; enlarged with the edit, where its source is larger.

`python -m bench.quality.pastes` measures the pastes (bench/results/pastes.json).
"""
AT_ONCE = 8
"""Frames in fp32 at a time: copies of a whole clip would be the largest thing in memory."""
DIRECT = 2000
"""Pixels up to which a harmonic correction is solved directly; above, that is the coarsest grid of a multigrid."""
EXACT = 0.1
"""Change in levels of 0 to 255 at which the multigrid stops; the next would be a tenth of it."""
CYCLES = 60
"""Most V-cycles of the multigrid; 5 are usual."""

Solve = Callable[[np.ndarray], np.ndarray]


def composite(
    source: np.ndarray,
    edit: np.ndarray,
    mask: np.ndarray,
    feather: int = FEATHER,
    paste: str = PASTE,
    soft: int = 0,
) -> np.ndarray:
    """The edit inside the mask, and outside it exactly the source's pixels, at the source's size and in its dtype.

    Args:
        source: [F, H, W, 3], uint8 or float 0..1.
        edit: [F, h, w, 3], uint8 or float 0..1; resized to the source.
        mask: bool [F, H, W], or [1, H, W] or [H, W] for all frames; True where the edit is to show.
        feather: pixels inside the mask's edge over which the edit fades in; 0 for none.
        paste: "hard" takes the edit's colours as they are. The others shift them so that they meet the source's at the
            mask's edge: "screened" within a few pixels of it, "harmonic" all over the mask.
        soft: pixels outside the mask that may change too; the fade begins at their end.

    Returns:
        [F, H, W, 3] in the source's dtype.

    Raises:
        InputError: for another shape, dtype or range, naming the argument.
    """
    source, edit = _frames("source", source), _frames("edit", edit)
    if len(edit) != len(source):
        raise InputError(f"edit has {len(edit)} frames but source has {len(source)}")
    mask = _mask(mask, source.shape[:3])
    for name, value in (("feather", feather), ("soft", soft)):
        if not is_whole(value, 0):
            raise InputError(f"{name} must be a whole number of at least 0, got {value!r}")
    if paste not in PASTES:
        raise InputError(f"paste must be one of {', '.join(PASTES)}, got {paste!r}")
    result = source.copy()
    reach = REACH * max(1.0, source.shape[1] / edit.shape[1]) if paste == "screened" else None
    correction = None if paste == "hard" else Correction(reach)
    for start in range(0, len(source), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        weight = fade(mask[part], feather, soft)
        own, new = _levels(source[part]), _levels(resize_video(edit[part], *source.shape[1:3]))
        if correction is not None:
            for i, inside in enumerate(weight > 0):
                new[i][inside] += correction.of(own[i] - new[i], inside)
        changed = weight > 0
        share = weight[changed][:, None]
        mixed = np.clip(share * new[changed] + (1 - share) * own[changed], 0, 255)
        result[part][changed] = np.rint(mixed) if source.dtype == np.uint8 else mixed / 255
    return result


def fade(mask: np.ndarray, feather: int, soft: int = 0) -> np.ndarray:
    """Weights [F, H, W] fp32 of an edit: 0 where nothing may change, rising in equal steps across the mask's edge to 1.

    mask: bool [F, H, W]; feather: pixels inside the mask below 1 (a diagonal step counts 1); soft: pixels outside it
    above 0 (by Euclidean distance, as `grow_mask` grows). Beyond the picture's edge counts as inside.
    """
    steps = soft + mask.astype(np.float32)
    if feather:
        inward = by_distance(~mask, lambda d: np.minimum(d, feather + 1).astype(np.float32), chessboard=True)
        steps = soft + inward
    if soft:
        outward = by_distance(mask, lambda d: np.where(d <= soft, soft + 1 - d, 0).astype(np.float32))
        steps = np.where(mask, steps, outward)
    return steps / np.float32(soft + feather + 1)


class Correction:
    """Corrections of frames' colours; the equations of one mask serve all frames in a row that have it.

    reach: pixels in which the correction falls to 1/e [screened]; None: it does not [harmonic].
    """

    def __init__(self, reach: float | None):
        self.reach = reach
        self._mask: np.ndarray | None = None
        self._solve: Solve = lambda edge: edge

    def of(self, difference: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The correction [n, C] fp32 of the mask's n pixels; 0 for a mask that has no edge in the picture.

        difference: [H, W, C], read at the pixels next to the mask; mask: bool [H, W]. Pixels at the picture's border
        have fewer neighbours, and nothing is assumed beyond it.
        """
        if mask.all() or not mask.any():
            return np.zeros((int(mask.sum()), difference.shape[-1]), np.float32)
        if self._mask is None or not np.array_equal(mask, self._mask):
            self._mask, self._solve = mask.copy(), _equations(mask, self.reach)
        return self._solve(difference)


def _equations(mask: np.ndarray, reach: float | None) -> Solve:
    """The equations inside a mask, ready to be solved for a difference [H, W, C]: [n, C] fp32."""
    from scipy import sparse
    from scipy.ndimage import distance_transform_cdt

    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    around = tuple(slice(max(0, found[0] - 1), found[-1] + 2) for found in (rows, columns))
    inside = mask[around]
    near = inside
    if reach is not None:  # 6 times as deep, less than a level is left of any difference
        near = inside & (np.asarray(distance_transform_cdt(inside, "chessboard")) <= 6 * reach)
    grid = sparse.kronsum(_path(inside.shape[1]), _path(inside.shape[0]), format="csr")[near.ravel()]
    matrix, edge = grid[:, near.ravel()].tocsr(), -grid[:, ~inside.ravel()].tocsr()
    if reach is not None:
        matrix += sparse.diags_array(np.full(matrix.shape[0], reach**-2, np.float32))
    solve = _multigrid(matrix.tocsr(), near)
    places = np.flatnonzero(near[inside])

    def correct(difference: np.ndarray) -> np.ndarray:
        right = edge @ difference[around][~inside].astype(np.float32)
        found = np.zeros((int(inside.sum()), right.shape[1]), np.float32)
        found[places] = solve(right)
        return found

    return correct


def _path(count: int) -> Any:
    """The Laplacian of `count` pixels in a row; those at the ends have one neighbour."""
    from scipy import sparse

    degrees = np.full(count, 2, np.float32)
    degrees[[0, -1]] -= 1
    ones = np.ones(count - 1, np.float32)
    return sparse.diags_array([-ones, degrees, -ones], offsets=(-1, 0, 1))  # pyright: ignore[reportArgumentType]


def _multigrid(matrix: Any, inside: np.ndarray) -> Solve:
    """Solve a symmetric positive definite matrix over the pixels of `inside` [H, W] for right sides [n, C]."""
    cycle = _cycle(matrix, inside)

    def solve(right: np.ndarray) -> np.ndarray:
        found = np.zeros_like(right)
        for _ in range(CYCLES):
            step = cycle(right - matrix @ found)
            found += step
            if np.abs(step).max() < EXACT:
                break
        return found

    return solve


def _cycle(matrix: Any, inside: np.ndarray) -> Solve:
    """A V-cycle: an approximate solution from zero.

    Each coarser grid has every second pixel each way, with bilinear interpolation and Galerkin's matrix. Jacobi steps
    by 1.5 over a row's sum of absolute values lower the error's energy for every such matrix, so the cycles converge.
    """
    from scipy.sparse.linalg import splu

    if matrix.shape[0] <= DIRECT:
        return splu(matrix.tocsc(), permc_spec="MMD_AT_PLUS_A").solve
    finer = _interpolation(inside)
    coarser = finer.T.tocsr()
    below = _cycle((coarser @ matrix @ finer).tocsr(), inside[::2, ::2])
    damping = np.float32(1.5) / abs(matrix).sum(axis=1)[:, None]

    def cycle(right: np.ndarray) -> np.ndarray:
        found = damping * right
        found += damping * (right - matrix @ found)
        found += finer @ below(coarser @ (right - matrix @ found))
        for _ in range(2):
            found += damping * (right - matrix @ found)
        return found

    return cycle


def _interpolation(inside: np.ndarray) -> Any:
    """Bilinear weights from every second pixel of `inside` [H, W], each way, to its pixels: sparse [n, m]."""
    from scipy import sparse

    down, across = (_halfway(side) for side in inside.shape)
    return sparse.kron(down, across, format="csr")[inside.ravel()][:, inside[::2, ::2].ravel()].tocsr()


def _halfway(count: int) -> Any:
    """Linear weights from the even ones of `count` pixels in a row to all of them."""
    from scipy import sparse

    pixels = np.arange(count)
    left, right = pixels // 2, np.minimum((pixels + 1) // 2, (count - 1) // 2)
    half = np.full(2 * count, 0.5, np.float32)
    return sparse.coo_array((half, (np.tile(pixels, 2), np.concatenate([left, right]))), (count, (count + 1) // 2))


def _levels(frames: np.ndarray) -> np.ndarray:
    """Frames in levels of 0 to 255, fp32."""
    return frames.astype(np.float32) * np.float32(1 if frames.dtype == np.uint8 else 255)


def _frames(name: str, frames: np.ndarray) -> np.ndarray:
    frames = np.asarray(frames)
    wanted = frames.dtype == np.uint8 or np.issubdtype(frames.dtype, np.floating)
    if not wanted or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InputError(f"{name} must be [F, H, W, 3], uint8 or float 0..1, got {frames.dtype} {frames.shape}")
    if frames.dtype != np.uint8 and not (frames.min() >= 0 and frames.max() <= 1):  # NaN is neither
        raise InputError(f"{name} must be uint8 or float 0..1, got floats from {frames.min():g} to {frames.max():g}")
    return frames


def _mask(mask: np.ndarray, extent: tuple[int, ...]) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise InputError(f"mask must be bool, True where the edit is to show, got {mask.dtype}")
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or len(mask) not in (1, extent[0]) or mask.shape[1:] != extent[1:]:
        raise InputError(f"mask must be [{extent[0]} or 1, {extent[1]}, {extent[2]}] like source, got {mask.shape}")
    return np.broadcast_to(mask, extent)
