"""The prologue's arguments, and its reference in plain torch. See prologue.py for the formula."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlock_fast.kernels.language import require_package_name
from kvlock_fast.kernels.quantize import PER_FP8, QuantizedKV, block_scales, quantize_kv_reference, scale_of

require_package_name(__name__)

NORMS = ("none", "rms", "layer", "rms_across_heads")
LAYOUTS = ("interleaved", "split_half")
STAGES = ("raw", "normed", "rotated")
OUTPUTS = ("native", "fp8")
FP8_BLOCK = 128  # tokens that share an fp8 scale
FP8_ALIGN = 16  # the transposed values' rows are padded to a multiple of it


@dataclass(frozen=True)
class QKNorm:
    """Norm of queries and keys.

    kind: "rms_across_heads" (over all H*D channels; weights [H*D]), "rms" or "layer" (per head; weights [D], biases [D]
    with "layer" only), "none". A weight that is None counts as 1, a bias that is None as 0.
    """

    kind: str = "none"
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    eps: float = 1e-6


@dataclass(frozen=True)
class RoPE:
    """Rotary embedding: cos, sin [S, 1 or H, D/2] fp32, a row for every token of the output keys.

    layout: "interleaved" rotates channels (2i, 2i+1) together, "split_half" channels (i, i + D/2).
    """

    cos: Tensor
    sin: Tensor
    layout: str = "interleaved"


@dataclass(frozen=True)
class Lock:
    """Lock of the background's keys and values to the source's.

    alpha: weight of the source, a number in [0, 1] or fp32 on the device (range unchecked): [B - first_row], or one for
    every token, [B - first_row or 1, S], which counts on the background only.
    k, v: the source's background tokens, [B or 1, R, H, D], [B or 1, R, H*D] or QuantizedKV; None for both: the source
    rides along as row 0 of the batch (then stage is "raw" and first_row is 1).
    stage: what was done to `k` already: "raw" nothing, "normed" the norm, "rotated" norm and RoPE.
    first_row: samples before it are not blended.
    """

    alpha: Tensor | float
    k: Tensor | QuantizedKV | None = None
    v: Tensor | QuantizedKV | None = None
    stage: str = "rotated"
    first_row: int = 0


@dataclass(frozen=True)
class Capture:
    """Keep the new background K/V of the batch's row 0, before any blend, in a format of `quantize_kv`.

    stage: "normed" or "rotated" keys. int4 is quantised from native by two more launches.
    """

    format: str = "fp8_e4m3"
    stage: str = "rotated"


@dataclass(frozen=True)
class Places:
    """Places of the background among tokens in any order.

    rows: int32 [S], which row of the source's keys and values (or of what is captured) a token is, negative for none;
    count: how many rows there are. Each is one token's.
    """

    rows: Tensor
    count: int


@dataclass(frozen=True)
class PrologueOutput:
    """q, k, v [B, S, H, D] in the inputs' dtype; or e4m3 codes with fp32 scales [B, H, ceil(S / 128)].

    With codes, v is [B, H, D, S rounded up to 16], 0 beyond S. captured_k, captured_v: what `Capture` asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    captured_k: QuantizedKV | None = None
    captured_v: QuantizedKV | None = None


