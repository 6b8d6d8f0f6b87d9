"""The shift of a schedule by resolution, as several families of diffusers' pipelines give it to their scheduler."""

from typing import Any


def shift_of(scheduler: Any, tokens: int) -> float:
    """mu: a straight line through two lengths of sequence, by the scheduler's config, as diffusers' `calculate_shift`.

    Of the SD3 paper (arXiv 2403.03206), section 5.3.2.
    """
    config = scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return tokens * slope + (low - slope * few)
