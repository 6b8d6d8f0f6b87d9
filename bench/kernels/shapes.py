"""The shapes that are measured: one self-attention layer of a model and a video, and the rows made of them."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """One layer's self-attention. `tokens` counts text too; `queries`: fewer than tokens for foreground-only steps."""

    name: str
    tokens: int
    heads: int
    dim: int
    norm: str  # as kernels/prologue_reference.py has it
    angle_heads: int  # heads of the rotary embedding: 0 none, 1 shared, else each its own
    latents: tuple[int, int, int, int]  # C, T, H, W
    queries: int | None = None
    foreground_share: float = 0.2

    @property
    def foreground(self) -> int:
        """Foreground tokens, at least one."""
        return max(1, round(self.foreground_share * self.tokens))

    @property
    def query_tokens(self) -> int:
        """Tokens that ask."""
        return self.queries or self.tokens


@dataclass(frozen=True)
class Plan:
    """One row to measure: a part of bench.kernels, a shape, a variant of the part."""

    part: str
    shape: Shape
    variant: str = ""


ACROSS, LAYER, PER_HEAD = "rms_across_heads", "layer", "rms"
WAN, COGVIDEOX = (16, 21, 60, 104), (16, 13, 60, 90)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("wan-1.3b", 32760, 12, 128, ACROSS, 1, WAN),  # 480x832, 81 frames
        Shape("wan-1.3b-33f", 14040, 12, 128, ACROSS, 1, (16, 9, 60, 104)),
        Shape("wan-14b", 32760, 40, 128, ACROSS, 1, WAN),
        Shape("cogvideox-2b", 17776, 30, 64, LAYER, 0, COGVIDEOX),  # 480x720, 49 frames, and 226 of text
        Shape("cogvideox-5b", 17776, 48, 64, LAYER, 1, COGVIDEOX),
        Shape("ltx", 4992, 32, 64, ACROSS, 32, (128, 13, 16, 24)),  # 512x768, 97 frames
        Shape("hunyuan-video", 26776, 24, 128, PER_HEAD, 1, (16, 13, 68, 120)),  # 544x960, 49 frames, 256 of text
        Shape("wan-1.3b-5f", 3120, 12, 128, ACROSS, 1, (16, 2, 60, 104)),
        Shape("wan-1.3b-1f", 1560, 12, 128, ACROSS, 1, (16, 1, 60, 104)),
        # Few queries: those of a foreground, and the published case of 985 on 62k keys.
        Shape("wan-1.3b-few", 32760, 12, 128, ACROSS, 1, WAN, queries=1640),
        Shape("wan-14b-few", 32760, 40, 128, ACROSS, 1, WAN, queries=410),
        Shape("985-on-62k", 62400, 9, 128, ACROSS, 1, WAN, queries=985),
    )
}
MODELS = ("wan-1.3b", "cogvideox-2b", "wan-1.3b-33f", "wan-14b", "cogvideox-5b", "ltx", "hunyuan-video")
SHORT, FEW = ("wan-1.3b-5f", "wan-1.3b-1f"), ("wan-1.3b-few", "wan-14b-few", "985-on-62k")


def plans(quick: bool = False) -> list[Plan]:
    """The rows, the most important first; `quick`: one small row of each part."""
    if quick:
        small = replace(SHAPES["wan-1.3b-1f"], name="quick", latents=(16, 1, 32, 32))
        variants = {
            "locked": "", "attention": "", "epilogue": "", "sweep": "", "dispatch": "fp8_e4m3", "prologue": "fp8_e4m3",
            "blend": "native", "quantize": "fp8_e4m3 k", "dequantize": "fp8_e4m3 k", "guidance": "cfg_projection",
        }  # fmt: skip
        return [Plan(part, small, variant) for part, variant in variants.items()]
    rows = [Plan("locked", SHAPES[name]) for name in MODELS[:2]]
    rows += [Plan("attention", SHAPES[name]) for name in MODELS[:2]]
    rows += [Plan("epilogue", SHAPES[name]) for name in ("wan-1.3b", "cogvideox-2b")]
    rows += [Plan("prologue", SHAPES["wan-1.3b"], source) for source in ("fp8_e4m3", "native", "int8", "int4", "none")]
    rows += [Plan("sweep", SHAPES[name]) for name in ("wan-1.3b-33f", "cogvideox-2b", "wan-1.3b-few")]
    rows += [Plan("attention", SHAPES[name]) for name in (*MODELS[2:], *SHORT, *FEW)]
    rows += [Plan("locked", SHAPES[name]) for name in (*MODELS[2:], *SHORT)]
    rows += [Plan("dispatch", shape, source) for shape in dispatch_shapes() for source in ("native", "fp8_e4m3")]
    rows += [Plan("prologue", SHAPES[name], "fp8_e4m3") for name in MODELS[1:]]
    rows += [Plan("blend", SHAPES["wan-1.3b"], source) for source in ("native", "fp8_e4m3", "int8", "int4")]
    formats = ("bf16 k", "fp8_e4m3 k", "fp8_e4m3 k 128", "int8 k", "int4 k", "int4 v")
    rows += [Plan(part, SHAPES["wan-1.3b"], format) for part in ("quantize", "dequantize") for format in formats]
    operations = ("cfg_projection", "guided_prediction", "windowed_variance")
    return rows + [Plan("guidance", SHAPES["wan-1.3b"], operation) for operation in operations]


def dispatch_shapes() -> list[Shape]:
    """Where the single-kernel path may be the faster one: few tokens, or few queries."""
    base = SHAPES["wan-1.3b-1f"]
    sizes = [(n, n) for n in (256, 512, 1024, 1560, 3120)]
    sizes += [(queries, tokens) for tokens in (1560, 8190, 32760) for queries in (16, 128, 512)]
    shapes = [replace(base, tokens=tokens, queries=queries) for queries, tokens in sizes]
    shapes += [replace(s, heads=30, dim=64) for s in shapes if s.tokens in (1024, 3120) or s.queries == 128]
    return [replace(s, name=f"{s.queries}-on-{s.tokens}-{s.heads}x{s.dim}") for s in shapes]
