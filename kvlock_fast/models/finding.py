"""Which self-attentions a transformer has that nobody has described: found by what happens in forwards of a sample."""

import re

import torch
from torch import Tensor, nn

from kvlock_fast.errors import InputError
from kvlock_fast.models.arch import ArchSpec
from kvlock_fast.models.probe import (
    KEY_NORMS,
    KEYS,
    VALUES,
    Forward,
    Seen,
    other_latents,
    projecting,
    submodule,
    watch,
)


def refusal(transformer: nn.Module, reason: str) -> InputError:
    """Of a transformer that family "auto" does not lock."""
    return InputError(f"family 'auto' does not lock {type(transformer).__name__}: {reason}")


class Found:
    """What two silent forwards, of other latents, say: which projections are the video's self-attentions', and where
    its tokens are.

    arch: the description; plain: a forward as it is; calls: by number of the attention in a forward, its layer; places:
    the video's tokens in that attention's keys, first and end.
    """

    def __init__(self, transformer: nn.Module, forward: Forward, tokens: int, ahead: int):
        self.transformer, self.tokens, self.ahead = transformer, tokens, ahead
        self.parts = {
            name: tuple(
                filter(None, (submodule(module, KEY_NORMS), submodule(module, KEYS), submodule(module, VALUES)))
            )
            for name, module in projecting(transformer).items()
        }
        self.plain = watch(transformer, forward, self.parts)
        if not torch.equal(self.plain.result, watch(transformer, forward, {}).result):
            raise self.refusal("two of its forwards differ (is it in eval mode?)")
        one = watch(transformer, forward, self.parts, silent=True)
        with other_latents(transformer):
            other = watch(transformer, forward, self.parts, silent=True)
        if not one.calls:
            raise self.refusal(
                "no attention of its sample was torch's scaled_dot_product_attention, where a lock can be checked "
                "(other backends, softmax written out and linear attention cannot)"
            )
        if len(one.calls) != len(other.calls):
            raise self.refusal("what it computes changes with the latents")
        self.calls: dict[int, int] = {}
        self.places: dict[int, tuple[int, int]] = {}
        names = self._attentions(one, other)
        self.arch = self._describe(names, one, other)

    def refusal(self, reason: str) -> InputError:
        return refusal(self.transformer, reason)

    def _attentions(self, one: Seen, other: Seen) -> list[str]:
        """The names of the video's self-attentions, in the transformer's order."""
        number = {}
        for n, (call, same) in enumerate(zip(one.calls, other.calls, strict=True)):
            (query, key, _), owner = call, one.owners[n]
            if torch.equal(query, same[0]) or torch.equal(key, same[1]):
                continue  # of the text, or across: keys or queries that are not the video's
            if owner is None:
                raise self.refusal(
                    f"the keys of its attention no. {n}, of {key.shape[-2]} tokens, come from no projection of their "
                    "own (as where queries, keys and values are one projection)"
                )
            if owner in number:
                raise self.refusal(f"{owner} attends more than once in a forward")
            number[owner] = n
            self.places[n] = self._place(key, same[1], -2, f"an attention of {owner}")
            if self._place(call[2], same[2], -2, f"an attention of {owner}") != self.places[n]:
                raise self.refusal(f"the keys and values of {owner} have the video's tokens in different places")
        names = [name for name in self.parts if name in number]
        if not names:
            raise self.refusal("none of its attentions is one of the video's tokens to themselves")
        self.calls = {number[name]: layer for layer, name in enumerate(names)}
        return names

    def _place(self, x: Tensor, other: Tensor, dim: int, where: str) -> tuple[int, int]:
        """First and end of the tokens that change with the latents, which must be the video's, in one piece."""
        changed = (x != other).transpose(0, dim).flatten(1).any(1)
        first, count = int(changed.int().argmax()), int(changed.sum())
        if count != self.tokens or not changed[first : first + count].all():
            what = f"{count} tokens of the video" if count != self.tokens else "the video's tokens not in one piece"
            raise self.refusal(f"{where} has {what}, where the foreground has {self.tokens}")
        return first, first + count

    def _describe(self, names: list[str], one: Seen, other: Seen) -> ArchSpec:
        keys, values, dims, texts = [], [], set(), set()
        for name in names:
            *key_parts, value = self.parts[name]
            key = next(part for part in key_parts if (name, part) in one.outputs)
            dim, text = self._layout(name, key, one, other)
            keys, values = [*keys, key], [*values, value]
            dims.add(dim)
            texts.add(text)
            value_dim, value_text = self._layout(name, value, one, other)
            if value_dim != 1 or one.outputs[name, value][0].ndim != 3 or value_text != text:
                raise self.refusal(f"{name}.{value} does not give values [B, S, H*D] that lie as the keys do")
        texts.discard("none")
        if len(dims) > 1 or len(texts) > 1:
            raise self.refusal("its self-attentions lay their tokens out in different ways")
        order = tuple(part for part in (*KEY_NORMS, *KEYS) if part in keys)
        for name, key in zip(names, keys, strict=True):
            if submodule(self.transformer.get_submodule(name), order) != key:
                raise self.refusal(f"the norm of {name}'s keys takes no part in a forward")
        return ArchSpec(
            family="auto",
            transformers=(type(self.transformer).__name__,),
            attention="|".join(re.escape(name) for name in names),
            key=order,
            value=tuple(dict.fromkeys(values)),
            token_dim=dims.pop(),
            text=texts.pop() if texts else "none",
            ahead=self.ahead > 0,
        )

    def _layout(self, name: str, part: str, one: Seen, other: Seen) -> tuple[int, str]:
        """The dimension of a projection's output that holds the tokens, and where the text is among them."""
        outputs, others = one.outputs[name, part], other.outputs[name, part]
        if len(outputs) != 1:
            raise self.refusal(f"{name}.{part} runs {len(outputs)} times in a forward, not once")
        x, changed = outputs[0], outputs[0] != others[0]
        dims = [
            dim
            for dim in range(1, x.ndim - 1)
            if int(changed.transpose(0, dim).flatten(1).any(1).sum()) == self.tokens <= x.shape[dim]
        ]
        if len(dims) != 1:
            raise self.refusal(
                f"the output {list(x.shape)} of {name}.{part} has "
                f"{'no dimension' if not dims else 'more than one dimension'} of the video's {self.tokens} tokens"
            )
        first, end = self._place(x, others[0], dims[0], f"{name}.{part}")
        size = x.shape[dims[0]]
        if self.ahead and first != self.ahead:
            raise self.refusal(f"{name}.{part} has {first} tokens in front of the video's, and ahead is {self.ahead}")
        if not self.ahead and first > 0 and end < size:
            raise self.refusal(f"{name}.{part} has tokens of others on both sides of the video's: give ahead={first}")
        if self.ahead:
            return dims[0], "suffix" if end < size else "none"
        return dims[0], "none" if size == self.tokens else "prefix" if first else "suffix"
