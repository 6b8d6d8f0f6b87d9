"""torch.compile of a transformer's repeated blocks ("regional"): one block is compiled, and serves all of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from kvlock_fast.errors import InputError

COMPILE = ("off", "regional")


@contextmanager
def compiled_blocks(transformers: Sequence[nn.Module], wish: str, names: tuple[str, ...] = ()) -> Iterator[None]:
    """The blocks compiled while the context is open, by a wish of `COMPILE`; what was compiled before stays so.

    names: of the blocks' classes, where diffusers does not say. What torch has compiled it keeps: opening the context
    again costs nothing. Raises InputError for a model that does not name its repeated blocks, and where they cannot be
    compiled.
    """
    if wish == "off":
        yield
        return
    ours: list[nn.Module] = []
    try:
        for block in (block for transformer in transformers for block in repeated_blocks(transformer, names)):
            if block._compiled_call_impl is None:
                block.compile()
                ours.append(block)
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"compile is 'regional', but the model's blocks cannot be compiled: {first}") from error
    finally:
        for block in ours:
            block._compiled_call_impl = None


def repeated_blocks(transformer: nn.Module, names: tuple[str, ...] = ()) -> list[nn.Module]:
    """The blocks that are alike, as diffusers says or, where it does not, by the names of their classes."""
    names = set(getattr(transformer, "_repeated_blocks", None) or names)
    blocks = [module for module in transformer.modules() if type(module).__name__ in names]
    if not blocks:
        raise InputError(
            f"compile is 'regional', but {type(transformer).__name__} does not say which of its blocks are alike"
        )
    return blocks
