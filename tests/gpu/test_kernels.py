"""What only a GPU can show: real shapes, 16-bit products, the same bits twice, CUDA graphs, no waits for the host."""

from functools import partial

import pytest
import torch
from torch import Tensor

from kvlock_fast import ops
from kvlock_fast.kernels.attention import attention_reference, launch_attention
from kvlock_fast.kernels.attention_fp8 import attention_fp8_reference, launch_attention_fp8
from kvlock_fast.kernels.blend import blend_
from kvlock_fast.kernels.epilogue import launch_step_epilogue, step_epilogue
from kvlock_fast.kernels.epilogue_state import Schedule, StepState, new_step_state
from kvlock_fast.kernels.fused_attention import launch_fused_attention
from kvlock_fast.kernels.guidance import (
    cfg_projection_reference,
    guided_prediction_reference,
    launch_cfg_projection,
    launch_guided_prediction,
)
from kvlock_fast.kernels.launch import architecture
from kvlock_fast.kernels.locked_attention import launch_blend_kv, locked_attention_reference
from kvlock_fast.kernels.packed import packed_arguments
from kvlock_fast.kernels.prologue import Capture, Lock, QKNorm, RoPE, prologue
from kvlock_fast.kernels.quantize import quantize_kv
from kvlock_fast.kernels.variance import launch_windowed_variance, windowed_variance_reference

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # half a step, relatively
FORMATS = ("native", "bf16", "fp8_e4m3", "int8", "int4")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def error(out: Tensor, want: Tensor) -> float:
    """Relative, in the 2-norm."""
    assert out.shape == want.shape
    return ((out.double() - want.double()).norm() / want.double().norm()).item()


