"""A picture of the edits of bench.cache: bytes of the cache against background PSNR and the share of right edits.

python -m bench.cache.plot bench/results/cache.json     # writes bench/results/cache.png
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

COLOURS = {"native": "0.25", "bf16": "tab:brown", "fp8_e4m3": "tab:blue", "int8": "tab:green", "int4": "tab:red"}
MARKERS = {1: "o", 2: "s", 4: "^"}
PANELS = {"psnr_locked": "background PSNR, dB", "right": "edits judged right, %"}
WAYS = ((0, 1), (0, -1), (1.6, 0.7), (-1.6, 0.7), (1.6, -0.7), (-1.6, -0.7))  # where a label may be
TITLES = {"model": "background locked by K and V alone", "source": "background latents from the source (kvlock)"}


def draw(found: dict[str, Any], path: Path) -> bool:
    """A row of panels for each choice of background_latents; False, and no file, if no stored cache was measured."""
    measured = [row for row in found["edits"] or () if "unmeasured" not in row and is_shown(row)]
    shown = [latents for latents in TITLES if any(r["latents"] == latents and r["format"] for r in measured)]
    if not shown:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(shown), 2, figsize=(11, 4.4 * len(shown) + 0.6), squeeze=False)
    drawn = []
    for latents, pair in zip(shown, panels, strict=True):
        rows = [row for row in measured if row["latents"] == latents]
        for figure_name, axes in zip(PANELS, pair, strict=True):
            _panel(axes, rows, figure_name)
            axes.set_title(TITLES[latents], fontsize=10)
            drawn.append((axes, [row for row in rows if row["format"]], figure_name))
    _legend(figure, measured)
    cases = max(row["cases"] for row in measured)
    note = f"Held-out cases a point: {cases}. Bars: 95 % intervals; those of PSNR are of the change against lockstep."
    figure.text(0.5, 0.006, note, ha="center", fontsize=9)
    figure.tight_layout(rect=(0, 0.02, 1, 1 - 0.55 / figure.get_figheight()))
    figure.canvas.draw()  # places everything, so that labels can look where there is room
    for axes, rows, figure_name in drawn:
        _label(axes, rows, figure_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def is_shown(row: dict[str, Any]) -> bool:
    """Not the other ways to choose a neighbour, and of the wide formats no thinned ones: smaller ones beat them."""
    thinned = row["stride"] > 1 or row["steps"] == "dynamic"
    return row["stands"] is None and not (thinned and row["format"] in ("native", "bf16"))


def point(row: dict[str, Any], name: str) -> tuple[float, float]:
    """MB, and dB or per cent."""
    return row["bytes"]["mean"] / 1e6, row[name]["mean"] * (100 if name == "right" else 1)


def _panel(axes: Any, rows: list[dict[str, Any]], name: str) -> None:
    """The points with 95 % intervals (PSNR: of the change against lockstep), and lockstep as a line."""
    from matplotlib.ticker import NullLocator

    scale = 100 if name == "right" else 1
    lockstep = next((row for row in rows if row["format"] is None), None)
    if lockstep is not None:
        axes.axhline(scale * lockstep[name]["mean"], color="0.6", linestyle="--", linewidth=1, zorder=1)
    for row in (row for row in rows if row["format"]):
        x, y = point(row, name)
        around = row[name] if name == "right" else row["change"][name]
        below, above = (scale * abs(around[end] - around["mean"]) for end in ("low", "high"))
        colour = COLOURS[row["format"]]
        axes.errorbar(x, y, [[below], [above]], color=colour, elinewidth=0.8, alpha=0.35, zorder=2)
        filled = colour if row["steps"] == "all" else "white"
        axes.plot(x, y, MARKERS[row["stride"]], color=colour, markerfacecolor=filled, markersize=6, zorder=3)
    axes.set(xscale="log", xlabel="MB of cache an edit", ylabel=PANELS[name])
    axes.margins(x=0.12, y=0.22)
    axes.set_xticks([m * 10**p for p in (-2, -1, 0, 1, 2) for m in (1, 2, 5)])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    xs = [point(row, name)[0] for row in rows if row["format"]]
    axes.set_xlim(min(xs) / 1.5, max(xs) * 1.5)
    axes.grid(alpha=0.25, linewidth=0.5)
    if name == "right":
        low = 100 * min(row["right"]["low"] for row in rows) - 4
        axes.set_ylim(low, 110)
        axes.set_yticks(range(10 * math.ceil(low / 10), 101, 10))
    else:  # no less than 1 dB, so that noise looks like noise
        low, high = axes.get_ylim()
        more = max(0.0, 1 - (high - low)) / 2
        axes.set_ylim(low - more, high + more)


def _legend(figure: Any, rows: list[dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    formats = [format for format in COLOURS if any(row["format"] == format for row in rows)]
    handles = [Line2D([], [], color=COLOURS[format], marker="o", linestyle="", label=format) for format in formats]
    handles += [
        Line2D([], [], color="0.25", marker=marker, linestyle="", label=f"of {stride} steps one stored (1/{stride})")
        for stride, marker in MARKERS.items()
        if stride > 1
    ]
    hollow = dict(color="0.25", marker="o", markerfacecolor="white", linestyle="")
    handles.append(Line2D([], [], **hollow, label="of the last 8 of 20 steps (d)"))
    handles.append(Line2D([], [], color="0.6", linestyle="--", label="lockstep, nothing stored"))
    figure.legend(handles=handles, loc="upper center", ncols=5, fontsize=9, frameon=False)


def short(row: dict[str, Any]) -> str:
    """Like "fp8 1/2 d": one of two of the dynamic steps."""
    stride, dynamic = "" if row["stride"] == 1 else f" 1/{row['stride']}", " d" * (row["steps"] == "dynamic")
    return row["format"].removesuffix("_e4m3") + stride + dynamic


def _label(axes: Any, rows: list[dict[str, Any]], name: str) -> None:
    """A label beside each point, as near as it covers neither another label nor a point."""
    points = axes.transData.transform([point(row, name) for row in rows])
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    places = [(distance * a, distance * b) for distance in range(11, 140, 5) for a, b in WAYS]
    for row in sorted(rows, key=lambda row: row["bytes"]["mean"]):
        next((place for place in places if _fits(axes, row, name, place, taken)), None)


def _fits(axes: Any, row: dict, name: str, place: tuple[float, float], taken: list[tuple]) -> bool:
    """Put the label so many points away if there is room; its box is taken then."""
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text

    text = axes.annotate(
        short(row), point(row, name), place, textcoords="offset points", ha="center", va="center", fontsize=8,
        color=COLOURS[row["format"]], arrowprops=dict(arrowstyle="-", color="0.7", linewidth=0.5, shrinkA=1, shrinkB=3),
    )  # fmt: skip
    text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    text.update_positions(axes.figure.canvas.get_renderer())
    frame, box = axes.get_window_extent(), Text.get_window_extent(text)
    inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    if inside and all(box.x1 < x0 or x1 < box.x0 or box.y1 < y0 or y1 < box.y0 for x0, y0, x1, y1 in taken):
        taken.append((box.x0 - 2, box.y0 - 2, box.x1 + 2, box.y1 + 2))
        return True
    text.remove()
    return False


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
