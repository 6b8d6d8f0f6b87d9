"""The lock on a transformer that nobody has described: its self-attentions are found, and what was found is checked.

Found by what happens in forwards of a sample (probe.py), not by what modules are called. Checked before anything is
used: locking at the projections must equal blending where keys and values enter the attention, in every layer and at
the output, and locking by nothing must leave every bit as it is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvlock_fast.errors import InputError
from kvlock_fast.kernels.blend import blend_reference
from kvlock_fast.models.arch import ArchSpec, without_text
from kvlock_fast.models.finding import Found, refusal
from kvlock_fast.models.linear import refuse_linear
from kvlock_fast.models.locking import Mode, TransformerLock
from kvlock_fast.models.probe import Forward, Seen, first_tensor, submodule, watch
from kvlock_fast.models.wrapped import refuse_wrapped

Sample = Mapping[str, Any] | Callable[[], Any]
ALPHA = 0.7
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
HALF_TOLERANCE = 2e-2


def find_and_check(transformer: nn.Module, sample: Sample, tokens: int, ahead: int = 0) -> ArchSpec:
    """Where and how a transformer is locked, found and verified in eight forwards of a sample.

    sample: the arguments of a forward by name, or a function that makes one and returns the prediction; its latents,
    of `tokens` tokens, are the forward's first argument; ahead: tokens of others in front of the video's.

    Raises InputError with the reason where no lock is certain to do what it should; the transformer is left as it was
    either way.
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
        rows = max(len(x) for x in kept.values())
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
        return blend_reference(key, key_at_one, wide, key.ndim - 2), blend_reference(
            value, value_at_one, wide, value.ndim - 2
        )

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


def _references(lock: TransformerLock, plain: Seen, found: Found) -> dict[tuple[int, str], Tensor]:
    """Keys and values to lock to, as large as the model's own: their shapes are those of the projections' outputs."""
    generator, kept, arch = torch.Generator().manual_seed(1), {}, found.arch
    for layer, (name, attention) in enumerate(arch.attentions(lock.transformer)):
        for kind, names, dim in (("k", arch.key, arch.token_dim), ("v", arch.value, 1)):
            whole = plain.outputs[name, submodule(attention, names)][0]
            own = without_text(whole, dim, arch.text, found.tokens, found.ahead)
            kept[layer, kind] = torch.randn(own.shape, generator=generator).to(own) * own.std()
    return kept


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal by the rounding of a dtype, NaN never."""
    scale = max(1.0, float(b.float().abs().max()))
    return a.shape == b.shape and _difference(a, b) <= TOLERANCE.get(a.dtype, HALF_TOLERANCE) * scale