def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """In fp64, head by head."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    heads = [torch.softmax(scale * q[:, h] @ k[:, h].mT, -1) @ v[:, h] for h in range(q.shape[1])]
    return torch.stack(heads, 2)


def some(tokens: int) -> Tensor:
    return torch.linspace(0, tokens - 1, min(tokens, 96), device=DEVICE).long()


# Sq, S, H, D
ATTENTION = {
    "tiny": (33, 65, 2, 64),
    "one": (1, 1, 1, 128),
    "prime": (127, 331, 3, 64),
    "narrow": (257, 1023, 3, 32),
    "padded": (200, 500, 2, 72),
    "odd-wide": (513, 2047, 5, 128),
    "few": (16, 8190, 12, 128),
    "cogvideox": (17776, 17776, 2, 64),
    "wan": (32760, 32760, 2, 128),
}
SHAPES = [pytest.param(*sizes, id=name) for name, sizes in ATTENTION.items()]


@pytest.mark.parametrize("queries, tokens, heads, dim", SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("how", [{}, {"tma": False}, {"splits": 3}], ids=["default", "pointers", "split"])
def test_attention_is_no_worse_than_eager(queries, tokens, heads, dim, dtype, how):
    q = normal(2, queries, heads, dim, dtype=dtype)
    k, v = (normal(2, tokens, heads, dim, dtype=dtype) for _ in range(2))
    scale, rows = dim**-0.5, some(queries)
    out = launch_attention(q, k, v, scale, **how)[:, rows]
    want = exact_attention(q[:, rows], k, v, scale)
    p = torch.softmax(scale * torch.einsum("bqhd,bkhd->bhqk", q[:, rows], k).float(), -1).to(dtype)
    eager = torch.einsum("bhqk,bkhd->bqhd", p, v)
    assert out.isfinite().all() and error(out, want) <= error(eager, want) + UNIT[dtype]


def fp8_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    packed = quantize_kv(x, "fp8_e4m3", tokens_per_scale=128)
    return packed.codes, packed.scale[..., 0].transpose(1, 2).contiguous()


def fp8_operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    (q, q_scale), (k, k_scale), (v, v_scale) = map(fp8_blocks, (q, k, v))
    v = torch.nn.functional.pad(v.view(torch.uint8), (0, 0, 0, 0, 0, -v.shape[1] % 16)).permute(0, 2, 3, 1)
    return q, q_scale, k, k_scale, v.contiguous().view(torch.float8_e4m3fn), v_scale


@pytest.mark.parametrize("queries, tokens, heads, dim", [case for case in SHAPES if case.id != "padded"])
@pytest.mark.parametrize("how", [{}, {"tma": False}, {"splits": 3}], ids=["default", "pointers", "split"])
def test_fp8_attention(queries, tokens, heads, dim, how):
    q = normal(2, queries, heads, dim)
    k, v = (normal(2, tokens, heads, dim) for _ in range(2))
    operands, scale, rows = fp8_operands(q, k, v), dim**-0.5, some(queries)
    out = launch_attention_fp8(*operands, scale, torch.bfloat16, **how)[:, rows]
    # Of the codes it differs by the rounding of P alone, which has 3 bits of mantissa.
    by_codes = attention_fp8_reference(*operands, scale)[:, rows]
    assert out.isfinite().all() and error(out, by_codes) <= 0.04
    if tokens > 1:
        assert error(out, exact_attention(q[:, rows], k, v, scale)) <= 0.12


@pytest.mark.parametrize("attention", ["fused", "triton", "cudnn", "sdpa"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", HALVES)
def test_locked_attention_by_every_route(attention, format, dtype):
    q, k, v, k_ref, v_ref = (normal(2, n, 3, 64, dtype=dtype) for n in (100, 331, 331, 331, 331))
    k_ref, v_ref = k_ref[:1], v_ref[:1]
    foreground = torch.rand(1, 331, device=DEVICE) < 0.3
    alpha = torch.tensor([0.0, 0.6], device=DEVICE)
    packed = [quantize_kv(x, format, kind) for x, kind in ((k_ref, "k"), (v_ref, "v"))]
    out = ops.locked_attention(q, k, v, *packed, foreground, alpha, attention=attention)
    wide = [x.double() for x in (q, k, v)]
    refs = [x.dequantize(torch.float32).double() for x in packed]
    want = locked_attention_reference(*wide, *refs, foreground, alpha, 64**-0.5)
    assert out.dtype == dtype and error(out, want) <= 3 * UNIT[dtype]


@pytest.mark.parametrize("attention", ["fused", "triton", "cudnn"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_nan_of_no_weight_never_comes_through(attention, alpha):
    q, k, v, k_ref, v_ref = (normal(1, 300, 2, 128) for _ in range(5))
    foreground = torch.rand(1, 300, device=DEVICE) < 0.4
    background = ~foreground[0]
    for new, ref in ((k, k_ref), (v, v_ref)):
        ref[:, foreground[0]] = float("nan")
        (new if alpha == 1 else ref)[:, background] = float("nan")
    out = ops.locked_attention(q, k, v, k_ref, v_ref, foreground, alpha, attention=attention)
    assert out.isfinite().all()


NORMS = {
    "wan": ("rms_across_heads", 12, 128, 1, "interleaved"),
    "wan-14b": ("rms_across_heads", 40, 128, 1, "interleaved"),
    "ltx": ("rms_across_heads", 32, 64, 32, "interleaved"),
    "hunyuan": ("rms", 24, 128, 1, "interleaved"),
    "cogvideox-2b": ("layer", 30, 64, 0, "interleaved"),
    "halves": ("none", 5, 96, 1, "split_half"),
    "tiny": ("rms_across_heads", 3, 64, 1, "interleaved"),
}


def layer(model: str, tokens: int, dtype: torch.dtype) -> tuple[int, int, QKNorm, RoPE | None]:
    kind, heads, dim, angle_heads, layout = NORMS[model]
    width = heads * dim if kind == "rms_across_heads" else dim
    weights = [None, None] if kind == "none" else [1 + 0.1 * normal(width, dtype=dtype) for _ in range(2)]
    biases = [normal(dim, dtype=dtype) for _ in range(2)] if kind == "layer" else []
    angle = normal(tokens, max(1, angle_heads), dim // 2, dtype=torch.float32)
    return heads, dim, QKNorm(kind, *weights, *biases), RoPE(angle.cos(), angle.sin(), layout) if angle_heads else None


@pytest.mark.parametrize("model", NORMS)
@pytest.mark.parametrize("source", ["none", "in batch", *FORMATS])
@pytest.mark.parametrize("dtype", HALVES)
def test_prologue_as_its_reference(model, source, dtype):
    tokens, foreground = 1031, 207
    heads, dim, norm, rope = layer(model, tokens, dtype)
    q, k, v = normal(2, tokens, 3 * heads * dim, dtype=dtype).chunk(3, 2)
    lock = None
    if source == "in batch":
        lock = Lock(torch.tensor([0.3], device=DEVICE))
    elif source != "none":
        cached = [quantize_kv(normal(1, tokens - foreground, heads, dim, dtype=dtype), source, kind) for kind in "kv"]
        lock = Lock(torch.tensor([0.3, 1.0], device=DEVICE), *cached, stage="normed")
    arguments = dict(norm=norm, rope=rope, foreground=foreground, lock=lock)
    out = prologue(q, k, v, heads, **arguments, backend="triton")
    want = prologue(q.float(), k.float(), v.float(), heads, **_wide(arguments), backend="reference")
    for name in "qkv":
        got, exact = getattr(out, name), getattr(want, name)
        assert got.dtype == dtype and error(got, exact) <= UNIT[dtype]
    if architecture(q) >= 89 or DEVICE == "cpu":
        fp8 = prologue(q, k, v, heads, **arguments, output="fp8", backend="triton")
        for name in "qkv":
            assert error(_decoded(fp8, name, tokens), getattr(want, name)) <= 0.04


def _wide(arguments: dict) -> dict:
    norm = arguments["norm"]
    weights = (norm.q_weight, norm.k_weight, norm.q_bias, norm.k_bias)
    wide = QKNorm(norm.kind, *(None if w is None else w.float() for w in weights), norm.eps)
    lock = arguments["lock"]
    if lock is not None and lock.k is not None:
        cached = [x.dequantize(torch.float32) for x in (lock.k, lock.v)]
        lock = Lock(lock.alpha, *cached, stage=lock.stage)
    return arguments | dict(norm=wide, lock=lock)


def _decoded(out, name: str, tokens: int) -> Tensor:
    codes, scale = getattr(out, name), getattr(out, f"{name}_scale")
    if name == "v":
        assert (codes[..., tokens:].view(torch.uint8) == 0).all()
        codes = codes[..., :tokens].permute(0, 3, 1, 2)
    spread = scale.repeat_interleave(128, 2)[:, :, : codes.shape[1]].transpose(1, 2)
    return codes.float() * spread[..., None]


@pytest.mark.parametrize("format", FORMATS)
def test_the_prologue_keeps_what_quantize_makes_of_its_output(format):
    tokens, foreground = 519, 100
    heads, dim, norm, rope = layer("wan", tokens, torch.bfloat16)
    q, k, v = normal(1, tokens, 3 * heads * dim).chunk(3, 2)
    out = prologue(q, k, v, heads, norm=norm, rope=rope, foreground=foreground, capture=Capture(format))
    for kept, x in ((out.captured_k, out.k), (out.captured_v, out.v)):
        background = x[:, foreground:]
        loss = error(quantize_kv(background, format, kept.kind).dequantize(), background)
        assert kept.format == format and error(kept.dequantize(), background) <= 1.01 * loss + UNIT[torch.bfloat16]


@pytest.mark.parametrize("format", FORMATS[1:])
@pytest.mark.parametrize("kind", ["k", "v"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "shape", [(1, 1031, 12, 128), (2, 257, 30, 64), (1, 70, 3, 40)], ids=["wan", "cogvideox", "odd"]
)
def test_quantisers_as_their_reference(format, kind, dtype, shape):
    x = normal(*shape, dtype=dtype)
    packed, want = (quantize_kv(x, format, kind, backend=backend) for backend in ("triton", "reference"))
    for got, exact in zip(packed.scales, want.scales, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=0)
    codes, exact = (p.codes.view(torch.uint8).int() if format != "bf16" else p.codes for p in (packed, want))
    assert (codes != exact).double().mean() <= 1e-4
    for target in (dtype, torch.float32):
        values, plain = (want.dequantize(target, backend=backend) for backend in ("triton", "reference"))
        torch.testing.assert_close(values, plain, rtol=2 * UNIT[target], atol=1e-6)
    assert packed.dequantize(dtype).shape == x.shape


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("format", FORMATS)
def test_blend_in_place(dtype, format):
    x, ref = normal(2, 1031, 12, 128, dtype=dtype), quantize_kv(normal(1, 800, 12, 128, dtype=dtype), format)
    index = torch.randperm(1031, device=DEVICE)[:800]
    weight = torch.rand(2, 1031, device=DEVICE)
    weight[:, ::5], weight[:, 1::5] = 0.0, 1.0
    got, want = x.clone(), x.clone()
    blend_(got, ref, weight, index=index, backend="triton")
    blend_(want, ref, weight, index=index, backend="reference")
    torch.testing.assert_close(got, want, rtol=2 * UNIT[dtype], atol=2 * UNIT[dtype])
    exact = (weight == 0) | (weight == 1)
    assert torch.equal(got[exact], want[exact])


LATENTS = {"tiny": (4, 2, 6, 10), "odd": (3, 5, 7, 11), "wan": (16, 21, 60, 104)}


@pytest.mark.parametrize("volume", [pytest.param(v, id=n) for n, v in LATENTS.items()])
@pytest.mark.parametrize("dtype", [*HALVES, pytest.param(torch.float32, id="fp32")])
def test_guidance_and_variance(volume, dtype):
    cond, uncond, history = normal(2, *volume, dtype=dtype), normal(2, *volume, dtype=dtype), normal(7, 2, *volume)
    cond = (cond + uncond.float()).to(dtype)  # so that s* is not near 0
    omega, s_star = torch.tensor([5.0, 1.5], device=DEVICE), torch.tensor([0.9, 1.1], device=DEVICE)
    foreground = torch.rand(1, *volume[1:], device=DEVICE) < 0.3
    wide = cond.double(), uncond.double()
    assert error(launch_cfg_projection(cond, uncond), cfg_projection_reference(*wide)) <= 1e-5
    exact = guided_prediction_reference(*wide, omega, s_star)
    assert error(launch_guided_prediction(cond, uncond, omega, s_star), exact) <= UNIT[dtype] + 1e-6
    exact = windowed_variance_reference(history.double(), foreground)
    assert error(launch_windowed_variance(history, foreground), exact) <= 1e-5


def new_run(volume: tuple[int, ...], history: int, corrects: bool) -> tuple[StepState, Schedule, Tensor, Tensor]:
    """A state, a schedule, the foreground and the source's path of a random solver."""
    steps = 12
    table = torch.randn(steps, 3, 3 + history) / 2
    table[:, 0, 2:] = 0
    table[:, :, 2] *= corrects
    foreground = torch.rand(1, *volume[1:], device=DEVICE) < 0.3
    schedule = Schedule(variance_window=5, first_dynamic_step=3, tau=4.0)
    state = new_step_state(normal(2, *volume, dtype=torch.float32), table, 5.0, schedule)
    if state.corrected is not None:
        state.corrected.zero_()
    return state, schedule, foreground, normal(steps + 1, 1, *volume, dtype=torch.float32)


