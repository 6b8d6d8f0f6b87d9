"""State shared by the locked modules of a transformer, and their outputs' treatment in each mode of a forward."""

import threading
from collections import Counter
from collections.abc import Callable
from enum import Enum, auto

import torch
from torch import Tensor

from kvlock_fast.errors import InputError
from kvlock_fast.kernels.blend import as_heads, blend_
from kvlock_fast.kernels.quantize import QuantizedKV, quantize_kv
from kvlock_fast.locking.arch import PLACES, by_samples, place_by_place, without_text
from kvlock_fast.locking.foreground import View
from kvlock_fast.nvtx import span

Reference = Tensor | QuantizedKV
KeptKV = dict[tuple[int, str], Reference]
"""By layer number and "k" or "v"."""
Projections = tuple[Tensor, Tensor, Tensor]
Rotation = tuple[Tensor, Tensor]
FusedProjections = Callable[[int, int, Projections, Rotation | None, int], Projections]
"""Layer, token_dim, projections, rotation and heads to q, k, v: the fast path (fast_qkv.py)."""


class Mode(Enum):
    """Treatment of keys and values during a forward."""

    OFF = auto()
    CAPTURE = auto()  # keep this forward's K and V
    STORED = auto()  # blend every row with K and V that were kept
    IN_BATCH = auto()  # blend rows 1.. with row 0
    FOREGROUND = auto()  # only some tokens are there: the attention adds what was kept of the others


class LockState:
    """State shared by a transformer's locked modules: mode, weight, kept K/V, how many of them have run.

    Tokens are the video's: those of the text, where there are any beside them, keep their own keys and values.
    """

    def __init__(self, background: Tensor | None = None, text: str = "none", format: str | None = None):
        """background: indices [N] of the tokens to keep and blend in CAPTURE and STORED, None for all; text: as
        `ArchSpec.text`; format: how K and V are packed that have no place yet, None: they stay tensors.

        bias: added to the logits of the background's keys in FOREGROUND. columns: first column and number of columns of
        a module's output, where it holds more than K or V.
        """
        self.mode = Mode.OFF
        self.thread: int | None = None
        self.text = text
        self.tokens: int | None = None
        self.ahead = 0
        self.rows: dict[int, str] = {}
        self._at_places: tuple[Tensor | None, Tensor | None] | None = None
        self.weight: Tensor | None = None
        self.background = background
        self.kept: KeptKV = {}
        self.view: View | None = None
        self.bias = 0.0
        self.columns: dict[tuple[int, str], tuple[int, int]] = {}
        self.format = format
        self.heads: dict[int, int | None] = {}
        self.prologue: FusedProjections | None = None
        self.fired: Counter[tuple[int, str]] = Counter()

    def references(self, layer: int, token_dim: int, heads: int) -> tuple[Reference, Reference]:
        """The layer's kept K and V as [B, N, H, D] or QuantizedKV; token_dim: where K as a tensor has its tokens."""
        k, v = self.kept[layer, "k"], self.kept[layer, "v"]
        return (
            k if isinstance(k, QuantizedKV) else as_heads(k, token_dim, heads),
            v if isinstance(v, QuantizedKV) else as_heads(v, 1, heads),
        )

    def apply(self, key: tuple[int, str], x: Tensor, token_dim: int) -> None:
        """Do to a module's output x as the mode says: keep it, or blend it in place."""
        locks = self.mode not in (Mode.OFF, Mode.FOREGROUND)
        if locks and x.requires_grad and torch.is_grad_enabled():
            # A blend has no gradient, and a checkpointed layer is run again when the forward is over.
            raise RuntimeError("keys and values are locked without a gradient: run the transformer in torch.no_grad()")
        if self.thread != threading.get_ident():
            if self.mode is not Mode.OFF:
                raise RuntimeError("another thread ran the transformer while it is locked: let one wait for the other")
            return  # between forwards it is the plain model, and nobody counts
        if self.prologue is not None:  # which does it, and counts
            return
        self.fired[key] += 1
        if not locks:
            return
        if key in self.columns:
            x = x.narrow(-1, *self.columns[key])
        rows = self.rows.get(key[0])
        weight, background = self.weight, self.background
        if rows is None:
            if self.tokens != x.shape[token_dim] or self.ahead:
                x = without_text(x, token_dim, self.text, self.tokens, self.ahead)
        else:
            frames, x = x.shape[1], by_samples(x, self.tokens)
            if rows == PLACES:
                weight, background = self._place_by_place(frames, x.shape[1])
        if self.mode is Mode.CAPTURE:
            with span("capture"):
                self._keep(key, x, token_dim, background)
        elif self.mode is Mode.STORED:
            with span("lock"):
                kept = self.kept[key]
                if kept.shape[0] not in (1, len(x)):
                    rows = f"{kept.shape[0]} rows, and a forward of the edit has {len(x)}"
                    raise InputError(f"the source ran with {rows}: run the source with one")
                blend_(x, kept, repeated(weight, len(x)), token_dim, background)
        elif self.mode is Mode.IN_BATCH:
            with span("lock"):
                blend_(x[1:], x[:1], repeated(weight, len(x) - 1), token_dim)

    def _keep(self, key: tuple[int, str], x: Tensor, token_dim: int, background: Tensor | None) -> None:
        """Pack x into what is there for this layer, or keep it in the format, or as it is."""
        x = x.detach()  # what is kept would keep its whole forward
        place = self.kept.get(key)
        if not isinstance(place, QuantizedKV):
            if self.format is not None:
                heads = as_heads(x, token_dim, self._heads(key[0], x))
                self.kept[key] = quantize_kv(heads, self.format, key[1], tokens=background)
            else:
                self.kept[key] = x.clone() if background is None else x.index_select(token_dim, background)
            return
        heads = as_heads(x, token_dim, place.shape[2])
        packed = quantize_kv(
            heads, place.format, place.kind, tokens=background, tokens_per_scale=place.tokens_per_scale
        )
        place.copy_(packed)

    def _place_by_place(self, frames: int, tokens: int) -> tuple[Tensor | None, Tensor | None]:
        """Weight and background in the token order of a self-attention over one place's frames; made once a forward."""
        if self._at_places is None:
            weight, background = self.weight, self.background
            if weight is not None:
                weight = weight.unflatten(1, (frames, -1)).transpose(1, 2).flatten(1)
            if background is not None:
                background = place_by_place(background, frames, tokens)
            self._at_places = weight, background
        return self._at_places

    def _heads(self, layer: int, x: Tensor) -> int:
        heads = self.heads[layer]
        if x.ndim == 3 and (heads is None or x.shape[2] % heads):
            raise InputError(
                f"format {self.format!r} needs the attention's heads, and layer {layer} of {x.shape[2]} channels says "
                f"{heads}: keep K and V as they are (format=None)"
            )
        return heads or 1


def repeated(weight: Tensor | None, rows: int) -> Tensor:
    """The weight of `rows` rows: that of the samples repeated, where branches of guidance share a batch.

    Raises InputError where rows is no multiple of the samples.
    """
    if weight is None:
        raise RuntimeError("a forward that blends needs the weight to blend by")
    samples = len(weight)
    if samples in (1, rows):
        return weight
    if rows % samples:
        raise InputError(f"a forward of the edit has {rows} rows, which is no multiple of the lock's {samples} samples")
    return weight.repeat(rows // samples, 1)
