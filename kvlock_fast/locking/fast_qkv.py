"""A locked self-attention's queries, keys and values from its projections, in one pass, for the fast processors.

Norms, rotation, blending and keeping are the prologue's (kernels/prologue.py). Tokens stay in the model's order: each
has a weight of its own, 0 where it is foreground or text, and a row in what is kept, if it is of the background.
Compiled code sees one operator, which knows nothing but the number of a locked module, as on the generic path.
"""

import torch
from torch import Tensor, nn

from kvlock_fast.kernels.prologue import Capture, Lock, Places, QKNorm, RoPE, prologue
from kvlock_fast.kernels.quantize import QuantizedKV, quantize_kv
from kvlock_fast.locking.arch import Attention, around_video
from kvlock_fast.locking.qk_norms import qk_norm
from kvlock_fast.locking.registry import locked_entry, number_of
from kvlock_fast.locking.state import LockState, Mode, Projections, Rotation, repeated
from kvlock_fast.nvtx import span

K_STAGE = "normed"
"""Keys are kept after their norm and before their rotation, as by the generic path."""


class Prologue:
    """The prologue of one forward. The first layer that needs what layers have in common makes it."""

    def __init__(self, state: LockState, norms: dict[int, tuple[nn.Module | None, nn.Module | None]]):
        """norms: of queries and keys, by layer."""
        self.state, self.norms = state, norms
        self._ropes: dict[tuple[int, int], tuple[Tensor, RoPE]] = {}
        self._weights: dict[tuple[int, int], Tensor] = {}
        self._places: dict[int, Places] = {}

    def __call__(
        self, layer: int, token_dim: int, qkv: Projections, rotation: Rotation | None, heads: int
    ) -> Projections:
        """Turn projections [B, n, H*D] into q, k, v [B, n, H, D].

        Args:
            layer: the layer's number.
            token_dim: dimension of keys kept as tensors that holds the tokens.
            qkv: queries, keys and values as projected.
            rotation: cosine and sine as the model has them.
            heads: H.
        """
        state, (q, k, v) = self.state, qkv
        state.fired.update([(layer, "k"), (layer, "v")])
        tokens = k.shape[1]
        norm = qk_norm(*self.norms[layer], heads, q)
        rope = None if rotation is None else self._rope(*rotation, tokens, heads)
        if state.mode is Mode.CAPTURE:
            return self._captured(layer, token_dim, qkv, norm, rope, heads)
        if state.mode is Mode.IN_BATCH:
            lock, foreground, places = Lock(self._weight(tokens, len(k) - 1)), 0, None
        else:
            lock = Lock(self._weight(tokens, len(k)), *state.references(layer, token_dim, heads), stage=K_STAGE)
            foreground, places = None, self._placed(k)
        out = prologue(q, k, v, heads, norm=norm, rope=rope, lock=lock, foreground=foreground, places=places)
        return out.q, out.k, out.v

    def _captured(
        self, layer: int, token_dim: int, qkv: Projections, norm: QKNorm, rope: RoPE | None, heads: int
    ) -> Projections:
        """q, k, v; the background's K and V packed into their places, or kept in the state's format, or as tensors."""
        state, places, rows = self.state, self._placed(qkv[1]), len(qkv[1])
        room = (state.kept.get((layer, kind)) for kind in "kv")
        k_place, v_place = (x if isinstance(x, QuantizedKV) else None for x in room)
        format, per_scale = state.format or "native", 1
        if k_place is not None:
            format, per_scale = k_place.format, k_place.tokens_per_scale
        # The kernel packs with a scale a token, and the first sample only.
        fused = rows == 1 and per_scale == 1
        capture = Capture(format if fused else "native", K_STAGE)
        outs = [
            prologue(q[None], k[None], v[None], heads, norm=norm, rope=rope, places=places, capture=capture)
            for q, k, v in zip(*qkv, strict=True)
        ]
        for kind, place in (("k", k_place), ("v", v_place)):
            packed = [getattr(out, f"captured_{kind}") for out in outs]
            if not fused:
                whole = torch.cat([x.codes for x in packed])
                packed = [quantize_kv(whole, format, kind, tokens_per_scale=per_scale)]
            if place is not None:
                place.copy_(packed[0])
            elif state.format is not None:
                state.kept[layer, kind] = packed[0]
            elif kind == "v" or norm.kind in ("none", "rms_across_heads"):
                state.kept[layer, kind] = packed[0].codes.flatten(2)
            else:
                state.kept[layer, kind] = packed[0].codes.movedim(1, token_dim)
        if rows == 1:
            return outs[0].q, outs[0].k, outs[0].v
        return (
            torch.cat([out.q for out in outs]),
            torch.cat([out.k for out in outs]),
            torch.cat([out.v for out in outs]),
        )

    def _offset(self, tokens: int) -> tuple[int, int]:
        """Number of tokens in front of the video's and behind them, of `tokens`."""
        state = self.state
        if state.tokens is None or (state.tokens == tokens and not state.ahead):
            return 0, 0
        return around_video(tokens, state.text, state.tokens, state.ahead)

    def _weight(self, tokens: int, rows: int) -> Tensor:
        """The source's weight for every token [rows, n]."""
        key = tokens, rows
        if key not in self._weights:
            weight = repeated(self.state.weight, rows)
            self._weights[key] = nn.functional.pad(weight, self._offset(tokens)).contiguous()
        return self._weights[key]

    def _placed(self, k: Tensor) -> Places:
        """Places of the background among k's tokens."""
        tokens = k.shape[1]
        if tokens not in self._places:
            before, after = self._offset(tokens)
            background = self.state.background
            if background is None:
                background = torch.arange(tokens - before - after, device=k.device)
            rows = torch.full((tokens,), -1, dtype=torch.int32, device=k.device)
            numbers = torch.arange(len(background), dtype=torch.int32, device=k.device)
            self._places[tokens] = Places(rows.index_copy_(0, background + before, numbers), len(background))
        return self._places[tokens]

    def _rope(self, cos: Tensor, sin: Tensor, tokens: int, heads: int) -> RoPE:
        # By the tensor itself, which is held here: its number cannot become another's.
        key = id(cos), tokens
        if key not in self._ropes:
            angles = cos[..., 0::2], sin[..., 1::2]
            words = tokens - _length(cos)  # which are not rotated
            before, after = (words, 0) if self.state.text == "prefix" else (0, words)
            cosine, sine = (
                nn.functional.pad(_by_token(x, heads), (0, 0, 0, 0, before, after), value=still)
                for x, still in zip(angles, (1.0, 0.0), strict=True)
            )
            self._ropes[key] = cos, RoPE(cosine.contiguous(), sine.contiguous())
        return self._ropes[key][1]


