"""The prologue: everything between the projections and the attention, in one pass.

    q <- rotate(norm(q))
    k <- rotate(norm(k)), v <- v                                     on the foreground
    k <- rotate((1 - alpha) norm(k) + alpha k_src), v likewise       on the background

Tokens lie foreground first (text counts as foreground): F of them, then the background; no mask anywhere. q, k, v are
projections [B, S, H*D]; what comes out is [B, S, H, D] for any attention, or e4m3 codes for an fp8 one. alpha = 0 never
reads the source's K/V and alpha = 1 never the new ones: exact at both ends, whatever the other side holds. The source's
keys come raw, normed or rotated; RoPE is linear, so that blending before or after it is the same. fp32 inside, one
rounding at the end.

Bytes moved a token and layer (d = H*D, background share f, b bytes a cached element): (12 + 2 f b) d with 16-bit
outputs, in 1 launch; (9 + 2 f b) d with fp8, in 2 launches, or 1 without a norm. cos and sin come on top: 4 D, or 4 d
where heads differ.

fp8 scales are one per head and 128 tokens. Values take their amax, normed queries and keys a bound: no channel exceeds
sqrt(width) max |weight| (+ sqrt(2) max |bias|). e4m3 has 15 binades of normal numbers: the three or four that a loose
scale gives away cost no accuracy, while the amax of rows normalised over all heads would take a second read of q and k.

Sources: KV-Lock (arXiv 2603.09657); norms and rotations as in diffusers' Wan, LTX, HunyuanVideo and CogVideoX.
"""

import torch
from torch import Tensor

from kvlock_fast.kernels import prologue_checks as checks
from kvlock_fast.kernels.dequantize import dequantize_kv_reference
from kvlock_fast.kernels.language import require_package_name
from kvlock_fast.kernels.launch import architecture, runs_triton
from kvlock_fast.kernels.packed import PackedArguments, meta_codes, packed_arguments, packed_layout
from kvlock_fast.kernels.prologue_kernels import launch_prologue
from kvlock_fast.kernels.prologue_reference import (
    FP8_ALIGN,
    FP8_BLOCK,
    OUTPUTS,
    Capture,
    Lock,
    Places,
    PrologueOutput,
    QKNorm,
    RoPE,
    prologue_reference,
)
from kvlock_fast.kernels.quantize import QuantizedKV, codes_of, quantize_kv

require_package_name(__name__)


@torch.library.custom_op("kvlock_fast::prologue", mutates_args=())
def _prologue_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    norm: str,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    layout: str,
    foreground: int,
    alpha: Tensor | None,
    first_row: int,
    stage: str,
    k_source: list[Tensor],
    k_format: str,
    k_per_scale: int,
    v_source: list[Tensor],
    v_format: str,
    v_per_scale: int,
    output: str,
    capture: str | None,
    capture_stage: str,
    rows: Tensor | None,
    count: int,
    backend: str,
) -> list[Tensor]:
    """Sources: codes [B or 1, R, H, D or D/2], then scales; empty without a lock. alpha None: 1. count: background."""
    by = QKNorm(norm, q_weight, k_weight, q_bias, k_bias, eps)
    rope = None if cos is None or sin is None else RoPE(cos, sin, layout)
    kept = None if capture is None else Capture(capture, capture_stage)
    if not (backend == "auto" and q.is_cpu) and runs_triton(backend, q, k, v):
        source = None
        if k_source:
            arch = architecture(q)
            source = (
                packed_arguments(k_source[0], k_source[1:], k_format, "k", k_per_scale, arch),
                packed_arguments(v_source[0], v_source[1:], v_format, "v", v_per_scale, arch),
            )
        outputs = _allocate(q, k, heads, foreground, count, output, capture)
        launch_prologue(q, k, v, outputs, heads, by, rope, foreground, source, alpha, stage, first_row, kept, rows)
        return outputs
    lock = None
    if k_source:
        dim = q.shape[2] // heads
        k_ref = dequantize_kv_reference(k_source[0], k_source[1:], k_format, "k", dim, k_per_scale)
        v_ref = dequantize_kv_reference(v_source[0], v_source[1:], v_format, "v", dim, v_per_scale)
        lock = Lock(1.0 if alpha is None else alpha, k_ref, v_ref, stage, first_row)
    places = None if rows is None else Places(rows, count)
    return prologue_reference(q, k, v, heads, by, rope, foreground, lock, output, kept, places)


@_prologue_op.register_fake
def _(
    q, k, v, heads, norm, q_weight, k_weight, q_bias, k_bias, eps, cos, sin, layout, foreground, alpha, first_row,
    stage, k_source, k_format, k_per_scale, v_source, v_format, v_per_scale, output, capture, capture_stage,
    rows, count, backend,
):  # fmt: skip
    return _allocate(q, k, heads, foreground, count, output, capture)


