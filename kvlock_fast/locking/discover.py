"""The lock on a transformer that nobody has described: its self-attentions are found, and what was found is checked.

Found by what happens in forwards of a sample (probe.py), not by what modules are called. Checked before anything is
used: locking at the projections must equal blending where keys and values enter the attention, in every layer and at
the output, and locking by nothing must leave every bit as it is.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvlock_fast.errors import InputError
from kvlock_fast.kernels.blend import blend_reference
from kvlock_fast.locking.arch import ArchSpec, refuse_linear, without_text
from kvlock_fast.locking.compatibility import refuse_wrapped
from kvlock_fast.locking.lock import KeptKV, Mode, TransformerLock
from kvlock_fast.locking.probe import (
    KEY_NORMS,
    KEYS,
    VALUES,
    Forward,
    Seen,
    first_tensor,
    other_latents,
    projecting,
    submodule,
    watch,
)


def refusal(transformer: nn.Module, reason: str) -> InputError:
    """The error for a transformer that family "auto" does not lock."""
    return InputError(f"family 'auto' does not lock {type(transformer).__name__}: {reason}")


class Found:
    """The video's self-attentions, their projections and the places of its tokens, found by two silent forwards.

    arch: the description; plain: a forward as it is; calls: layer by the attention's number in a forward; places: first
    and end of the video's tokens in that attention's keys.
    """

    def __init__(self, transformer: nn.Module, forward: Forward, tokens: int, ahead: int):
        self.transformer, self.tokens, self.ahead = transformer, tokens, ahead
        self.parts = {
            name: tuple(part for names in (KEY_NORMS, KEYS, VALUES) if (part := submodule(module, names)))
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


Sample = Mapping[str, Any] | Callable[[], Any]
ALPHA = 0.7
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
HALF_TOLERANCE = 2e-2


def find_and_check(transformer: nn.Module, sample: Sample, tokens: int, ahead: int = 0) -> ArchSpec:
    """Find where and how a transformer is locked, and verify it, in eight forwards of a sample.

    Args:
        transformer: the model; it is left as it was.
        sample: the arguments of a forward by name, or a function that makes one and returns the prediction. Its latents
            are the forward's first argument.
        tokens: number of the latents' tokens.
        ahead: number of tokens of other frames in front of the video's.

    Raises InputError with the reason where no lock is certain to do what it should.
    """
    refuse_wrapped(transformer)
    refuse_linear(transformer)
    if not (callable(sample) or isinstance(sample, Mapping)):
        raise InputError(f"sample must be a forward's arguments by name, or a function, got {type(sample).__name__}")

    def forward() -> Tensor:
        return first_tensor(sample() if callable(sample) else transformer(**sample))

    try:
        found = Found(transformer, forward, tokens, ahead)
        _check(transformer, forward, found)
    except InputError:
        raise
    except Exception as error:  # whatever a model does with tensors that it was not made for
        raise refusal(transformer, f"its sample failed ({type(error).__name__}: {_line(error)})") from error
    return found.arch


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _check(transformer: nn.Module, forward: Forward, found: Found) -> None:
    """Raise InputError unless the lock that was found does what blending at the attention does."""
    arch, tokens, plain = found.arch, found.tokens, found.plain
    lock = TransformerLock(transformer, arch)
    try:
        kept = _references(lock, plain, found)
        rows = max(x.shape[0] for x in kept.values())
        weight = torch.full((rows, tokens), ALPHA, device=plain.result.device)
        weight[:, ::3] = 0

        def locked(weight: Tensor) -> Seen:
            with lock.forward(Mode.STORED, weight, kept, tokens, ahead=found.ahead):
                return watch(transformer, forward, {}, keep=False)

        at_one, blended, off = locked(torch.ones_like(weight)), locked(weight), locked(torch.zeros_like(weight))
    except RuntimeError as error:
        raise found.refusal(_line(error)) from error
    finally:
        lock.detach()
    if not torch.equal(off.result, plain.result):
        raise found.refusal("a lock by nothing changes its prediction")

    def at_call(n: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if n not in found.calls:
            return key, value
        first, end = found.places[n]
        _, key_at_one, value_at_one = at_one.calls[n]
        wide = weight.new_zeros(len(weight), key.shape[-2])
        wide[:, first:end] = weight
        key = blend_reference(key, key_at_one, wide, key.ndim - 2)
        return key, blend_reference(value, value_at_one, wide, value.ndim - 2)

    expected = watch(transformer, forward, {}, keep=False, at_call=at_call)
    names = [name for name, _ in arch.attentions(transformer)]
    for n, layer in sorted(found.calls.items()):
        for what, mine, theirs in zip(("keys", "values"), blended.calls[n][1:], expected.calls[n][1:], strict=True):
            if not _close(mine, theirs):
                raise found.refusal(
                    f"locking the {what} of {names[layer]} where they are projected is not blending them where they "
                    f"enter the attention (they differ by {_difference(mine, theirs):.2g})"
                )
    error, effect = _difference(blended.result, expected.result), _difference(blended.result, plain.result)
    if not _close(blended.result, expected.result):
        raise found.refusal(f"its prediction under the lock differs by {error:.2g} from that of blended attention")
    if effect <= 3 * error:
        raise found.refusal(f"locking its sample changes the prediction by no more than {effect:.2g}: nothing to check")


def _references(lock: TransformerLock, plain: Seen, found: Found) -> KeptKV:
    """Keys and values to lock to, as large as the model's own: their shapes are those of the projections' outputs."""
    generator, arch = torch.Generator().manual_seed(1), found.arch
    kept: KeptKV = {}
    for layer, (name, attention) in enumerate(arch.attentions(lock.transformer)):
        for kind, names, dim in (("k", arch.key, arch.token_dim), ("v", arch.value, 1)):
            whole = plain.outputs[name, submodule(attention, names) or ""][0]
            own = without_text(whole, dim, arch.text, found.tokens, found.ahead)
            kept[layer, kind] = torch.randn(own.shape, generator=generator).to(own) * own.std()
    return kept


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal by the rounding of a dtype, NaN never."""
    scale = max(1.0, float(b.float().abs().max()))
    return a.shape == b.shape and _difference(a, b) <= TOLERANCE.get(a.dtype, HALF_TOLERANCE) * scale
