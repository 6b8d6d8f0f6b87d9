"""The prologue's kernel, in two geometries, and its launcher.

*Rows*: a program holds all heads of a few tokens of q, k or v in registers, so that a norm over all heads costs no
second read, and cos and sin are read once for all heads. *Blocks*: a program holds 128 tokens of one head, for what
needs their amax: the values of fp8 attention, which are also transposed, and queries and keys that have no norm.
"""

# To the checker `static_range` is no iterable, and a constexpr is assigned a plain value.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlock_fast.kernels import prologue_tiles as tile
from kvlock_fast.kernels.language import require_package_name, tl, triton
from kvlock_fast.kernels.launch import architecture, launch
from kvlock_fast.kernels.packed import FP8_FROM, PackedArguments
from kvlock_fast.kernels.prologue_reference import FP8_BLOCK, Capture, QKNorm, RoPE
from kvlock_fast.kernels.tiles import mix, shifted

require_package_name(__name__)

_FP8_BLOCK = tl.constexpr(FP8_BLOCK)


@triton.jit
def _prepare(
    x, out, out_scale, weight, bias, cos, sin, codes, scale, minimum, kept, kept_scale,      # at their sample
    first_token, first_head, w, by_token, rows, keeps, S, F, PADDED, eps,                    # S: tokens there are
    x_n, c_n, r_n, r_h,                                                                      # strides
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, ANGLE_HEADS: tl.constexpr, STAGE: tl.constexpr,
    FORMAT: tl.constexpr, KIND: tl.constexpr, PER_SCALE: tl.constexpr,
    CAPTURE: tl.constexpr, CAPTURE_STAGE: tl.constexpr, OUT: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of q, k or v, HEADS heads in each of CHUNKS tiles, from load to store.

    w: the source's weight on the background, or whether `by_token` has one for each of its tokens; rows: the background
    row that a token is, negative for none (None: tokens from F on, in order); keeps: whether this sample is captured.
    """
    HALVES: tl.constexpr = ROPE == "split_half"
    ACROSS: tl.constexpr = NORM == "rms_across_heads"
    WIDTH: tl.constexpr = H * D if ACROSS else D
    i_r = tl.arange(0, TOKENS * HEADS)[:, None]
    o_t, o_h = first_token + i_r // HEADS, first_head + i_r % HEADS
    token, m_t = o_t.to(tl.int64), o_t < S
    o_n = o_t - F if rows is None else tl.load(rows + o_t, mask=m_t, other=-1)
    if by_token is not None:
        w = tl.load(by_token + o_t, mask=m_t & w, other=0.0)
    w = tl.where(o_n >= 0, w, 0.0)
    xs, refs, inverse, ref_inverse = (), (), None, None
    # All loads come before the first store: the compiler cannot move a load over one.
    for c in tl.static_range(CHUNKS):
        i_h, m_r = o_h + c * HEADS, m_t & (o_h + c * HEADS < H)
        m_new = m_r if STAGE == "none" else m_r & (w != 1)
        xs += (tile.load_rows(x + token * x_n + i_h * D, m_new, D, BLOCK_D, HALVES),)
        if STAGE != "none":
            b_ref = tile.load_source(
                codes, scale, minimum, i_h, o_n, m_r & (w != 0), H, r_n, r_h, D, BLOCK_D, HALVES,
                FORMAT, KIND, PER_SCALE, FP8,
            )  # fmt: skip
            refs += (b_ref,)
    if ACROSS:
        inverse = tile.inverse_rms(xs, eps, WIDTH, CHUNKS, HEADS)
        if STAGE == "raw":
            ref_inverse = tile.inverse_rms(refs, eps, WIDTH, CHUNKS, HEADS)

    starts_block = (first_token + TOKENS - 1) // _FP8_BLOCK * _FP8_BLOCK >= first_token
    b_weight, b_bias, b_cos, b_sin = None, None, None, None
    for c in tl.static_range(CHUNKS):
        i_h, m_r = o_h + c * HEADS, m_t & (o_h + c * HEADS < H)
        # What all heads share is loaded once.
        if c == 0 or ACROSS:
            if weight is not None:
                b_weight = tile.load_rows(weight + i_h * (D if ACROSS else 0), m_r, D, BLOCK_D, HALVES)
            if bias is not None:
                b_bias = tile.load_rows(bias + i_h * 0, m_r, D, BLOCK_D, HALVES)
        if ROPE != "none" and (c == 0 or ANGLE_HEADS > 1):
            p_angle = token * c_n + (i_h * (D // 2) if ANGLE_HEADS > 1 else 0)
            b_cos = tile.load_rows(cos + p_angle, m_r, D // 2, BLOCK_D // 2, False)
            b_sin = tile.load_rows(sin + p_angle, m_r, D // 2, BLOCK_D // 2, False)
        row, m_kept = o_n.to(tl.int64) * H + i_h, m_r & (o_n >= 0) & keeps

        b_x = tile.normalise(xs[c], inverse, b_weight, b_bias, eps, D, NORM)
        if CAPTURE != "none" and CAPTURE_STAGE == "normed":
            tile.capture_rows(kept, kept_scale, b_x, row, m_kept, D, BLOCK_D, HALVES, CAPTURE, FP8)
        if STAGE == "raw":
            b_x = mix(b_x, tile.normalise(refs[c], ref_inverse, b_weight, b_bias, eps, D, NORM), w)
        elif STAGE == "normed":
            b_x = mix(b_x, refs[c], w)
        if ROPE != "none":
            b_x = tile.rotate(b_x, b_cos, b_sin)
        if CAPTURE != "none" and CAPTURE_STAGE == "rotated":
            tile.capture_rows(kept, kept_scale, b_x, row, m_kept, D, BLOCK_D, HALVES, CAPTURE, FP8)
        if STAGE == "rotated":
            b_x = mix(b_x, refs[c], w)
        tile.store_output(
            out, out_scale, b_x, b_weight, b_bias, i_h, o_t, m_r, starts_block, S, PADDED,
            H, D, BLOCK_D, WIDTH, HALVES, OUT, FP8,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B", "SQ", "S", "F"])  # lengths change with every video; nothing is aligned by them
def _prologue_kernel(
    q, k, v, q_out, k_out, v_out, q_scale, k_scale, v_scale,
    q_weight, k_weight, q_bias, k_bias, cos, sin, alpha, rows,
    k_codes, k_steps, k_lows, v_codes, v_steps, v_lows,                          # the source's: codes, scales, minima
    kept_k, kept_k_scale, kept_v, kept_v_scale,                                  # what is captured
    B, SQ, S, F, PADDED, eps,                                                    # SQ: tokens of q
    q_b, q_n, k_b, k_n, v_b, v_n, c_n, a_b,                                      # strides
    kc_b, kc_n, kc_h, ks_b, vc_b, vc_n, vc_h, vs_b,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, ANGLE_HEADS: tl.constexpr, STAGE: tl.constexpr, FIRST: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    K_FORMAT: tl.constexpr, K_PER_SCALE: tl.constexpr, V_FORMAT: tl.constexpr, V_PER_SCALE: tl.constexpr,
    CAPTURE: tl.constexpr, CAPTURE_STAGE: tl.constexpr, OUT: tl.constexpr, V_OUT: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(S / TOKENS) * B * ceil(H / (HEADS * CHUNKS)) * len(PARTS),): TOKENS tokens of one of q, k, v each.

    Parts, heads and samples of the same tokens run side by side: they share cos and sin, and the source's K/V, in L2.
    """
    COUNT: tl.constexpr = 3 if PARTS == "qkv" else (2 if PARTS == "qk" else 1)
    GROUPS: tl.constexpr = (H + HEADS * CHUNKS - 1) // (HEADS * CHUNKS)
    part, rest = 2 if PARTS == "v" else tl.program_id(0) % COUNT, tl.program_id(0) // COUNT
    first_head, rest = (rest % GROUPS) * HEADS * CHUNKS, rest // GROUPS
    i_b, first_token = (rest % B).to(tl.int64), (rest // B) * TOKENS
    keeps, by_token = i_b == 0, None
    if BY_TOKEN:
        # Before FIRST nothing is read there.
        w, by_token = i_b >= FIRST, alpha + (i_b - FIRST) * a_b
    else:
        w = tile.source_weight(alpha, i_b, a_b, FIRST)
    if q_scale is not None:
        q_scale += i_b * H * tl.cdiv(SQ, _FP8_BLOCK)
        k_scale += i_b * H * tl.cdiv(S, _FP8_BLOCK)
        v_scale += i_b * H * tl.cdiv(S, _FP8_BLOCK)
    if STAGE != "none":
        k_codes += i_b * kc_b
        v_codes += i_b * vc_b
    k_steps, k_lows = shifted(k_steps, i_b * ks_b), shifted(k_lows, i_b * ks_b)
    v_steps, v_lows = shifted(v_steps, i_b * vs_b), shifted(v_lows, i_b * vs_b)
    if part == 0:
        _prepare(
            q + i_b * q_b, q_out + i_b * SQ * H * D, q_scale, q_weight, q_bias, cos, sin,
            None, None, None, None, None,
            first_token, first_head, 0.0, None, None, keeps, SQ, F, PADDED, eps, q_n, c_n, 0, 0,
            H, D, BLOCK_D, TOKENS, HEADS, CHUNKS, NORM, ROPE, ANGLE_HEADS, "none",
            "native", "k", 1, "none", "none", OUT, FP8,
        )  # fmt: skip
    elif part == 1:
        _prepare(
            k + i_b * k_b, k_out + i_b * S * H * D, k_scale, k_weight, k_bias, cos, sin,
            k_codes, k_steps, k_lows, kept_k, kept_k_scale,
            first_token, first_head, w, by_token, rows, keeps, S, F, PADDED, eps, k_n, c_n, kc_n, kc_h,
            H, D, BLOCK_D, TOKENS, HEADS, CHUNKS, NORM, ROPE, ANGLE_HEADS, STAGE,
            K_FORMAT, "k", K_PER_SCALE, CAPTURE, CAPTURE_STAGE, OUT, FP8,
        )  # fmt: skip
    elif PARTS != "qk":
        # Values have neither norm nor RoPE: every stage is the last.
        v_rows = S if V_OUT == "native" else PADDED
        _prepare(
            v + i_b * v_b, v_out + i_b * v_rows * H * D, v_scale, None, None, None, None,
            v_codes, v_steps, v_lows, kept_v, kept_v_scale,
            first_token, first_head, w, by_token, rows, keeps, S, F, PADDED, eps, v_n, 0, vc_n, vc_h,
            H, D, BLOCK_D, TOKENS, HEADS, CHUNKS, "none", "none", 1, "none" if STAGE == "none" else "rotated",
            V_FORMAT, "v", V_PER_SCALE, CAPTURE, "rotated", V_OUT, FP8,
        )  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """One program's work: tokens; heads in a tile, and tiles; which of q, k, v."""

    tokens: int
    heads: int
    chunks: int
    parts: str
    num_warps: int

    @property
    def registers(self) -> int:
        """All a thread can have: left to itself the assembler spills a few for the sake of a fuller processor."""
        return min(255, (1 << 16) // (32 * self.num_warps))

    def programs(self, batch: int, tokens: int, heads: int) -> int:
        groups = triton.cdiv(heads, self.heads * self.chunks)
        return triton.cdiv(tokens, self.tokens) * batch * groups * len(self.parts)


# Not swept yet. A tile of 1024 elements gives a thread 16 bytes a load; a token of up to SMALL_ROW channels takes half
# of a tile, so that a thread has three to five loads in flight at any of the shipped widths (1536 to 5120).
TILE, SMALL_ROW, NUM_WARPS = 1024, 2048, 4


def rows_geometry(heads: int, block_d: int, halves: bool, parts: str) -> Geometry:
    """All heads of a few tokens."""
    row = TILE // 2 if heads * block_d <= SMALL_ROW else TILE
    at_once = min(triton.next_power_of_2(heads), max(1, row // block_d))
    tile = 2 * TILE if halves else TILE  # halves are two loads of half a tile
    return Geometry(max(1, tile // (at_once * block_d)), at_once, triton.cdiv(heads, at_once), parts, NUM_WARPS)


def blocks_geometry(block_d: int, parts: str) -> Geometry:
    """128 tokens of one head, by as many warps as the compiler's report shows no spill with."""
    return Geometry(FP8_BLOCK, 1, 1, parts, 8 if block_d <= 128 else 16)


def geometries(heads: int, block_d: int, norm: str, halves: bool, output: str) -> list[Geometry]:
    """The launches of one prologue."""
    if output == "native":
        return [rows_geometry(heads, block_d, halves, "qkv")]
    if norm == "none":
        return [blocks_geometry(block_d, "qkv")]
    return [rows_geometry(heads, block_d, halves, "qk"), blocks_geometry(block_d, "v")]


def launch_prologue(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    outputs: list[Tensor],
    heads: int,
    norm: QKNorm,
    rope: RoPE | None,
    foreground: int,
    source: tuple[PackedArguments, PackedArguments] | None,
    alpha: Tensor | None,
    stage: str,
    first_row: int,
    capture: Capture | None,
    rows: Tensor | None = None,
) -> None:
    """Fill `outputs`: q, k, v; for fp8 also their scales; with `capture` codes (and scale) of k and of v.

    q, k, v [B, S, H*D] with contiguous channels; source: the locked background's keys and values, at `stage`; alpha
    None for weight 1. The background of k and v may be missing then. rows: as `Places.rows`.
    """
    batch, dim = q.shape[0], q.shape[2] // heads
    fp8 = outputs[0].dtype == torch.float8_e4m3fn
    codes, scales, kept = outputs[:3], outputs[3:6] if fp8 else [None] * 3, outputs[6 if fp8 else 3 :]
    kept_k, kept_k_scale, kept_v, kept_v_scale = _with_scales(kept)
    tokens = outputs[1].shape[1]
    k_source, v_source = source or (NO_SOURCE, NO_SOURCE)
    block_d = max(2, triton.next_power_of_2(dim))
    halves = rope is not None and rope.layout == "split_half"
    for geometry in geometries(heads, block_d, norm.kind, halves, "fp8" if fp8 else "native"):
        launch(
            _prologue_kernel, (geometry.programs(batch, tokens, heads),),
            q, k, v, *map(_bits, codes), *scales,
            norm.q_weight, norm.k_weight, norm.q_bias, norm.k_bias,
            *((rope.cos, rope.sin) if rope else (None, None)), alpha, rows,
            k_source.codes, k_source.scale, k_source.minimum, v_source.codes, v_source.scale, v_source.minimum,
            _bits(kept_k), kept_k_scale, _bits(kept_v), kept_v_scale,
            batch, q.shape[1], tokens, foreground, outputs[2].shape[3] if fp8 else 0, norm.eps,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], rope.cos.stride(0) if rope else 0,
            0 if alpha is None or (alpha.ndim == 2 and alpha.shape[0] == 1) else alpha.stride(0),
            *k_source.strides[:3], k_source.scale_stride, *v_source.strides[:3], v_source.scale_stride,
            H=heads, D=dim, BLOCK_D=block_d,
            TOKENS=geometry.tokens, HEADS=geometry.heads, CHUNKS=geometry.chunks, PARTS=geometry.parts,
            NORM=norm.kind, ROPE=rope.layout if rope else "none", ANGLE_HEADS=rope.cos.shape[1] if rope else 1,
            STAGE=stage if source else "none", FIRST=first_row, BY_TOKEN=alpha is not None and alpha.ndim == 2,
            K_FORMAT=k_source.meta["FORMAT"], K_PER_SCALE=k_source.meta["PER_SCALE"],
            V_FORMAT=v_source.meta["FORMAT"], V_PER_SCALE=v_source.meta["PER_SCALE"],
            CAPTURE=capture.format if capture else "none", CAPTURE_STAGE=capture.stage if capture else "none",
            OUT=("amax" if norm.kind == "none" else "bounded") if fp8 else "native",
            V_OUT="transposed" if fp8 else "native", FP8=architecture(q) >= FP8_FROM,
            num_warps=geometry.num_warps, maxnreg=geometry.registers,
        )  # fmt: skip


NO_SOURCE = PackedArguments(None, None, None, (0, 0, 0), 0, dict(FORMAT="native", PER_SCALE=1))


def _with_scales(kept: list[Tensor]) -> list[Tensor | None]:
    """Codes and scale of k, codes and scale of v, with None where the format has none."""
    if len(kept) == 2:
        return [kept[0], None, kept[1], None]
    return [*kept] or [None] * 4


def _bits(codes: Tensor | None) -> Tensor | None:
    """e4m3 codes as the bytes they are: below sm_89 kernels know no other."""
    return codes.view(torch.uint8) if codes is not None and codes.dtype == torch.float8_e4m3fn else codes
