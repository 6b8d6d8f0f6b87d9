"""Videos in and out of an autoencoder of diffusers, as all families need it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kvlock_fast.models.protocols import Autoencoder


def encode_mode(vae: Autoencoder, frames: Tensor, device: torch.device) -> Tensor:
    """uint8 [F, H, W, 3] to the posterior's mode [1, C, T, h, w] fp32, not normalised."""
    pixels = frames.permute(3, 0, 1, 2)[None].to(device=device, dtype=vae.dtype) / 127.5 - 1.0
    return vae.encode(pixels).latent_dist.mode().float().contiguous()


def encode_pictures(vae: Autoencoder, frames: Tensor, device: torch.device, at_once: int = 1) -> Tensor:
    """uint8 [F, H, W, 3] to the posterior's mode [1, C, F, h, w] fp32, not normalised, each frame on its own."""
    modes = []
    for some in frames.split(at_once):
        pixels = some.permute(0, 3, 1, 2).to(device=device, dtype=vae.dtype) / 127.5 - 1.0
        modes.append(vae.encode(pixels).latent_dist.mode().float())
    return torch.cat(modes).transpose(0, 1)[None].contiguous()


def decode_each(
    vae: Autoencoder, latents: Tensor, tiled: bool, at_once: int = 1, told: Mapping[str, Any] | None = None
) -> Tensor:
    """Latents [B, C, ...] as the autoencoder made them to uint8 [B, ..., 3] on the CPU.

    Args:
        vae: an autoencoder of videos [B, C, T, h, w], or of images [B, C, h, w].
        latents: not normalised.
        tiled: in tiles that are blended where they overlap, which takes less memory.
        at_once: how many of the batch are decoded together.
        told: more arguments for the decoder.
    """
    decoded = []
    with tiling(vae, tiled):
        for some in latents.to(vae.dtype).split(at_once):
            pixels = vae.decode(some, return_dict=False, **(told or {}))[0]
            decoded.append(((pixels.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8).cpu())
    return torch.cat(decoded).movedim(1, -1)


def picture(frame: Tensor) -> Image.Image:
    """A frame uint8 [H, W, 3] as a picture."""
    return Image.fromarray(frame.cpu().numpy())


@contextmanager
def tiling(vae: Autoencoder, tiled: bool = True) -> Iterator[None]:
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
