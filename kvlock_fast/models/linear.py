"""Linear attention, which cannot be locked token by token."""

import re

from torch import nn

from kvlock_fast.errors import InputError

_LINEAR = re.compile(r"Linear(Attn|Attention)|GDN|DeltaNet")
"""In the names of attentions' classes and of their processors': diffusers' Sana, SanaVideo and SanaWM."""


def refuse_linear(transformer: nn.Module) -> None:
    """Raise InputError for a model with linear attention.

    There keys pass through a nonlinearity behind their norm, and are summed with the values of all tokens into one
    matrix before a query meets them: keys blended at their norm are not what enters the sum, and no query attends to
    single tokens, so that the source's could take the place of the model's own.
    """
    for name, module in transformer.named_modules():
        for part in (module, getattr(module, "processor", None)):
            if _LINEAR.search(type(part).__name__):
                raise InputError(
                    f"{type(transformer).__name__} cannot be locked: {name} is linear attention "
                    f"({type(part).__name__}), where the keys and values of all tokens are summed into one matrix "
                    "before a query meets them, so that no token's can be the source's"
                )
