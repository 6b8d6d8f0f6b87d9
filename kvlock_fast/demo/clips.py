"""Rendered clips to cut training batches from."""

from __future__ import annotations

import numpy as np
import torch

from kvlock_fast.demo.pixels import to_model
from kvlock_fast.demo.scene import sample_scene
from kvlock_fast.demo.world import render

POOL = 3000


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
