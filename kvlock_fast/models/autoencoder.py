"""Videos in and out of an autoencoder of diffusers, as all families need it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def encode_mode(vae: Any, frames: Tensor, device: torch.device) -> Tensor:
    """uint8 [F, H, W, 3] to the posterior's mode [1, C, T, h, w] fp32, not normalised."""
    pixels = frames.permute(3, 0, 1, 2)[None].to(device=device, dtype=vae.dtype) / 127.5 - 1.0
    return vae.encode(pixels).latent_dist.mode().float().contiguous()


def encode_pictures(vae: Any, frames: Tensor, device: torch.device, at_once: int) -> Tensor:
    """uint8 [F, H, W, 3] to the posterior's mode [1, C, F, h, w] fp32, not normalised, each frame on its own."""
    modes = []
    for some in frames.split(at_once):
        pixels = some.permute(0, 3, 1, 2).to(device=device, dtype=vae.dtype) / 127.5 - 1.0
        modes.append(vae.encode(pixels).latent_dist.mode().float())
    return torch.cat(modes).transpose(0, 1)[None].contiguous()


def decode_each(vae: Any, latents: Tensor, tiled: bool, **told: Any) -> Tensor:
    """Latents [B, C, T, h, w] as the autoencoder made them to uint8 [B, F, H, W, 3] on the CPU, a video at a time.

    tiled: in tiles that are blended where they overlap, which takes less memory; told: more for the decoder.
    """
    videos = []
    with tiling(vae, tiled):
        for one in latents.to(vae.dtype).split(1):
            videos.append(as_pixels(vae.decode(one, return_dict=False, **told)[0]))
    return torch.cat(videos).permute(0, 2, 3, 4, 1)


def as_pixels(decoded: Tensor) -> Tensor:
    """What an autoencoder decodes, from -1 to 1, to uint8 on the CPU."""
    return ((decoded.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8).cpu()


def encode_image(vae: Any, frames: Tensor, device: torch.device) -> Tensor:
    """uint8 [1, H, W, 3] to the posterior's mode [1, C, h, w] fp32, not normalised, of an autoencoder of images."""
    pixels = frames.permute(0, 3, 1, 2).to(device=device, dtype=vae.dtype) / 127.5 - 1.0
    return vae.encode(pixels).latent_dist.mode().float()


def decode_images(vae: Any, latents: Tensor, tiled: bool) -> Tensor:
    """Latents [B, C, h, w] as the autoencoder made them to uint8 [B, H, W, 3] on the CPU; tiled: as `decode_each`."""
    images = []
    with tiling(vae, tiled):
        for one in latents.to(vae.dtype).split(1):
            images.append(as_pixels(vae.decode(one, return_dict=False)[0]))
    return torch.cat(images).permute(0, 2, 3, 1)


@contextmanager
def tiling(vae: Any, tiled: bool = True) -> Iterator[None]:
    """The autoencoder in tiles, if they are wanted, and as it was afterwards."""
    # Some (EasyAnimate's) go frame by frame too, from then on.
    switches = ("use_tiling", "use_framewise_encoding", "use_framewise_decoding")
    before = {name: getattr(vae, name) for name in switches if hasattr(vae, name)}
    if tiled:
        vae.enable_tiling()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