def copy_of(state: StepState) -> StepState:
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return StepState(**{name: None if x is None else x.clone() for name, x in fields.items()})


SOLVERS = [
    pytest.param(0, False, id="one-step"),
    pytest.param(1, False, id="two-step"),
    pytest.param(2, True, id="unipc"),
]


@pytest.mark.parametrize("volume", [pytest.param(v, id=n) for n, v in LATENTS.items()])
@pytest.mark.parametrize("history, corrects", SOLVERS)
@pytest.mark.parametrize("dtype", HALVES)
def test_epilogue_as_its_reference_and_the_same_bits_twice(volume, history, corrects, dtype):
    state, schedule, foreground, path = new_run(volume, history, corrects)
    twin, plain = copy_of(state), copy_of(state)
    for _ in range(state.table.shape[0]):
        cond, uncond = normal(2, *volume, dtype=dtype), normal(2, *volume, dtype=dtype)
        for s, backend in ((state, "triton"), (twin, "triton"), (plain, "reference")):
            step_epilogue(s, cond, uncond, foreground, schedule, path, backend=backend)
        for name in ("latents", "alpha", "omega", "s_star"):
            torch.testing.assert_close(getattr(state, name), getattr(plain, name), rtol=2e-4, atol=2e-4, equal_nan=True)
    for name in ("latents", "window", "alpha", "omega", "s_star", "variance", "trace", "step"):
        assert torch.equal(getattr(state, name).nan_to_num(7.0), getattr(twin, name).nan_to_num(7.0)), name


