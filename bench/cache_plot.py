"""A picture of the edits of bench/cache.py: bytes of the cache against background PSNR and the share of right edits.

python -m bench.cache_plot bench/results/cache.json     # writes bench/results/cache.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLOURS = {"native": "0.25", "bf16": "tab:brown", "fp8_e4m3": "tab:blue", "int8": "tab:green", "int4": "tab:red"}
MARKERS = {1: "o", 2: "s", 4: "^"}
PANELS = {"psnr_locked": "background PSNR, dB", "right": "edits judged right, %"}
TITLES = {"model": "background locked by K and V alone", "source": "background latents from the source (kvlock)"}


def draw(found: dict[str, Any], path: Path) -> bool:
    """A row of panels for each choice of background_latents; False, and no file, if no stored cache was measured."""
    measured = [row for row in found["edits"] or () if "unmeasured" not in row and row["stands"] is None]
    shown = [latents for latents in TITLES if any(r["latents"] == latents and r["format"] for r in measured)]
    if not shown:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(shown), 2, figsize=(11, 4.4 * len(shown) + 0.8), squeeze=False)
    for latents, pair in zip(shown, panels, strict=True):
        rows = [row for row in measured if row["latents"] == latents]
        for figure_name, axes in zip(PANELS, pair, strict=True):
            _panel(axes, rows, figure_name)
            axes.set_title(TITLES[latents], fontsize=10)
    _legend(figure, measured)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.9 / figure.get_figheight()))
    for latents, pair in zip(shown, panels, strict=True):
        for axes in pair:
            _label(axes, [row for row in measured if row["latents"] == latents and row["format"]])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def _panel(axes: Any, rows: list[dict[str, Any]], name: str) -> None:
    """The points with 95 % intervals (PSNR: of the change against lockstep), and lockstep as a line."""
    scale = 100 if name == "right" else 1
    lockstep = next((row for row in rows if row["format"] is None), None)
    if lockstep is not None:
        axes.axhline(scale * lockstep[name]["mean"], color="0.6", linestyle="--", linewidth=1, zorder=1)
    axes.points = {}
    for row in (row for row in rows if row["format"]):
        x, y = row["bytes"]["mean"] / 1e6, scale * row[name]["mean"]
        around = row[name] if name == "right" else row["change"][name]
        below, above = (scale * abs(around[end] - around["mean"]) for end in ("low", "high"))
        colour = COLOURS[row["format"]]
        axes.errorbar(x, y, [[below], [above]], color=colour, elinewidth=0.8, alpha=0.35, zorder=2)
        filled = colour if row["steps"] == "all" else "white"
        axes.plot(x, y, MARKERS[row["stride"]], color=colour, markerfacecolor=filled, markersize=6, zorder=3)
        axes.points[row["name"]] = (x, y)
    axes.set(xscale="log", xlabel="MB of cache an edit (log)", ylabel=PANELS[name])
    axes.margins(x=0.12, y=0.22)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    if name == "right":
        axes.set_ylim(min(60, *(y - 5 for _, y in axes.points.values())), 112)
        axes.set_yticks(range(60, 101, 10))


def _legend(figure: Any, rows: list[dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    formats = [format for format in COLOURS if any(row["format"] == format for row in rows)]
    handles = [Line2D([], [], color=COLOURS[format], marker="o", linestyle="", label=format) for format in formats]
    handles += [
        Line2D([], [], color="0.25", marker=marker, linestyle="", label=f"of {stride} steps one stored")
        for stride, marker in MARKERS.items()
        if stride > 1
    ]
    handles.append(
        Line2D([], [], color="0.25", marker="o", markerfacecolor="white", linestyle="", label="last 8 of 20 steps")
    )
    handles.append(Line2D([], [], color="0.6", linestyle="--", label="lockstep, nothing stored"))
    figure.legend(handles=handles, loc="upper center", ncols=5, fontsize=9, frameon=False)


def short(row: dict[str, Any]) -> str:
    """Like "fp8 1/2 w": one of two steps, of the window."""
    stride, window = "" if row["stride"] == 1 else f" 1/{row['stride']}", " w" * (row["steps"] == "window")
    return row["format"].removesuffix("_e4m3") + stride + window


def _label(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A label beside each point, where it covers neither another label nor a point."""
    renderer = axes.figure.canvas.get_renderer()
    points = axes.transData.transform(list(axes.points.values()))
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    frame = axes.get_window_extent(renderer)
    for row in sorted(rows, key=lambda row: row["bytes"]["mean"]):
        best = None
        for distance in range(10, 130, 6):
            for way in ((0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7)):
                best = _try(axes, row, [distance * w for w in way], taken, frame, renderer)
                if best:
                    break
            if best:
                break


def _try(axes: Any, row: dict, offset: list[float], taken: list[tuple], frame: Any, renderer: Any) -> Any:
    """The label so many points away, if there is room; its box is taken then."""
    text = axes.annotate(
        short(row), axes.points[row["name"]], offset, textcoords="offset points", ha="center", va="center", fontsize=7.5,
        color=COLOURS[row["format"]], arrowprops=dict(arrowstyle="-", color="0.7", linewidth=0.5, shrinkA=1, shrinkB=3),
    )  # fmt: skip
    box = text.get_window_extent(renderer)
    inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    free = all(box.x1 < x0 or x1 < box.x0 or box.y1 < y0 or y1 < box.y0 for x0, y0, x1, y1 in taken)
    if not (inside and free):
        text.remove()
        return None
    taken.append((box.x0 - 1, box.y0 - 1, box.x1 + 1, box.y1 + 1))
    return text


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command above."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        print("error: give one file of figures, as bench.cache writes it", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    if not draw(json.loads(path.read_text()), path.with_suffix(".png")):
        print(f"error: no edit was measured in '{path}', so there is nothing to draw", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