def normalised(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x [B, S, H, D] normalised, in x's dtype."""
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    if kind == "none":
        return x
    if kind == "layer":
        return F.layer_norm(x, x.shape[3:], weight, bias, eps)
    rows = x.flatten(2) if kind == "rms_across_heads" else x
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    return (rows if weight is None else rows * weight).view_as(x)


def rotated(x: Tensor, rope: RoPE | None) -> Tensor:
    """x [B, S, H, D] rotated by the first S rows of cos and sin."""
    if rope is None:
        return x
    cos, sin = (t[: x.shape[1]].to(x.dtype) for t in (rope.cos, rope.sin))
    if rope.layout == "interleaved":
        return rotated_pairs(x, cos, sin)
    paired = torch.stack(x.chunk(2, 3), 4).flatten(3)
    return rotated_pairs(paired, cos, sin).unflatten(3, (-1, 2)).transpose(3, 4).flatten(3)


def rotated_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D] whose neighbouring channels (2i, 2i + 1) are rotated together; cos, sin broadcast to [..., D / 2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def blended(x: Tensor, ref: Tensor, weight: Tensor, foreground: int, rows: Tensor | None) -> Tensor:
    """x [B, S or foreground, H, D] whose background is blended with ref by weight [B] or [B, S]: [B, S, H, D]."""
    ref = ref.to(x.dtype).expand(x.shape[0], -1, -1, -1)
    if rows is not None:
        weight = torch.where(rows >= 0, weight if weight.ndim == 2 else weight[:, None], 0.0)
        ref = ref.index_select(1, rows.clamp_min(0)) if ref.shape[1] else torch.zeros_like(x)
    w = (weight[:, foreground:] if weight.ndim == 2 else weight[:, None]).to(x.dtype)[..., None, None]
    new = x[:, foreground:] if x.shape[1] > foreground else torch.zeros_like(ref)
    mixed = torch.where(w == 0, new, torch.where(w == 1, ref, torch.lerp(new, ref, w)))
    return torch.cat((x[:, :foreground], mixed), 1)


def prologue_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    norm: QKNorm,
    rope: RoPE | None,
    foreground: int,
    lock: Lock | None,
    output: str,
    capture: Capture | None,
    places: Places | None = None,
) -> list[Tensor]:
    """q, k, v; their scales if output is "fp8"; then codes and scale of captured k and v. Lock holds plain tensors."""
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    rows = None if places is None else places.rows
    q, k, v = (x.to(wide).unflatten(2, (heads, -1)) for x in (q, k, v))
    q = rotated(normalised(q, norm.kind, norm.q_weight, norm.q_bias, norm.eps), rope)
    by_k = norm.kind, norm.k_weight, norm.k_bias, norm.eps
    k = normalised(k, *by_k)
    new_k, new_v = rotated(k, rope) if capture is not None and capture.stage == "rotated" else k, v

    if lock is None:
        k = rotated(k, rope)
    else:
        assert isinstance(lock.k, Tensor) and isinstance(lock.v, Tensor)
        weight = _weights(lock, k, foreground)
        k_ref = lock.k.to(wide)
        k_ref = normalised(k_ref, *by_k) if lock.stage == "raw" else k_ref
        if lock.stage == "rotated":
            k = blended(rotated(k, rope), k_ref, weight, foreground, rows)
        else:
            k = rotated(blended(k, k_ref, weight, foreground, rows), rope)
        v = blended(v, lock.v, weight, foreground, rows)

    if output == "fp8":
        outputs = _fp8_outputs(q, k, v, norm)
    else:  # with memory of their own: an operator may not return a view of its input
        outputs = [x.to(dtype).clone(memory_format=torch.contiguous_format) for x in (q, k, v)]
    if capture is None:
        return outputs
    for x, kind in ((new_k, "k"), (new_v, "v")):
        x = x[:1, foreground:] if places is None else _in_rows(x[:1], places)
        outputs += quantize_kv_reference(x.to(dtype) if capture.format == "native" else x, capture.format, kind)
    return outputs


def _weights(lock: Lock, k: Tensor, foreground: int) -> Tensor:
    """The source's weight for each sample of k, [B] or [B, S]: 0 before the lock's first row, 1 without background."""
    if k.shape[1] == foreground:
        return k.new_ones(k.shape[0])
    count = k.shape[0] - lock.first_row
    alpha = lock.alpha if isinstance(lock.alpha, Tensor) else k.new_full((count,), lock.alpha)
    if alpha.ndim == 1:
        return F.pad(alpha, (lock.first_row, 0))
    return F.pad(alpha.expand(count, -1), (0, 0, lock.first_row, 0))


def _in_rows(x: Tensor, places: Places) -> Tensor:
    """The background's tokens of x [B, S, H, D] where their rows are: [B, count, H, D]."""
    spare = places.count
    into = torch.where(places.rows < 0, spare, places.rows).long()
    out = x.new_zeros(x.shape[0], spare + 1, *x.shape[2:])
    return out.index_copy(1, into, x)[:, :spare]


def _fp8_outputs(q: Tensor, k: Tensor, v: Tensor, norm: QKNorm) -> list[Tensor]:
    scales = _scales(q, norm, norm.q_weight, norm.q_bias), _scales(k, norm, norm.k_weight, norm.k_bias)
    codes = [_fp8_codes(x, scale) for x, scale in zip((q, k), scales, strict=True)]
    v_scale = _block_scales(v)
    v_codes = _fp8_codes(v, v_scale).permute(0, 2, 3, 1).contiguous()  # also where nothing is padded
    padded = F.pad(v_codes.view(torch.uint8), (0, -v.shape[1] % FP8_ALIGN)).view(torch.float8_e4m3fn)
    return [*codes, padded, *scales, v_scale]


def _scales(x: Tensor, norm: QKNorm, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """fp8 scales [B, H, ceil(S / 128)]: by the weights' bound on what the norm can give, else by the block's amax."""
    batch, tokens, heads, dim = x.shape
    if norm.kind == "none":
        return _block_scales(x)
    width = heads * dim if norm.kind == "rms_across_heads" else dim
    weight = torch.ones(dim, device=x.device) if weight is None else weight
    bound = weight.float().abs().view(-1, dim).amax(1) * math.sqrt(width)
    if bias is not None:
        bound = bound + bias.float().abs().amax() * math.sqrt(2)
    return scale_of(bound, PER_FP8)[:, None].expand(batch, heads, -(-tokens // FP8_BLOCK)).contiguous()


def _block_scales(x: Tensor) -> Tensor:
    batch, tokens, heads, _ = x.shape
    if x.numel() == 0:
        return x.new_empty((batch, heads, -(-tokens // FP8_BLOCK)), dtype=torch.float32)
    return block_scales(x.float(), PER_FP8, FP8_BLOCK)[..., 0].transpose(1, 2).contiguous()


def _fp8_codes(x: Tensor, scale: Tensor) -> Tensor:
    by_token = (1 / scale).repeat_interleave(FP8_BLOCK, 2)[..., : x.shape[1]].transpose(1, 2)[..., None]
    return (x.float() * by_token).clamp(-448, 448).to(torch.float8_e4m3fn)
