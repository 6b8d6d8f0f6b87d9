"""Clips that are longer than the model's window: stretches that overlap, and what they say blended.

In every step each stretch goes through the model by itself, with its own part of one noise, one source and one mask;
where stretches overlap, predictions are mixed by weights that fall towards their ends (as MultiDiffusion does, arXiv
2302.08113). Guidance, the solver's step and the variance are those of the whole clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvlock_fast.errors import InputError
from kvlock_fast.masks import Geometry, ProjectedMask
from kvlock_fast.parameters import is_whole


@dataclass(frozen=True)
class Stretch:
    """Some frames of the latents: `frames` of [B, C, T, h, w], the mask there, and how much each counts, fp32 [n]."""

    frames: slice
    mask: ProjectedMask
    weights: Tensor

    def of(self, latents: Tensor) -> Tensor:
        """Its part of latents [..., T, h, w]."""
        return latents[..., self.frames, :, :]


@dataclass(frozen=True)
class Windows:
    """At most `frames` pixel frames at once, `overlap` of them shared with the stretch before."""

    frames: int
    overlap: int

    def __post_init__(self):
        for name in ("frames", "overlap"):
            value = getattr(self, name)
            if not is_whole(value):
                raise InputError(f"clip_{name} must be a whole number, got {value!r}")
        if self.frames < 2:
            raise InputError(f"clip_frames must be at least 2, got {self.frames}")
        if not 1 <= self.overlap < self.frames:
            raise InputError(
                f"clip_overlap must be from 1 to {self.frames - 1}, less than clip_frames, got {self.overlap}"
            )

    def latent_sizes(self, geometry: Geometry) -> tuple[int, int]:
        """Window and overlap in latent frames, whole tokens: the window not longer than asked, the overlap not shorter.

        InputError where nothing is left of the window but the overlap.
        """
        stride, patch = geometry.temporal_stride, geometry.patch_size[0]
        alone = geometry.lone_frames
        window = ((self.frames - alone) // stride + alone) // patch * patch
        overlap = -(-self.overlap // stride)
        overlap = -(-overlap // patch) * patch
        if window <= overlap:
            raise InputError(
                f"clip_frames {self.frames} with clip_overlap {self.overlap} leaves a stretch nothing of its own: "
                f"the model works by {stride * patch} frames, so that is {max(window, 0)} latent frames and "
                f"{overlap} shared"
            )
        return window, overlap


def asked_for(frames: int | None, overlap: int | None) -> Windows | None:
    """The windows of a call, None for the whole clip at once; an overlap that is not given is a quarter.

    Raises InputError for numbers that cannot be.
    """
    if frames is None:
        if overlap is not None:
            raise InputError(f"clip_overlap is {overlap!r}, but clip_frames is not given")
        return None
    quarter = max(1, frames // 4) if isinstance(frames, int) else 1
    return Windows(frames, quarter if overlap is None else overlap)


def stretches(mask: ProjectedMask, windows: Windows | None, geometry: Geometry) -> list[Stretch]:
    """The stretches of a clip; one of all where it is no longer than a window."""
    total, device = mask.latents.shape[1], mask.latents.device
    if windows is None:
        return [Stretch(slice(0, total), mask, torch.ones(total, dtype=torch.float32, device=device))]
    window, overlap = windows.latent_sizes(geometry)
    places = places_of(total, window, overlap, geometry.patch_size[0])
    weights = _normalised([_trapezoid(place, places) for place in places], places, total)
    return [Stretch(place, _cut(mask, place), part.to(device)) for place, part in zip(places, weights, strict=True)]


def places_of(total: int, window: int, overlap: int, patch: int = 1) -> list[slice]:
    """Where the stretches are: all of one length, the last one ending with the clip (so it may overlap more).

    All numbers in latent frames, window and overlap multiples of `patch`, of which the starts are too.
    """
    if total <= window:
        return [slice(0, total)]
    last = -(-(total - window) // patch) * patch
    return [slice(start, min(start + window, total)) for start in (*range(0, last, window - overlap), last)]


def _trapezoid(place: slice, places: list[slice]) -> Tensor:
    """1 in the middle, falling towards the neighbours over what is shared with them; fp64 [n]."""
    at = torch.arange(place.start, place.stop, dtype=torch.float64)
    i = places.index(place)
    weight = torch.ones_like(at)
    if i > 0:
        shared = places[i - 1].stop - place.start
        weight = torch.minimum(weight, (at - place.start + 1) / (shared + 1))
    if i + 1 < len(places):
        shared = place.stop - places[i + 1].start
        weight = torch.minimum(weight, (place.stop - at) / (shared + 1))
    return weight


def _normalised(weights: list[Tensor], places: list[slice], total: int) -> list[Tensor]:
    """So that they add up to 1 in every frame; fp32."""
    whole = torch.zeros(total, dtype=torch.float64)
    for weight, place in zip(weights, places, strict=True):
        whole[place] += weight
    return [(weight / whole[place]).float() for weight, place in zip(weights, places, strict=True)]


def _cut(mask: ProjectedMask, place: slice) -> ProjectedMask:
    """The mask of some latent frames, whole tokens."""
    patch, (_, rows, columns) = mask.patch_size[0], mask.grid
    tokens = mask.tokens.view(len(mask.tokens), -1, rows, columns)
    tokens = tokens[:, place.start // patch : -(-place.stop // patch)].flatten(1)
    return replace(mask, latents=mask.latents[:, place], tokens=tokens)


def blend(parts: Sequence[Tensor], of: Sequence[Stretch]) -> Tensor:
    """Mix the stretches' predictions [B, C, n, h, w] into the whole clip's [B, C, T, h, w] fp32, in fixed order."""
    first, total = parts[0], max(stretch.frames.stop for stretch in of)
    whole = torch.zeros(*first.shape[:2], total, *first.shape[3:], dtype=torch.float32, device=first.device)
    for part, stretch in zip(parts, of, strict=True):
        whole[:, :, stretch.frames] += stretch.weights[:, None, None] * part
    return whole
