"""Rows about attention: ours and every library's, its candidates for tiles, and the two routes of locked attention."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench.kernels import eager
from bench.kernels.measure import Case, Contender, ceilings, input_sets
from bench.kernels.shapes import Shape
from kvlock_fast.kernels import attention, attention_fp8
from kvlock_fast.kernels.attention import Tiles, attention_reference, launch_attention, padded
from kvlock_fast.kernels.attention_fp8 import launch_attention_fp8
from kvlock_fast.kernels.attention_libraries import cudnn, sdpa
from kvlock_fast.kernels.launch import architecture
from kvlock_fast.kernels.locked_attention import locked_attention
from kvlock_fast.kernels.quantize import quantize_kv

FP8_TOLERANCE = 0.15
CHECKED_QUERIES = 256
# Candidates for sm_90 by head dim: queries, keys, warps, stages.
SWEEP = {
    64: [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3)],
    128: [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 3), (64, 128, 4, 2), (64, 64, 4, 3)],
}
SWEEP_FP8 = [(128, 64, 8, 4), (128, 64, 8, 3), (128, 128, 8, 3), (128, 128, 8, 2), (64, 128, 4, 3)]
SPLITS = (1, 2, 4, 8)


def random_normal(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers; nothing on the `meta` device."""
    return torch.empty(shape, dtype=dtype, device=device).normal_()


def some_rows(tokens: int, device: str) -> Tensor:
    """The queries that a check looks at, spread over all."""
    return torch.linspace(0, tokens - 1, min(tokens, CHECKED_QUERIES), device=device).long()


def library_attentions() -> tuple[dict[str, Callable], dict[str, str]]:
    """attend(q, k, v, scale) of every library that can be imported, and why the others cannot."""
    found: dict[str, Callable] = {"cudnn": cudnn, "sdpa": sdpa}
    modules = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn.cute"}
    absent = {}
    for name, module in modules.items():
        if _importable(module):
            found[name] = partial(_flash, module)
        else:
            absent[name] = "not installed"
    if _importable("sageattention"):
        found["sageattention"] = _sage
    else:
        absent["sageattention"] = "not installed"
    return found, absent


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def _flash(module: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from importlib import import_module

    out = import_module(module).flash_attn_func(q, k, v, softmax_scale=scale)
    return out[0] if isinstance(out, tuple) else out


def _sage(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=scale)


def in_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, S, H, D] as e4m3 codes and scales [B, H, ceil(S / 128)]."""
    packed = quantize_kv(x, "fp8_e4m3", tokens_per_scale=128)
    return packed.codes, packed.scale[..., 0].transpose(1, 2).contiguous()


def fp8_operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """What launch_attention_fp8 takes of q, k, v [B, S, H, D]."""
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = map(in_blocks, (q, k, v))
    batch, tokens, heads, dim = v.shape
    v_t = torch.zeros(batch, heads, dim, -(-tokens // 16) * 16, dtype=torch.uint8, device=v.device)
    v_t[..., :tokens] = v8.view(torch.uint8).permute(0, 2, 3, 1)
    return q8, q_scale, k8, k_scale, v_t.view(torch.float8_e4m3fn), v_scale


@contextmanager
def tiles(table: dict, q: Tensor, candidate: tuple[int, ...]) -> Iterator[None]:
    """A launcher's table with a candidate in the entry that q takes."""
    arch, width = max((a for a in table if a <= architecture(q)), default=min(table)), padded(q.shape[3], 32)
    before = table[arch][width]
    table[arch][width] = Tiles(*candidate)
    try:
        yield
    finally:
        table[arch][width] = before


def _operands(shape: Shape, device: str) -> tuple[list[tuple[Tensor, Tensor, Tensor]], float]:
    make = partial(random_normal, device)
    size = (shape.heads, shape.dim)
    nbytes = 2 * (shape.query_tokens + 2 * shape.tokens) * math.prod(size)
    sets = [
        (make(1, shape.query_tokens, *size), make(1, shape.tokens, *size), make(1, shape.tokens, *size))
        for _ in range(input_sets(nbytes))
    ]
    return sets, 4.0 * shape.query_tokens * shape.tokens * math.prod(size)


def _attention_case(sets: list[tuple[Tensor, Tensor, Tensor]], flops: float, device: str) -> Case:
    q, k, v = sets[0]
    rows, scale = some_rows(q.shape[1], device), q.shape[3] ** -0.5
    return Case(
        ceilings(device, ("bf16", "fp8")),
        reference=lambda: attention_reference(q[:, rows], k, v, scale),
        sets=len(sets),
        view=lambda out: out[:, rows],
    )