def tiny_runs() -> dict[str, partial]:
    """Every launcher on tiny tensors that stay where they are; each call gives a tensor, or several."""
    q, k, v, x = (normal(2, 70, 3, 64) for _ in range(4))
    k_ref, v_ref = (quantize_kv(normal(1, 70, 3, 64), "fp8_e4m3", kind) for kind in "kv")
    foreground, alpha = torch.rand(1, 70, device=DEVICE) < 0.3, torch.tensor([0.4, 1.0], device=DEVICE)
    codes = [packed_arguments(r.codes, r.scales, r.format, r.kind, 1, architecture(q)) for r in (k_ref, v_ref)]
    heads, _, norm, rope = layer("tiny", 70, torch.bfloat16)
    projections = normal(2, 70, 3 * 192).chunk(3, 2)
    lock = Lock(alpha, *(quantize_kv(normal(1, 50, 3, 64), "int4", kind) for kind in "kv"))
    prepare = partial(prologue, *projections, heads, norm=norm, rope=rope, foreground=20, lock=lock, backend="triton")
    kept = partial(prologue, *projections, heads, norm=norm, rope=rope, foreground=20, capture=Capture("int8"))
    cond, uncond, history = normal(2, 4, 2, 6, 10), normal(2, 4, 2, 6, 10), normal(5, 2, 4, 2, 6, 10)
    inside, scales = torch.rand(1, 2, 6, 10, device=DEVICE) < 0.5, torch.tensor([0.9, 1.1], device=DEVICE)
    weight, index = torch.rand(2, 70, device=DEVICE), torch.arange(1, 70, 2, device=DEVICE)
    state, schedule, region, path = new_run((4, 2, 6, 10), 1, False)

    def blended() -> Tensor:
        return blend_(x.clone(), k_ref, weight, backend="triton")

    def one_step() -> Tensor:
        now = copy_of(state)
        launch_step_epilogue(now, cond, uncond, region, schedule, path)
        return now.latents

    runs = {
        "attention": partial(launch_attention, q, k, v, 0.125),
        "attention by pointers": partial(launch_attention, q, k, v, 0.125, tma=False),
        "attention split": partial(launch_attention, q, k, v, 0.125, splits=2),
        "fused attention": partial(launch_fused_attention, q, k, v, *codes, foreground, alpha, 0.125),
        "blend kv": partial(launch_blend_kv, k, v, *codes, foreground, alpha),
        "locked attention": partial(ops.locked_attention, q, k, v, k_ref, v_ref, foreground, alpha, backend="triton"),
        "blend": blended,
        "prologue": lambda: _tensors(prepare()),
        "prologue that keeps": lambda: _tensors(kept(backend="triton")),
        "quantize": lambda: [p for kind in "kv" for p in _packed(quantize_kv(q, "int4", kind, tokens=index))],
        "dequantize": lambda: k_ref.dequantize(),
        "projection": partial(launch_cfg_projection, cond, uncond),
        "guided prediction": partial(launch_guided_prediction, cond, uncond, scales, scales),
        "variance": partial(launch_windowed_variance, history, inside),
        "epilogue": one_step,
    }
    if architecture(q) >= 89 or DEVICE == "cpu":
        runs["attention in fp8"] = partial(launch_attention_fp8, *fp8_operands(q, k, v), 0.125, torch.bfloat16)
        runs["prologue to fp8"] = lambda: _tensors(prepare(output="fp8"))
    return runs


