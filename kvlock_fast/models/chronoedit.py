"""ChronoEdit: an edit of a picture as a short clip, from the picture to what became of it.

Facts of diffusers' `ChronoEditPipeline`: as Wan 2.1's image-to-video (wan_image.py), with a transformer class of its
own. A clip of 5 frames has two latent ones, the picture's and the edit's, at positions further apart. With temporal
reasoning there are more frames, the way from one to the other; then the last latent frame is encoded and decoded right
behind the first, and the others without it.

A single picture is given to the model as a clip of 5 frames, and the last of what comes is the edit.

The pipeline can drop the way in the middle of denoising (`num_temporal_reasoning_steps`); here it stays to the end.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kvlock_fast.masks import Geometry
from kvlock_fast.models.wan_image import WAN_IMAGE, WanImageModel

CHRONOEDIT = replace(WAN_IMAGE, family="chronoedit", transformers=("ChronoEditTransformer3DModel",))


class ChronoEditModel(WanImageModel):
    """A diffusers `ChronoEditPipeline`."""

    arch = CHRONOEDIT

    @property
    def geometry(self) -> Geometry:
        geometry = super().geometry
        return replace(geometry, least_frames=1 + geometry.temporal_stride)

    def encode_video(self, frames: Tensor) -> Tensor:
        """The last latent frame is encoded right behind the first one."""
        stride = self.geometry.temporal_stride
        if len(frames) == 1 + stride:
            return super().encode_video(frames)
        way, ends = frames[:-stride], torch.cat([frames[:1], frames[-stride:]])
        return torch.cat([super().encode_video(way), super().encode_video(ends)[:, :, 1:]], dim=2)

    def decode(self, latents: Tensor, frames: int, tiled: bool = False) -> Tensor:
        """The last latent frame is decoded right behind the first one."""
        if latents.shape[2] <= 2:
            return super().decode(latents, frames, tiled)
        stride = self.geometry.temporal_stride
        way = super().decode(latents[:, :, :-1], frames - stride, tiled)
        ends = super().decode(latents[:, :, [0, -1]], 1 + stride, tiled)
        return torch.cat([way, ends[:, 1:]], dim=1)

    def own_frames(self, video: Tensor, count: int) -> Tensor:
        """The first `count` of decoded frames [F, H, W, 3]; for a single picture the last, what became of it."""
        return video[-1:] if count == 1 else super().own_frames(video, count)
