"""Seconds by arithmetic: the least that a step's work can take on an H200. Floors, not measurements.

attention, a layer   max(4 Nq N d / R, Nq N H / (132 16 f), bytes / B)
other matrices       2 Nq w / R              w: weights of a layer that every token meets
streaming            2 N_bg d L b / B_link   b: bytes an element; a step's arena
"""

from kvlock_fast.planning.model_size import ModelSize

MATRIX_RATE = 750e12
"""FLOP/s of bf16 matrix products: flash-attention 4 at D = 128 on an H200 (published); GEMMs reach 770 to 800."""
NARROW_RATE, NARROW_HEAD = 490e12, 64
"""FLOP/s of attention with heads of 64 or less, where exp takes as long as the products (FlashAttention 3, H100)."""
MULTIPROCESSORS, EXP_PER_CLOCK, CLOCK = 132, 16, 1.755e9
"""Figures of an H200: exponentials a clock of each, and Hz under load."""
COPY_BANDWIDTH = 4.3e12
"""Bytes/s that a copy inside the GPU's memory reaches, of 4.8e12."""
LINK_BANDWIDTH = 50e9
"""Bytes/s between pinned memory and the GPU by the copy engine: PCIe 5 x16, of 50 to 55 seen."""
DISK_BANDWIDTH = 3e9
"""Bytes/s read or written: assumed of an NVMe drive; measure yours."""

RATES = {
    "matrix_flops": MATRIX_RATE,
    "attention_flops_head_64": NARROW_RATE,
    "gpu_copy_bytes_per_second": COPY_BANDWIDTH,
    "link_bytes_per_second": LINK_BANDWIDTH,
    "disk_bytes_per_second": DISK_BANDWIDTH,
}


def attention_seconds(queries: int, tokens: int, heads: int, head_dim: int) -> float:
    """Seconds of one layer's self-attention: the slowest of products, exponentials and traffic in bf16.

    Args:
        queries: tokens that are computed.
        tokens: tokens that they see.
        heads: attention heads.
        head_dim: channels a head.
    """
    dim = heads * head_dim
    products = 4 * queries * tokens * dim / (NARROW_RATE if head_dim <= NARROW_HEAD else MATRIX_RATE)
    exponentials = queries * tokens * heads / (MULTIPROCESSORS * EXP_PER_CLOCK * CLOCK)
    traffic = 2 * (2 * queries + 2 * tokens) * dim / COPY_BANDWIDTH
    return max(products, exponentials, traffic)


def matrix_seconds(queries: int, model: ModelSize) -> float:
    """Seconds of one layer's projections and feed-forward, of so many tokens."""
    return 2 * queries * model.matrix_weights / MATRIX_RATE


def forward_seconds(model: ModelSize, tokens: int, queries: int | None = None) -> float:
    """Seconds of one forward of one sample. tokens: of video and text; queries: those computed, all if None."""
    queries = tokens if queries is None else queries
    attention = attention_seconds(queries, tokens, model.heads, model.head_dim)
    return model.layers * (attention + matrix_seconds(queries, model))


def lock_seconds(cache_bytes: int, rows: int) -> float:
    """Seconds that locking adds to a step: each row's prologue reads the step's cache once."""
    return rows * cache_bytes / COPY_BANDWIDTH


def transfer_seconds(tier: str, cache_bytes: int) -> float:
    """Seconds that a step's cache takes to or from the GPU; reading a disk and crossing the link overlap."""
    bandwidth = {"host": LINK_BANDWIDTH, "disk": min(LINK_BANDWIDTH, DISK_BANDWIDTH)}.get(tier)
    return cache_bytes / bandwidth if bandwidth else 0.0
