"""Markdown from the figures of bench.kernels: the targets, met or missed or unmeasured, and the fastest routes.

python -m bench.kernels.tables out/kernels.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
BF16, FP8 = ("triton", "prologue + cudnn"), ("triton fp8",)


@dataclass(frozen=True)
class Figure:
    """One figure of a target: how to read it from the rows, and the least (or most) that it must be."""

    label: str
    read: Callable[[Rows], float | None]
    must: float
    unit: str = "x"
    least: bool = True

    def text(self, rows: Rows) -> str:
        """The figure and whether it is good enough."""
        value = self.read(rows)
        if value is None:
            return f"{self.label} unmeasured"
        met = value >= self.must if self.least else value <= self.must
        return f"{self.label} {value:.3g}{self.unit} ({'met' if met else 'missed'})"


def _row(rows: Rows, part: str, shape: str, variant: str = "") -> dict[str, Any] | None:
    wanted = {"part": part, "shape": shape, "variant": variant}
    return next((row for row in rows if wanted.items() <= row.items()), None)


def _ratio(part: str, shape: str, ours: tuple[str, ...], peer: str, rows: Rows) -> float | None:
    """How many times faster the best of ours is than the peer."""
    row = _row(rows, part, shape)
    found = [row["ratios"].get(name, {}).get(peer) for name in ours] if row else []
    return max((value for value in found if value), default=None)


def _figure(part: str, shape: str, variant: str, name: str, figure: str, rows: Rows) -> float | None:
    row = _row(rows, part, shape, variant)
    return row["contenders"].get(name, {}).get(figure) if row else None


def _locked_by_unlocked(name: str, rows: Rows) -> float | None:
    locked, unlocked = (_figure("locked", "wan-1.3b", "", which, "ms", rows) for which in (name, f"unlocked {name}"))
    return locked / unlocked if locked and unlocked else None


def _path(peer: str, bf16: float, fp8: float) -> tuple[Figure, ...]:
    read = partial(_ratio, "locked", "wan-1.3b")
    return (
        Figure("bf16", lambda rows: read(BF16, peer, rows), bf16),
        Figure("fp8", lambda rows: read(FP8, peer, rows), fp8),
    )


def _attention(label: str, shape: str, peer: str, must: float) -> Figure:
    return Figure(label, partial(_ratio, "attention", shape, ("triton",), peer), must)


# What, what it must be, the record aimed at, and the figures that bench.kernels has of it.
TARGETS: list[tuple[str, str, str, tuple[Figure, ...]]] = [
    (
        "locked attention path (norm + RoPE + blend + attention) vs eager ops + cuDNN SDPA",
        "1.10x", "1.15x bf16, 1.5x fp8", _path("eager + cudnn", 1.10, 1.10),
    ),
    ("... vs torch.compile of the same + cuDNN", "1.0x", "1.05x bf16, 1.3x fp8", _path("torch.compile + cudnn", 1, 1)),
    (
        "our Triton attention bf16 D=128 vs cuDNN SDPA; vs torch's default", "0.85x; 1.4x", "1.0x+; 1.7x",
        (_attention("cuDNN", "wan-1.3b", "cudnn", 0.85), _attention("default", "wan-1.3b", "sdpa", 1.4)),
    ),
    (
        "our Triton attention bf16 D=64 vs cuDNN", "0.95x", "1.15x",
        (_attention("cuDNN", "cogvideox-2b", "cudnn", 0.95),),
    ),
    (
        "prologue, share of measured copy bandwidth", "75 %", "90 %",
        (
            Figure("", partial(_figure, "prologue", "wan-1.3b", "fp8_e4m3", "triton", "percent_of_ceiling"), 75, " %"),
        ),
    ),
    (
        "locked layer / unlocked layer, same kernels", "1.03", "1.01",
        tuple(Figure(name, partial(_locked_by_unlocked, name), 1.03, "", least=False) for name in BF16),
    ),
    (
        "step epilogue vs eager torch, kernels launched", "5x, <= 3", "10x, 2",
        (
            Figure("", partial(_ratio, "epilogue", "wan-1.3b", ("triton",), "eager"), 5),
            Figure("launches", partial(_figure, "epilogue", "wan-1.3b", "", "triton", "launches"), 3, "", least=False),
        ),
    ),
    # What follows is no kernel's figure: it needs whole steps and edits.
    ("cache bytes vs naive bf16 of all tokens, 20 % foreground: equal steps; 20 of 50 steps",
     "fp8 2.4x; 6x", "int4 4.2x; 10.5x", ()),
    ("GPU-resident cache bytes in the host tier (two step slots) vs naive, 50 steps", "60x", "100x (int4)", ()),
    ("host streaming exposed", "5 % of a step", "1 %", ()),
    ("cached edit vs source re-run each step", "1.4x", "1.48x", ()),
    ("foreground-only step at 20 % mask", "3x", "4.3x", ()),
    ("whole locked step, Wan-1.3B shape, vs eager diffusers + default SDPA with the lock in plain torch",
     "1.6x", "2.2x", ()),
]  # fmt: skip


def targets(rows: Rows) -> str:
    """The targets as a table; one that was missed says so."""
    text = ["| part | must | record to aim at | measured |", "| --- | --- | --- | --- |"]
    for name, must, record, figures in TARGETS:
        text.append(
            f"| {name} | {must} | {record} | {', '.join(f.text(rows).strip() for f in figures) or 'unmeasured'} |"
        )
    return "\n".join(text)


def peers(rows: Rows) -> str:
    """The best of ours and the best peer of every row."""
    text = ["| row | ours | ms | best peer | ms | ours is faster by |", "| --- | --- | ---: | --- | ---: | ---: |"]
    for row in rows:
        best = {}
        for kind in ("ours", "peer"):
            timed = {n: f["ms"] for n, f in row["contenders"].items() if f["kind"] == kind and f["ms"]}
            best[kind] = min(timed.items(), key=lambda pair: pair[1], default=("-", None))
        (name, ms), (peer, theirs) = best["ours"], best["peer"]
        head = " ".join(filter(None, (row["part"], row["shape"], row["variant"])))
        times = [f"{x:.4f}" if x else "unmeasured" for x in (ms, theirs)]
        factor = f"{theirs / ms:.2f}x" if ms and theirs else "unmeasured"
        if any(f["kind"] == "ours" for f in row["contenders"].values()):
            text.append(f"| {head} | {name} | {times[0]} | {peer} | {times[1]} | {factor} |")
    return "\n".join(text)


def routes(rows: Rows) -> str:
    """Which route of locked attention was fastest on each shape, and the time of all: the dispatch table."""
    names = ("fused", "triton", "cudnn", "sdpa")
    text = [f"| queries | keys | heads x dim | source | fastest | {' | '.join(f'{n}, ms' for n in names)} |"]
    text.append("| ---: | ---: | --- | --- | --- |" + " ---: |" * len(names))
    for row in rows:
        if row["part"] != "dispatch":
            continue
        times = {name: row["contenders"].get(f"route {name}", {}).get("ms") for name in names}
        timed = {name: ms for name, ms in times.items() if ms}
        fastest = min(timed, key=timed.get) if timed else "unmeasured"
        cells = [f"{ms:.4f}" if ms else "-" for ms in times.values()]
        head = [row["queries"], row["tokens"], f"{row['heads']} x {row['dim']}", row["variant"], fastest, *cells]
        text.append(f"| {' | '.join(map(str, head))} |")
    return "\n".join(text)


def heading(found: dict[str, Any]) -> str:
    """What it was measured on."""
    machine, ceilings = found["machine"], found["ceilings"]
    if machine["gpu"] is None:
        return "Unmeasured: there was no GPU."
    most = ", ".join(f"{name.replace('_', ' ')} {value:.0f}" for name, value in ceilings.items() if value)
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    return f"One {machine['gpu']}; {versions}; commit {machine['commit']}. Ceilings measured beside it: {most}."


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command above."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        print("error: give one file of figures, as bench.kernels writes it", file=sys.stderr)
        return 2
    found = json.loads(Path(arguments[0]).read_text())
    rows = found["rows"]
    print("\n\n".join([heading(found), targets(rows), peers(rows), routes(rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