RUNS = (
    "attention", "attention by pointers", "attention split", "fused attention", "blend kv", "locked attention", "blend",
    "prologue", "prologue that keeps", "quantize", "dequantize", "projection", "guided prediction", "variance",
    "epilogue", "attention in fp8", "prologue to fp8",
)  # fmt: skip


def _packed(packed) -> list[Tensor]:
    return [packed.codes, *packed.scales]


def _tensors(out) -> list[Tensor]:
    """Those of a PrologueOutput."""
    plain = [x for x in (out.q, out.k, out.v, out.q_scale, out.k_scale, out.v_scale) if x is not None]
    return plain + [x for kept in (out.captured_k, out.captured_v) if kept is not None for x in _packed(kept)]


def _as_bytes(out) -> list[Tensor]:
    return [x.contiguous().view(torch.uint8) for x in ([out] if isinstance(out, Tensor) else out)]


def tiny_run(name: str):
    runs = tiny_runs()
    if name not in runs:
        pytest.skip("this GPU multiplies no fp8")
    return runs[name]


@pytest.mark.parametrize("name", RUNS)
def test_tiny_launch_gives_the_same_bits_twice(name):
    run = tiny_run(name)
    for one, two in zip(_as_bytes(run()), _as_bytes(run()), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", RUNS)
def test_launchers_can_be_captured_in_a_graph(name):
    run = tiny_run(name)
    want = [x.clone() for x in _as_bytes(run())]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for x in [out] if isinstance(out, Tensor) else out:
        x.view(torch.uint8).fill_(0xA5)
    graph.replay()
    for got, exact in zip(_as_bytes(out), want, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("name", RUNS)
def test_launchers_never_wait_for_the_device(name):
    run = tiny_run(name)
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_compiled_offline_is_what_runs():
    """The rows of `kvlock-fast kernels` are in Triton's cache under the key that a launch looks for."""
    from triton import knobs

    from kvlock_fast.kernels import variance
    from kvlock_fast.tools.compile_report import ARCHITECTURES, compile_kernels, compiler_processes

    history = normal(10, 2, 16, 21, 60, 104)
    if architecture(history) not in ARCHITECTURES:
        pytest.skip("nothing ships for this GPU by name")
    with compiler_processes(1) as pool:
        assert all(compile_kernels(pool, [architecture(history)], ["kvlock_fast.kernels.variance"]))
    hits = []
    for kernel in (variance._variance_partials_kernel, variance._variance_kernel):
        kernel.device_caches.clear()
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    try:
        launch_windowed_variance(history, torch.ones(1, 21, 60, 104, dtype=torch.bool, device=DEVICE))
    finally:
        knobs.compilation.listener = None
    assert hits == [True, True]


def test_a_long_sequence_needs_64_bit_offsets():
    """More than 2^31 elements of keys."""
    tokens, heads, dim = 1_500_000, 12, 128
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB")
    k, v = (torch.randn(1, tokens, heads, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    q = normal(1, 16, heads, dim)
    out = launch_attention(q, k, v, dim**-0.5)
    assert error(out, attention_reference(q, k, v, dim**-0.5)) <= 2 * UNIT[torch.bfloat16]
    packed = quantize_kv(k, "int8")
    last = packed.codes[:, -1:].float() * packed.scale[:, -1:]
    assert error(last, k[:, -1:]) <= 0.02
