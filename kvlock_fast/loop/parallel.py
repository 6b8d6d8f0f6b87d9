"""Edits whose tokens several processes share (context parallelism): what they can ask for, and what would go wrong.

Every process runs the same edit on the same inputs. Nothing may be decided by what one of them alone knows: noise that
it draws unseeded, room in its memory, a file that holds its part of the tokens.
"""

import torch
from torch import Tensor

from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.locking.compatibility import refuse_caches, refuse_wrapped
from kvlock_fast.locking.lock import kv_sizes
from kvlock_fast.locking.parallel import Shard, shard_of, splits_text_mask, ulysses_heads
from kvlock_fast.locking.parallel import share_video as share_video
from kvlock_fast.loop.windows import Windows, stretches
from kvlock_fast.masks import Geometry, ProjectedMask
from kvlock_fast.models.base import PipelineModel

CAPTURED = "the transformer runs in context parallelism"
"""Why steps are not captured."""


def check_transformers(
    model: PipelineModel, lock: LockConfig, cache: CacheConfig, noise: tuple[Tensor | None, torch.Generator | None]
) -> Shard | None:
    """This process's part of the tokens, None where it has all.

    Raises InputError where an edit does not go with what was done to the transformers; noise: the latents or the
    generator that it starts from.
    """
    for transformer in model.transformers:
        if lock.locks:
            refuse_wrapped(transformer)
        refuse_caches(transformer.modules())
    shards = {shard_of(transformer) for transformer in model.transformers}
    if len(shards) > 1:
        raise InputError("one of the model's transformers runs in context parallelism and the other does not")
    shard = shards.pop()
    if shard is not None:
        _check_parallel(model, lock, cache, noise)
    return shard


def _check_parallel(
    model: PipelineModel, lock: LockConfig, cache: CacheConfig, noise: tuple[Tensor | None, torch.Generator | None]
) -> None:
    if lock.compute == "foreground":
        raise InputError("compute 'foreground' does not go with context parallelism, which splits the whole sequence")
    if cache.path is not None or cache.tier == "disk":
        asked = f"path {str(cache.path)!r}" if cache.path is not None else "tier 'disk'"
        raise InputError(
            f"cache {asked} does not go with context parallelism, where each process has a part of the tokens: "
            "take the tier lockstep, resident or host"
        )
    if all(x is None for x in noise):
        raise InputError(
            "context parallelism needs the same noise in every process: give a generator of one seed, or latents"
        )
    for transformer in model.transformers:
        if splits_text_mask(transformer):
            raise InputError(
                "context parallelism splits the text's mask, which diffusers' attention cannot follow: call "
                "kvlock_fast.loop.parallel.share_video(transformer, config) in the place of enable_parallelism()"
            )
        heads, multiple = kv_sizes(transformer, model.arch)[0], ulysses_heads(transformer)
        if heads % multiple:
            raise InputError(f"the transformer's {heads} heads cannot be shared by ulysses_degree {multiple}")


def check_tokens(shard: Shard | None, mask: ProjectedMask, windows: Windows | None, geometry: Geometry) -> None:
    """Raise InputError where processes cannot share the tokens of the clip, or of its stretches, as diffusers does."""
    if shard is None:
        return
    for stretch in stretches(mask, windows, geometry):
        tokens = stretch.mask.tokens.shape[1]
        if not shard.divides(tokens):
            size = (
                -(-n // patch) for n, patch in zip(stretch.mask.latents.shape[1:], geometry.patch_size, strict=True)
            )
            raise InputError(
                f"the video has {tokens} tokens ({'x'.join(map(str, size))}), which {shard.count} processes cannot "
                "share: take another size or number of frames, or ulysses_anything or ring_anything in the "
                "ContextParallelConfig"
            )
