"""Pictures of the figures of bench.kernels: the roofline, and how many times faster ours are than each peer.

python -m bench.kernels.plot out/kernels.json out/plots       # writes roofline.png and ratios.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
COLOURS = {"ours": "tab:blue", "peer": "tab:orange"}


def roofline(found: dict[str, Any], path: Path) -> bool:
    """Attention rows by intensity, under the ceilings that were measured; False if nothing was."""
    import matplotlib.pyplot as plt

    ceilings, points = found["ceilings"], _points(found["rows"])
    if not points or not ceilings["copy_gbps"] or not ceilings["bf16_tflops"]:
        return False
    figure, axes = plt.subplots(figsize=(9, 5.5))
    bandwidth = ceilings["copy_gbps"] / 1e3  # TB/s, so that intensity times it is TFLOP/s
    intensities = [min(p[0] for p in points) / 2, max(p[0] for p in points) * 2]
    for name, style in (("bf16_tflops", "-"), ("fp8_tflops", "--")):
        if ceilings[name]:
            knee = ceilings[name] / bandwidth
            xs = sorted({*intensities, min(max(knee, intensities[0]), intensities[1])})
            axes.plot(
                xs, [min(x * bandwidth, ceilings[name]) for x in xs], style, color="0.4", label=name.split("_")[0]
            )
    for kind, colour in COLOURS.items():
        chosen = [p for p in points if p[2] == kind]
        axes.scatter([p[0] for p in chosen], [p[1] for p in chosen], s=18, color=colour, label=kind)
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte that must be moved", ylabel="TFLOP/s")
    axes.set_title(found["machine"]["gpu"])
    axes.legend()
    _save(figure, path)
    return True


def _points(rows: Rows) -> list[tuple[float, float, str]]:
    """(FLOP a byte, TFLOP/s, kind) of what was timed in the attention rows, where q, k, v and the output are moved."""
    points = []
    for row in rows:
        if row["part"] != "attention":
            continue
        moved = 2 * 2 * (row["queries"] + row["tokens"]) * row["heads"] * row["dim"]
        intensity = 4.0 * row["queries"] * row["tokens"] * row["heads"] * row["dim"] / moved
        points += [
            (intensity, f["tflops"], f["kind"])
            for f in row["contenders"].values()
            if f["kind"] in COLOURS and f["tflops"]
        ]
    return points


def ratios(found: dict[str, Any], path: Path) -> bool:
    """A bar for each of ours against each peer, a row of bars for each shape; False if nothing was measured."""
    import matplotlib.pyplot as plt

    bars = [
        (f"{row['part']} {row['shape']}: {name} / {peer}", value)
        for row in found["rows"]
        if row["part"] in ("attention", "locked", "epilogue")
        for name, by_peer in row["ratios"].items()
        for peer, value in by_peer.items()
        if value
    ]
    if not bars:
        return False
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(bars)))
    names, values = zip(*reversed(bars), strict=True)
    axes.barh(names, values, color=["tab:green" if value >= 1 else "tab:red" for value in values])
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set(xscale="log", xlabel="times faster than the peer", title=found["machine"]["gpu"])
    axes.tick_params(axis="y", labelsize=7)
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command above."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2 or not Path(arguments[0]).is_file():
        print("error: give a file of figures, as bench.kernels writes it, and a folder", file=sys.stderr)
        return 2
    import matplotlib

    matplotlib.use("Agg")
    found, folder = json.loads(Path(arguments[0]).read_text()), Path(arguments[1])
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [draw(found, folder / f"{draw.__name__}.png") for draw in (roofline, ratios)]
    if not all(drawn):
        print(f"error: nothing was measured in '{arguments[0]}', so there is nothing to draw", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
