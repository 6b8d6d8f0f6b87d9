"""Masks: from pixels to latents to tokens.

The video autoencoders are causal: latent frame 0 is pixel frame 0 alone, latent frame i >= 1 covers the `stride` pixel
frames up to stride * i. Each stage takes the maximum, so a token is foreground if any pixel under it is.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlock_fast.parameters import is_whole


@dataclass(frozen=True)
class Geometry:
    """Conversion of pixels to latents, and of latents to tokens.

    Strides in pixels, patch_size (t, h, w) in latents; most_tokens: the most along one axis that the model knows, or
    along each (None: any number); lead_in: where the patch does not divide the latent frames, the model has the first
    of them repeated in front (else its last patch is incomplete); latents_together: how many latent frames after the
    first the autoencoder decodes at once, and needs whole; one_frame: whether the model makes images, no videos;
    least_frames: the fewest that it makes.
    """

    temporal_stride: int
    spatial_stride: int
    patch_size: tuple[int, int, int]
    causal: bool = True
    most_tokens: int | tuple[int | None, int | None, int | None] | None = None
    lead_in: bool = False
    latents_together: int = 1
    one_frame: bool = False
    least_frames: int = 1

    def __post_init__(self):
        sizes = (self.temporal_stride, self.spatial_stride, *self.patch_size)
        if len(self.patch_size) != 3 or not all(is_whole(n, 1) for n in sizes):
            raise ValueError(
                f"strides and the three patch sizes must be whole numbers of at least 1, got temporal_stride="
                f"{self.temporal_stride}, spatial_stride={self.spatial_stride}, patch_size={self.patch_size}"
            )

    def token_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens (t, h, w) of a video of so many frames of height x width pixels."""
        latents = self.lone_frames + -(-(frames - self.lone_frames) // self.temporal_stride)
        sizes = latents, -(-height // self.spatial_stride), -(-width // self.spatial_stride)
        return _patches(sizes, self.patch_size)

    @property
    def lone_frames(self) -> int:
        """Number of frames in front with a latent frame of their own: the first one, of a causal autoencoder."""
        return 1 if self.causal else 0

    @property
    def frame_step(self) -> int:
        """The frames that a video has are a multiple of this, plus `lone_frames`."""
        return self.temporal_stride * self.latents_together

    @property
    def frame_rule(self) -> tuple[int, int, int]:
        """`frame_step`, `lone_frames` and `least_frames`."""
        return self.frame_step, self.lone_frames, self.least_frames

    @property
    def frame_words(self) -> str:
        """The same in words."""
        whole = f"{self.frame_step}n+{self.lone_frames}" if self.lone_frames else f"{self.frame_step}n"
        return whole if self.least_frames == 1 else f"{whole} of at least {self.least_frames}"

    def whole_frames(self, frames: int) -> int:
        """The least number of frames, from `frames` on, that the model can take."""
        return max(self.least_frames, frames + (self.lone_frames - frames) % self.frame_step)

    def lead(self, latent_frames: int) -> int:
        """Number of times that the first of the latent frames is repeated in front."""
        return -latent_frames % self.patch_size[0] if self.lead_in else 0

    @property
    def limits(self) -> tuple[int | None, int | None, int | None]:
        """The most tokens along each axis."""
        most = self.most_tokens
        return most if isinstance(most, tuple) else (most, most, most)

    @property
    def limits_text(self) -> str:
        """The limits in words."""
        sides = zip(("in time", "down", "across"), self.limits, strict=True)
        each = " and ".join(f"{most} {side}" for side, most in sides if most is not None)
        return f"{each} tokens" if isinstance(self.most_tokens, tuple) else f"{self.most_tokens} tokens along each side"

    def knows(self, frames: int, height: int, width: int) -> bool:
        """Whether the model's position codes reach over a video of this extent."""
        grid = self.token_grid(frames, height, width)
        return all(most is None or size <= most for size, most in zip(grid, self.limits, strict=True))

    def size_multiple(self) -> tuple[int, int]:
        """The numbers of pixels that height and width must be multiples of."""
        return self.spatial_stride * self.patch_size[1], self.spatial_stride * self.patch_size[2]


@dataclass(frozen=True)
class ProjectedMask:
    """A mask at each stage, True on the foreground.

    latents: [B, T, h, w] (with the model's lead-in), what an edit may change where the background is kept: of a token
    that straddles the mask's edge, a part; tokens: [B, S] in (t, h, w) raster order, those whose K and V are their own;
    patch_size: latents a token, along each axis; beside: how many of the latent frames, at the end, hold something else
    than the video, such as its sound: they are of no token.
    """

    latents: Tensor
    tokens: Tensor
    patch_size: tuple[int, int, int] = (1, 1, 1)
    beside: int = 0

    @property
    def share(self) -> float:
        """Foreground tokens / tokens, over the batch."""
        return self.tokens.float().mean().item()

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along each axis."""
        _, frames, height, width = self.latents.shape
        return _patches((frames - self.beside, height, width), self.patch_size)

    def distance(self, most: int) -> Tensor:
        """Distance of every token to the foreground of its frame, in tokens (rows, columns and diagonals): int [B, S].

        0 on the foreground; `most` + 1 for all that is further than `most`.
        """
        batch, reached = self.tokens.shape[0], self.tokens.view(-1, *self.grid)
        distance = torch.where(reached, 0, most + 1)
        for step in range(1, most + 1):
            reached = F.max_pool3d(reached[:, None].float(), (1, 3, 3), 1, (0, 1, 1))[:, 0] > 0
            distance = torch.where(reached & (distance > most), step, distance)
        return distance.view(batch, -1)

    def on_latents(self, values: Tensor) -> Tensor:
        """A value a token [B, S] as one a latent [B, T, h, w], 0 in what lies beside the video."""
        values = values.view(-1, *self.grid)
        for dim, patch in enumerate(self.patch_size, start=1):
            values = values.repeat_interleave(patch, dim)
        _, frames, height, width = self.latents.shape
        values = values[:, : frames - self.beside, :height, :width]
        return F.pad(values, (0, 0, 0, 0, 0, self.beside)) if self.beside else values

    def with_beside(self, frames: int) -> "ProjectedMask":
        """The same, of latents that have so many frames at the end which are not the video's."""
        return replace(self, latents=F.pad(self.latents, (0, 0, 0, 0, 0, frames)), beside=frames)


def _any_pool(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Maximum over blocks of `size`, of bool [B, T, H, W]; incomplete blocks at the end count what they have."""
    if size == (1, 1, 1):
        return x
    return F.max_pool3d(x[:, None].float(), size, size, ceil_mode=True)[:, 0] > 0


def _patches(sizes: tuple[int, int, int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Number of patches along each axis; an incomplete one counts."""
    t, h, w = (-(-size // each) for size, each in zip(sizes, patch, strict=True))
    return t, h, w


def latent_mask(mask: Tensor, geometry: Geometry) -> Tensor:
    """Pixel mask bool [B, F, H, W] to latent mask [B, T, h, w]."""
    t, s = geometry.temporal_stride, geometry.spatial_stride
    if not geometry.causal:
        return _any_pool(mask, (t, s, s))
    first = _any_pool(mask[:, :1], (1, s, s))
    if mask.shape[1] == 1:
        return first
    return torch.cat([first, _any_pool(mask[:, 1:], (t, s, s))], dim=1)


def project_mask(mask: Tensor, geometry: Geometry) -> ProjectedMask:
    """Pixel mask bool [F, H, W] or [B, F, H, W] through all stages. Raises ValueError on another dtype or shape."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    if mask.ndim not in (3, 4) or 0 in mask.shape:
        raise ValueError(f"mask must be a non-empty [F, H, W] or [B, F, H, W], got {tuple(mask.shape)}")
    latents = latent_mask(mask if mask.ndim == 4 else mask[None], geometry)
    latents = torch.cat([latents[:, :1]] * geometry.lead(latents.shape[1]) + [latents], dim=1)
    return ProjectedMask(latents, tokens_of(latents, geometry.patch_size), geometry.patch_size)


def tokens_of(latents: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Project a latent mask bool [B, T, h, w] to tokens [B, S]: those with any such latent."""
    return _any_pool(latents, patch_size).flatten(1)


@dataclass(frozen=True)
class Region:
    """The tokens that a foreground-only step computes.

    computed: indices [N], the foreground's first, then the halo's; foreground: how many are the foreground's.
    """

    computed: Tensor
    foreground: int