def attention_case(shape: Shape, variant: str, device: str) -> Case:
    """Attention behind the prologue, by ours and by every library."""
    sets, flops = _operands(shape, device)
    case, scale = _attention_case(sets, flops, device), shape.dim**-0.5
    bf16, fp8 = dict(flops=flops, ceiling="bf16"), dict(flops=flops, ceiling="fp8", tolerance=FP8_TOLERANCE)
    packed = [fp8_operands(*operands) for operands in sets]
    libraries, case.absent = library_attentions()
    case.contenders |= {
        "triton": Contender(lambda i: launch_attention(*sets[i], scale), "ours", **bf16),
        "triton fp8": Contender(lambda i: launch_attention_fp8(*packed[i], scale, torch.bfloat16), "ours", **fp8),
    }
    for name, attend in libraries.items():
        figures = fp8 if name == "sageattention" else bf16
        case.contenders[name] = Contender(partial(_call, attend, sets, scale), "peer", **figures)
    return case


def _call(attend: Callable, sets: list, scale: float, i: int) -> Tensor:
    return attend(*sets[i], scale)


def sweep_case(shape: Shape, variant: str, device: str) -> Case:
    """Our attention with every candidate for its tiles, or for its splits where there are few queries."""
    sets, flops = _operands(shape, device)
    case, scale = _attention_case(sets, flops, device), shape.dim**-0.5
    bf16 = dict(kind="sweep", flops=flops, ceiling="bf16")
    if shape.queries is not None:
        case.contenders |= {f"triton, {n} splits": Contender(partial(_split, sets, scale, n), **bf16) for n in SPLITS}
        return case
    case.contenders["triton, no TMA"] = Contender(lambda i: launch_attention(*sets[i], scale, tma=False), **bf16)
    packed = [fp8_operands(*operands) for operands in sets]
    fp8 = bf16 | dict(ceiling="fp8", tolerance=FP8_TOLERANCE)
    for candidate in SWEEP[shape.dim]:
        run = partial(_swept, attention.TILES, candidate, sets, partial(_bf16, scale))
        case.contenders["triton {}x{}, {} warps, {} stages".format(*candidate)] = Contender(run, **bf16)
    for candidate in SWEEP_FP8:
        run = partial(_swept, attention_fp8.TILES, candidate, packed, partial(_fp8, scale))
        case.contenders["triton fp8 {}x{}, {} warps, {} stages".format(*candidate)] = Contender(run, **fp8)
    return case


def _split(sets: list, scale: float, splits: int, i: int) -> Tensor:
    return launch_attention(*sets[i], scale, splits=splits)


def _bf16(scale: float, *operands: Tensor) -> Tensor:
    return launch_attention(*operands, scale)


def _fp8(scale: float, *operands: Tensor) -> Tensor:
    return launch_attention_fp8(*operands, scale, torch.bfloat16)


def _swept(table: dict, candidate: tuple[int, ...], sets: list, launcher: Callable, i: int) -> Tensor:
    with tiles(table, sets[i][0], candidate):
        return launcher(*sets[i])


def dispatch_case(shape: Shape, source: str, device: str) -> Case:
    """Locked attention by its routes, the cached source in the format `source`; tokens in any order under a mask."""
    make, size = partial(random_normal, device), (shape.heads, shape.dim)
    foreground = torch.zeros(1, shape.tokens, dtype=torch.bool, device=device)
    foreground[:, : shape.foreground] = True
    alpha, scale = torch.full((1,), 0.7, device=device), shape.dim**-0.5
    count = input_sets(2 * (shape.query_tokens + 4 * shape.tokens) * math.prod(size))
    sets: list[tuple[Any, ...]] = []
    for _ in range(count):
        q, k, v = make(1, shape.query_tokens, *size), make(1, shape.tokens, *size), make(1, shape.tokens, *size)
        k_ref, v_ref = (quantize_kv(make(1, shape.tokens, *size), source, kind) for kind in "kv")
        sets.append((q, k, v, k_ref, v_ref, foreground, alpha))
    plain = [(*s[:3], s[3].dequantize(), s[4].dequantize(), *s[5:]) for s in sets]
    flops = 4.0 * shape.query_tokens * shape.tokens * math.prod(size)

    def reference() -> Tensor:
        q, k, v, k_ref, v_ref = (x.float() for x in plain[0][:5])
        return attention_reference(q, *eager.blend_kv(k, v, k_ref, v_ref, foreground, alpha), scale)

    def by_hand(attend: Callable, i: int) -> Tensor:
        q, *rest = plain[i]
        return attend(q, *eager.blend_kv(*rest), scale)

    figures = dict(flops=flops, ceiling="bf16")
    case = Case(ceilings(device, ("bf16",)), reference, count)
    for route in ("fused", "triton", "cudnn", "sdpa"):
        run = partial(_routed, sets, route)
        case.contenders[f"route {route}"] = Contender(run, "ours", **figures)
    case.contenders["eager + cudnn"] = Contender(partial(by_hand, cudnn), "peer", **figures)
    case.contenders["eager + sdpa"] = Contender(partial(by_hand, sdpa), "peer", **figures)
    return case


def _routed(sets: list, route: str, i: int) -> Tensor:
    return locked_attention(*sets[i], backend="auto", attention=route)