def _length(x: Tensor) -> int:
    return x.shape[0] if x.ndim == 2 else x.shape[1]


def _by_token(x: Tensor, heads: int) -> Tensor:
    """Angles [n, D/2], [1, n, 1, D/2] or, where heads have their own, [B, n, H*D/2], as [n, 1 or H, D/2] fp32.

    Those of a batch are the same in every sample: its samples are edits of one video.
    """
    if x.ndim == 2:
        return x[:, None].float()
    return (x[0] if x.ndim == 4 else x[0].unflatten(1, (heads, -1))).float()


def _locked_qkv(qkv: Projections, rotation: Rotation | None, heads: int, number: int) -> Projections:
    entry = locked_entry(number)
    if entry.state.prologue is None:
        raise RuntimeError("a fast processor ran outside of a forward of its lock")
    with span("prologue"):
        return entry.state.prologue(entry.key[0], entry.token_dim, qkv, rotation, heads)


@torch.library.custom_op("kvlock_fast::locked_qkv", mutates_args=())
def _locked_qkv_op(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, number: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _locked_qkv((q, k, v), None if cos is None or sin is None else (cos, sin), heads, int(number))


@_locked_qkv_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, number: Tensor):
    return tuple(x.new_empty((*x.shape[:2], heads, x.shape[2] // heads)) for x in (q, k, v))


def locked_qkv(attention: Attention, qkv: Projections, rotation: Rotation | None) -> Projections:
    """Turn a locked self-attention's projections [B, n, H*D] into its queries, keys and values [B, n, H, D].

    rotation: cosine and sine of the video's tokens, angles twice, neighbouring channels being a pair: [S, D],
    [1, S, 1, D], or [B, S, H*D] where heads have angles of their own; None for none.
    """
    norm = getattr(attention, "norm_k", None)
    number = number_of(attention.to_k if norm is None else norm)
    if isinstance(number, int):
        return _locked_qkv(qkv, rotation, attention.heads, number)
    cos, sin = (None, None) if rotation is None else rotation
    return _locked_qkv_op(*qkv, cos, sin, attention.heads, number)