def _allocate(
    q: Tensor, k: Tensor, heads: int, foreground: int, count: int, output: str, capture: str | None
) -> list[Tensor]:
    """The outputs, uninitialised: q, k, v; their fp8 scales; codes and scale of the captured k and v."""
    batch, dim = q.shape[0], q.shape[2] // heads
    # The background may be missing in k, and not be the rest of it.
    tokens = max(k.shape[1], foreground + count)
    lengths = (q.shape[1], tokens, tokens)
    layout = [((batch, n, heads, dim), q.dtype) for n in lengths]
    if output == "fp8":
        padded = -(-tokens // FP8_ALIGN) * FP8_ALIGN
        layout[2] = (batch, heads, dim, padded), q.dtype
        layout = [(shape, torch.float8_e4m3fn) for shape, _ in layout]
        layout += [((batch, heads, -(-n // FP8_BLOCK)), torch.float32) for n in lengths]
    if capture is not None:
        shape = (min(batch, 1), count, heads, dim)
        for kind in ("k", "v"):
            layout += [(shape, q.dtype)] if capture == "native" else packed_layout(shape, capture, kind)
    return [torch.empty(shape, dtype=dtype, device=q.device) for shape, dtype in layout]


def prologue(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    norm: QKNorm | None = None,
    rope: RoPE | None = None,
    foreground: int | None = None,
    lock: Lock | None = None,
    output: str = "native",
    capture: Capture | None = None,
    places: Places | None = None,
    backend: str = "auto",
) -> PrologueOutput:
    """Normalise, rotate and lock the projections of a self-attention in one pass.

    Args:
        q: queries [B, Sq, H*D], fp16, bf16 or fp32, contiguous channels, any other strides. Sq may be less than S: the
            first Sq tokens' queries.
        k, v: keys and values [B, S, H*D] of q's dtype, tokens foreground first. With a lock that brings its own k and v
            they may hold the foreground only: the background then is the source's (alpha counts as 1).
        heads: H.
        norm: how queries and keys are normalised; None: not at all.
        rope: their rotation; None: none.
        foreground: number of foreground tokens; None: all.
        lock: how the background is locked to the source; None: not at all.
        output: "native", or "fp8" for an fp8 attention.
        capture: how the new background's keys and values are kept; None: they are not.
        places: where the background is, of tokens in any order. Then `foreground` is not given, and the output has its
            tokens where the input has them.
        backend: "auto", "reference" or "triton".

    Raises ValueError on shapes, dtypes or names that do not fit.
    """
    norm = norm or QKNorm()
    dim = checks.check_projections(q, k, v, heads)
    checks.check_names(norm, rope, output, capture)
    checks.check_norm(norm, heads, dim)
    if places is not None:
        if foreground is not None:
            raise ValueError(f"foreground counts tokens that lie first, and is not given with places: got {foreground}")
        checks.check_places(places, k.shape[1], lock)
        foreground = 0
    foreground = k.shape[1] if foreground is None else foreground
    if not 0 <= foreground <= k.shape[1]:
        raise ValueError(f"foreground must be a number of tokens from 0 to {k.shape[1]}, got {foreground}")
    tokens, alpha, count = k.shape[1], None, k.shape[1] - foreground if places is None else places.count
    if lock is not None:
        lock, count = checks.placed_lock(lock, k, v, heads, foreground, count)
        tokens = foreground + count if places is None else tokens
        alpha = checks.alpha_of(lock, k) if k.shape[1] == tokens else None
    if capture is not None and (k.shape[1] != tokens or (lock is not None and lock.first_row == 0)):
        raise ValueError("capture takes the new keys and values of row 0: they may not be locked to others as well")
    if q.shape[1] > tokens:
        raise ValueError(f"q must have at most k's {tokens} tokens, got {q.shape[1]}")
    checks.check_rope(rope, tokens, heads, dim)

    outputs = _prologue_op(
        q, k, v, heads,
        norm.kind, norm.q_weight, norm.k_weight, norm.q_bias, norm.k_bias, norm.eps,
        *((rope.cos, rope.sin, rope.layout) if rope else (None, None, "")),
        foreground, alpha, *((lock.first_row, lock.stage) if lock else (0, "")),
        *_packed(lock.k if lock else None), *_packed(lock.v if lock else None),
        output, *(("native" if capture.format == "int4" else capture.format, capture.stage) if capture else (None, "")),
        None if places is None else places.rows, count, backend,
    )  # fmt: skip
    count = 6 if output == "fp8" else 3
    kept = _captured(outputs[count:], capture, q.dtype, backend) if capture else ()
    scales = outputs[3:count] or [None] * 3
    return PrologueOutput(*outputs[:3], *scales, *kept)


def _packed(x: Tensor | QuantizedKV | None) -> tuple[list[Tensor], str, int]:
    """Codes and scales, format and tokens a scale, as the operator takes them."""
    if x is None:
        return [], "", 1
    codes, scales, format, _, per_scale = codes_of(x)
    return [codes, *scales], format, per_scale


def _captured(
    kept: list[Tensor], capture: Capture, dtype: torch.dtype, backend: str
) -> tuple[QuantizedKV, QuantizedKV]:
    def packed(kind: str, codes: Tensor, *scales: Tensor) -> QuantizedKV:
        if capture.format == "int4":
            return quantize_kv(codes, "int4", kind, backend=backend)
        return QuantizedKV(capture.format, kind, codes.shape, dtype, codes, *scales, tokens_per_scale=1)

    half = len(kept) // 2
    return packed("k", *kept[:half]), packed("v", *kept[half:])


def launch_shipped(architecture: int) -> None:
    """A launch of every configuration that ships, for the compiler's report: the known models' norms and rotations."""
    across, layer = "rms_across_heads", "layer"
    wan, wan_14b, hunyuan = (12, 128, across, 1, 32760), (40, 128, across, 1, 32760), (24, 128, "rms", 1, 32760)
    cogvideox_2b, cogvideox_5b, ltx = (30, 64, layer, 0, 17776), (48, 64, layer, 1, 17776), (32, 64, across, 32, 4992)
    for output in OUTPUTS:
        for model in (wan, wan_14b, hunyuan, cogvideox_2b, cogvideox_5b, ltx):
            _ship(model, output, None)
            _ship(model, output, "fp8_e4m3")
            _ship(model, output, "in_batch")
        for source in ("native", "int8", "int4"):
            _ship(wan, output, source)
        _ship(wan, output, "fp8_e4m3", torch.float16)
        _ship(wan, output, "fp8_e4m3", foreground_only=True)
        _ship(wan, output, None, capture=Capture("fp8_e4m3"))
        for model in (wan, hunyuan, cogvideox_5b, ltx):
            _ship(model, output, "in_batch", placed=True)
            _ship(model, output, "fp8_e4m3", stage="normed", placed=True)
            _ship(model, output, None, capture=Capture("fp8_e4m3", "normed"), placed=True)
        _ship(wan, output, None, capture=Capture("int8", "normed"))
        _ship((32, 96, "none", 1, 32760), output, "fp8_e4m3", layout="split_half")
    _ship(wan, "native", "fp8_e4m3", torch.float32)


def _ship(
    model: tuple[int, int, str, int, int], output: str, source: str | None, dtype: torch.dtype = torch.bfloat16,
    capture: Capture | None = None, layout: str = "interleaved", stage: str = "rotated", foreground_only: bool = False,
    placed: bool = False,
) -> None:  # fmt: skip
    """Make a dry launch: q, k, v slices of a fused projection, 20 % foreground, a source in a format or in the batch.

    model: heads, their channels, norm, heads with angles of their own, tokens; placed: tokens in any order, a weight
    for each.
    """
    heads, dim, norm, angle_heads, tokens = model
    foreground = 0 if placed and source == "in_batch" else tokens // 5
    q, k, v = torch.empty(2, tokens, 3 * heads * dim, dtype=dtype, device="meta").chunk(3, 2)
    weight = torch.empty(heads * dim if norm == "rms_across_heads" else dim, dtype=dtype, device="meta")
    bias, weight = weight if norm == "layer" else None, None if norm == "none" else weight
    rope = None
    if angle_heads:
        angle = torch.empty(tokens, angle_heads, dim // 2, device="meta")
        rope = RoPE(angle, angle, layout)
    shape = (1, tokens - foreground, heads, dim)
    format, stage, first_row = ("native", "raw", 1) if source == "in_batch" else (source or "native", stage, 0)

    def kept(kind: str, x: Tensor) -> PackedArguments:
        if source == "in_batch":
            codes, scales = x[:1, foreground:].unflatten(2, (heads, dim)), []
        elif source == "native":
            codes, scales = torch.empty(shape, dtype=dtype, device="meta"), []
        else:
            codes, *scales = meta_codes(shape, format, kind)
        return packed_arguments(codes, scales, format, kind, 1, 90)

    arguments = (kept("k", k), kept("v", v)) if source else None
    alpha = rows = None
    if source and not foreground_only:
        alpha = torch.empty(2 - first_row, *[tokens] * placed, device="meta")
    if foreground_only:
        q, k, v = (x[:, :foreground] for x in (q, k, v))
    count = tokens - foreground
    if placed and source != "in_batch":
        rows, foreground = torch.empty(tokens, dtype=torch.int32, device="meta"), 0
    outputs = _allocate(q, k, heads, foreground, count, output, capture and capture.format)
    launch_prologue(
        q, k, v, outputs, heads, QKNorm(norm, weight, weight, bias, bias), rope, foreground,
        arguments, alpha, stage, first_row, capture, rows,
    )  # fmt: skip
