"""Paste an edit back into its source: outside the mask, and the feather around it, every pixel is the source's own."""

import numpy as np
import torch
import torch.nn.functional as F

from kvlock_fast.media import resize_video


def feathered(mask: np.ndarray, feather: int) -> np.ndarray:
    """bool [F, H, W] to weights [F, H, W] fp32: 1 on the mask, falling to 0 within `feather` pixels outside it."""
    grown = torch.from_numpy(np.ascontiguousarray(mask))[:, None].float()
    weight = grown.clone()
    for _ in range(feather):
        grown = F.max_pool2d(grown, 3, stride=1, padding=1)
        weight += grown
    return (weight[:, 0] / (feather + 1)).numpy()


def composite(source: np.ndarray, edited: np.ndarray, mask: np.ndarray, feather: int = 8) -> np.ndarray:
    """The edit, at the source's size, inside the mask and the source outside it.

    source: uint8 [F, H, W, 3]; edited: uint8 [F, h, w, 3], resized to the source; mask: bool [F, H, W]; feather: pixels
    over which the two are mixed, outside the mask. Returns uint8 [F, H, W, 3].
    """
    height, width = source.shape[1:3]
    result = np.empty_like(source)
    for start in range(0, len(source), 8):  # fp32 copies of a whole clip would be the largest thing in memory
        part = slice(start, start + 8)
        weight = feathered(mask[part], feather)[..., None]
        mixed = weight * resize_video(edited[part], height, width) + (1 - weight) * source[part]
        result[part] = np.rint(mixed).astype(np.uint8)
    return result
