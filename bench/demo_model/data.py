"""What the demo model is trained on: pixels as the autoencoder takes them, rendered clips, and the latents of clips.

The autoencoder trains on crops of a pool of clips, the transformer on a bank of encoded ones; both are kept in memory
and grow while it trains.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kvlock_fast.demo.scene import sample_scene
from kvlock_fast.demo.world import render

POOL = 3000


def to_model(video: np.ndarray) -> torch.Tensor:
    """uint8 [B, F, H, W, 3] to float32 [B, 3, F, H, W] in -1..1."""
    return torch.from_numpy(video).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_pixels(video: torch.Tensor) -> np.ndarray:
    """float [B, 3, F, H, W] in -1..1 to uint8 [B, F, H, W, 3]."""
    return ((video.float().permute(0, 2, 3, 4, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


@torch.no_grad()
def round_trip(vae: nn.Module, video: np.ndarray) -> np.ndarray:
    """uint8 [B, F, H, W, 3] through the autoencoder (posterior's mode) and back."""
    return to_pixels(vae.decode(vae.encode(to_model(video)).latent_dist.mode()).sample)


class ClipPool:
    """A rolling pool of rendered clips, uint8 [N, 17, 64, 64, 3], from which batches of crops are cut."""

    def __init__(self, seed: int, first: int = 300) -> None:
        self.rng = np.random.default_rng([seed, 77])
        self.next_seed = int(self.rng.integers(0, 2**30))
        self.clips: list[np.ndarray] = []
        self.add(first)

    def add(self, count: int) -> None:
        """Render `count` new clips; beyond the pool's size they replace the oldest."""
        for _ in range(count):
            # One clip in ten shows no object or two, so that the autoencoder does not expect exactly one.
            objects = int(self.rng.choice([0, 1, 2], p=[0.04, 0.9, 0.06]))
            clip = render(sample_scene(self.next_seed, objects=objects)).video
            self.next_seed += 1
            if len(self.clips) < POOL:
                self.clips.append(clip)
            else:
                self.clips[self.next_seed % POOL] = clip

    def batch(self, count: int, frames: int, side: int) -> torch.Tensor:
        """Random crops in random colour orders, float32 [count, 3, frames, side, side] in -1..1."""
        crops = []
        for index in self.rng.integers(0, len(self.clips), count):
            t, y, x = (int(self.rng.integers(0, n - k + 1)) for n, k in ((17, frames), (64, side), (64, side)))
            crop = self.clips[index][t : t + frames, y : y + side, x : x + side]
            if self.rng.random() < 0.25:
                crop = crop[..., self.rng.permutation(3)]
            crops.append(crop)
        return to_model(np.stack(crops))


class LatentBank:
    """Latents float16 [N, C, T, 8, 8], posterior's mode, un-normalised; object cover uint8 [N, T, 8, 8]; captions.

    `cover` says how much of each latent position's pixels an object covers at most, 0..255.
    """

    def __init__(self, vae: nn.Module, first_seed: int, frames: int = 17) -> None:
        self.vae, self.next_seed, self.frames = vae, first_seed, frames
        self.latents: list[torch.Tensor] = []
        self.cover: list[torch.Tensor] = []
        self.captions: list[str] = []

    def __len__(self) -> int:
        return len(self.captions)

    @torch.no_grad()
    def add(self, count: int) -> None:
        """Render and encode `count` clips; one in twenty shows no object."""
        seeds = range(self.next_seed, self.next_seed + count)
        self.next_seed += count
        clips = [render(sample_scene(seed, frames=self.frames, objects=int(seed % 20 != 0))) for seed in seeds]
        with torch.autocast("cpu", torch.bfloat16):
            moments = self.vae._encode(to_model(np.stack([clip.video for clip in clips])))
        self.latents += list(moments.chunk(2, dim=1)[0].to(torch.float16))
        self.cover += [latent_cover(clip.mask) for clip in clips]
        self.captions += [clip.caption for clip in clips]

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of every channel."""
        latents = torch.stack(self.latents[:4000]).float()
        return latents.mean((0, 2, 3, 4)).tolist(), latents.std((0, 2, 3, 4)).tolist()

    def batch(self, rng: np.random.Generator, count: int, times: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """The first `times` latent frames of random clips: latents [B, C, T, 8, 8], cover [B, T, 8, 8], captions."""
        picks = rng.integers(0, len(self), count)
        latents = torch.stack([self.latents[i][:, :times] for i in picks]).float()
        cover = torch.stack([self.cover[i][:times] for i in picks]).float() / 255
        return latents, cover, [self.captions[i] for i in picks]

    def save(self, path: Path) -> None:
        """Write the bank as one safetensors file."""
        tensors = {"latents": torch.stack(self.latents), "cover": torch.stack(self.cover)}
        meta = {"captions": json.dumps(self.captions), "next_seed": str(self.next_seed)}
        save_file(tensors, path, metadata=meta)

    def load(self, path: Path) -> None:
        """Read a bank written by `save`."""
        from safetensors import safe_open

        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            meta = file.metadata()
        self.latents, self.cover = list(tensors["latents"]), list(tensors["cover"])
        self.captions, self.next_seed = json.loads(meta["captions"]), int(meta["next_seed"])


def latent_cover(mask: np.ndarray) -> torch.Tensor:
    """bool [F, H, W] to uint8 [T, H/8, W/8]: the largest share of covered pixels among the frames under a latent."""
    frames, height, width = mask.shape
    share = mask.reshape(frames, height // 8, 8, width // 8, 8).mean((2, 4))
    groups = [share[:1].max(0)] + [share[i : i + 4].max(0) for i in range(1, frames, 4)]
    return torch.from_numpy((np.stack(groups) * 255).astype(np.uint8))
