"""Rows about a whole layer's path: projections to attention output, locked; and the prologue of it on its own."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernels import eager
from bench.kernels.attention_cases import FP8_TOLERANCE, library_attentions, random_normal, some_rows
from bench.kernels.measure import Case, Contender, ceilings, input_sets
from bench.kernels.shapes import Shape
from kvlock_fast.kernels.attention import attention_reference, launch_attention
from kvlock_fast.kernels.attention_fp8 import launch_attention_fp8
from kvlock_fast.kernels.attention_libraries import cudnn, sdpa
from kvlock_fast.kernels.prologue import Lock, PrologueOutput, QKNorm, RoPE, prologue
from kvlock_fast.kernels.quantize import QuantizedKV, quantize_kv

ALPHA = 0.7


@dataclass(frozen=True)
class Layer:
    """What all inputs share: weights, angles, how much is foreground."""

    shape: Shape
    norm: QKNorm
    rope: RoPE | None
    alpha: Tensor

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As both `prologue` and its eager twin take them, after q, k, v."""
        return self.shape.heads, self.norm, self.rope, self.shape.foreground


def layer_of(shape: Shape, device: str) -> Layer:
    """Random weights and angles of the shape's model."""
    width = shape.heads * shape.dim if shape.norm == "rms_across_heads" else shape.dim
    weights = [1 + 0.1 * random_normal(device, width) for _ in range(2)]
    biases = [0.1 * random_normal(device, shape.dim) for _ in range(2)] if shape.norm == "layer" else [None, None]
    rope = None
    if shape.angle_heads:
        angle = random_normal(device, shape.tokens, shape.angle_heads, shape.dim // 2, dtype=torch.float32)
        rope = RoPE(angle.cos(), angle.sin())
    return Layer(shape, QKNorm(shape.norm, *weights, *biases), rope, torch.full((1,), ALPHA, device=device))


@dataclass(frozen=True)
class Inputs:
    """One set: projections, slices of a fused one; the source packed and plain."""

    q: Tensor
    k: Tensor
    v: Tensor
    v_own: Tensor  # v once more, for those that blend in place
    k_source: Tensor | QuantizedKV | None
    v_source: Tensor | QuantizedKV | None
    k_plain: Tensor | None
    v_plain: Tensor | None

    @property
    def projections(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def restore(self) -> None:
        """Undo what was done in place."""
        self.v_own.copy_(self.v)


def inputs_of(shape: Shape, source: str, device: str) -> Inputs:
    """Random inputs; source: a format of `quantize_kv`, or "none"."""
    width = shape.heads * shape.dim
    q, k, v = random_normal(device, 1, shape.tokens, 3 * width).chunk(3, 2)
    if source == "none":
        return Inputs(q, k, v, v.contiguous(), None, None, None, None)
    size = (1, shape.tokens - shape.foreground, shape.heads, shape.dim)
    plain = [random_normal(device, *size) for _ in range(2)]
    if source == "native":
        return Inputs(q, k, v, v.contiguous(), *plain, *plain)
    packed = [quantize_kv(x, source, kind) for x, kind in zip(plain, "kv", strict=True)]
    return Inputs(q, k, v, v.contiguous(), *packed, *(x.dequantize() for x in packed))


def _input_sets(shape: Shape, source: str, device: str) -> list[Inputs]:
    count = input_sets(2 * 5 * shape.tokens * shape.heads * shape.dim)
    return [inputs_of(shape, source, device) for _ in range(count)]


def run_prologue(layer: Layer, inputs: Inputs, output: str = "native", locked: bool = True) -> PrologueOutput:
    """Ours."""
    heads, norm, rope, foreground = layer.arguments
    lock = Lock(layer.alpha, inputs.k_source, inputs.v_source) if locked else None
    return prologue(*inputs.projections, heads, norm=norm, rope=rope, foreground=foreground, lock=lock, output=output)


def run_eager(layer: Layer, inputs: Inputs, locked: bool = True, lines: Callable = eager.prologue) -> tuple:
    """Plain torch; `lines`: `eager.prologue`, compiled or not."""
    source = (inputs.k_plain, inputs.v_plain, layer.alpha) if locked else ()
    return lines(inputs.q, inputs.k, inputs.v_own, *layer.arguments, *source)


def in_fp32(layer: Layer, inputs: Inputs, locked: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The eager lines in fp32: what a check compares with."""

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float()

    norm = layer.norm
    norm = QKNorm(norm.kind, *map(wide, (norm.q_weight, norm.k_weight, norm.q_bias, norm.k_bias)), norm.eps)
    plain = [wide(x) for x in (inputs.k_plain, inputs.v_plain)]
    wide_inputs = Inputs(*map(wide, inputs.projections), wide(inputs.v), *plain, *plain)
    return run_eager(Layer(layer.shape, norm, layer.rope, layer.alpha), wide_inputs, locked)


def _compiled(lines: Callable) -> Callable:
    """A function of its own for each row, so that torch.compile's limit on recompilations never strikes."""

    def fresh(*arguments: Any) -> Any:
        return lines(*arguments)

    return torch.compile(fresh, dynamic=False)


def locked_case(shape: Shape, variant: str, device: str) -> Case:
    """Norm, RoPE, lock and attention of a layer; the source's K/V cached in fp8 (ours), the same in bf16 (peers)."""
    layer, sets = layer_of(shape, device), _input_sets(shape, "fp8_e4m3", device)
    scale, rows = shape.dim**-0.5, some_rows(shape.tokens, device)
    compiled = _compiled(eager.prologue)

    def ours(attend: Callable, i: int, locked: bool = True) -> Tensor:
        out = run_prologue(layer, sets[i], locked=locked)
        return attend(out.q, out.k, out.v, scale)

    def ours_fp8(i: int, locked: bool = True) -> Tensor:
        out = run_prologue(layer, sets[i], "fp8", locked)
        operands = (out.q, out.q_scale, out.k, out.k_scale, out.v, out.v_scale)
        return launch_attention_fp8(*operands, scale, torch.bfloat16)

    def by_hand(lines: Callable, attend: Callable, i: int, locked: bool = True) -> Tensor:
        return attend(*run_eager(layer, sets[i], locked, lines), scale)

    def reference() -> Tensor:
        q, k, v = in_fp32(layer, sets[0])
        return attention_reference(q[:, rows], k, v, scale)

    flops = 4.0 * shape.tokens**2 * shape.heads * shape.dim
    # q, k and the blend are rounded once more in the eager peers.
    bf16 = dict(flops=flops, ceiling="bf16", tolerance=2e-2)
    fp8 = dict(flops=flops, ceiling="fp8", tolerance=FP8_TOLERANCE)
    contenders = {
        "triton": Contender(partial(ours, launch_attention), "ours", **bf16),
        "triton fp8": Contender(ours_fp8, "ours", **fp8),
        "eager + cudnn": Contender(partial(by_hand, eager.prologue, cudnn), "peer", before=sets[0].restore, **bf16),
        "eager + sdpa": Contender(partial(by_hand, eager.prologue, sdpa), "peer", before=sets[0].restore, **bf16),
        "torch.compile + cudnn": Contender(partial(by_hand, compiled, cudnn), "peer", before=sets[0].restore, **bf16),
    }
    libraries, _ = library_attentions()
    for name, attend in libraries.items():
        if name.startswith(("cudnn", "flash")):
            contenders[f"prologue + {name}"] = Contender(partial(ours, attend), "ours", **bf16)
    # Nothing but the lock is left out; these have nothing to check against here, the prologue's own row has.
    unlocked = bf16 | dict(tolerance=math.inf)
    contenders |= {
        "unlocked triton": Contender(partial(ours, launch_attention, locked=False), "unlocked", **unlocked),
        "unlocked prologue + cudnn": Contender(partial(ours, cudnn, locked=False), "unlocked", **unlocked),
        "unlocked triton fp8": Contender(partial(ours_fp8, locked=False), "unlocked", **fp8 | dict(tolerance=math.inf)),
    }
    case = Case(ceilings(device, ("bf16", "fp8")), reference, len(sets), lambda out: out[:, rows], counts_launches=True)
    case.contenders |= contenders
    return case


def prologue_case(shape: Shape, source: str, device: str) -> Case:
    """Norm, RoPE and lock alone, against the bandwidth of a copy; source: the cache's format, or "none"."""
    layer, sets, locked = layer_of(shape, device), _input_sets(shape, source, device), source != "none"
    compiled = _compiled(eager.prologue)
    moved = {output: _bytes_moved(layer, sets[0], output) for output in ("native", "fp8")}

    def view(out: Any) -> Tensor:
        parts = (out.q, out.k, out.v) if isinstance(out, PrologueOutput) else out
        if parts[0].dtype == torch.float8_e4m3fn:
            parts = _decoded(out, shape.tokens)
        return torch.cat([x.float().flatten() for x in parts])

    figures = dict(bytes=moved["native"], ceiling="copy", tolerance=2e-2)
    fp8 = dict(bytes=moved["fp8"], ceiling="copy", tolerance=6e-2)
    case = Case(
        ceilings(device, ("copy",)),
        reference=lambda: torch.cat([x.flatten() for x in in_fp32(layer, sets[0], locked)]),
        sets=len(sets),
        view=view,
        counts_launches=True,
    )
    case.contenders |= {
        "triton": Contender(lambda i: run_prologue(layer, sets[i], locked=locked), "ours", **figures),
        "triton, fp8 out": Contender(lambda i: run_prologue(layer, sets[i], "fp8", locked), "ours", **fp8),
        "eager": Contender(lambda i: run_eager(layer, sets[i], locked), "peer", before=sets[0].restore, **figures),
        "torch.compile": Contender(
            lambda i: run_eager(layer, sets[i], locked, compiled), "peer", before=sets[0].restore, **figures
        ),
    }
    return case


def _bytes_moved(layer: Layer, inputs: Inputs, output: str) -> float:
    """What must be read and written: projections, the cache, angles; q, k, v with scales."""
    sources = [x for x in (inputs.k_source, inputs.v_source) if x is not None]
    angles = [] if layer.rope is None else [layer.rope.cos, layer.rope.sin]
    read = sum(x.nbytes for x in (*inputs.projections, *sources, *angles))
    written = sum(x.nbytes for x in inputs.projections)
    return float(read + (written if output == "native" else written / 2))


def _decoded(out: PrologueOutput, tokens: int) -> list[Tensor]:
    """q, k, v [B, S, H, D] of an fp8 output."""
    decoded = []
    for codes, scale in ((out.q, out.q_scale), (out.k, out.k_scale), (out.v, out.v_scale)):
        if codes is out.v:
            codes = codes[..., :tokens].permute(0, 3, 1, 2)
        spread = scale.repeat_interleave(128, dim=2)[:, :, : codes.shape[1]].transpose(1, 2)[..., None]
        decoded.append(codes.float() * spread)
    return decoded
