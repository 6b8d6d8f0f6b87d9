"""Pictures of the table: the edit against its background, differences to the reference, seams, success by kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.quality.rows import CEILING
from bench.quality.summary import REFERENCE, TITLES
from kvlock_fast.files import atomic_path

Found = dict[str, dict[str, Any]]
SEAMS = {"seam": "raw: error of the ring around the mask", "delivered_seam": "delivered: step across the mask's edge"}
COLOURS = {CEILING: "tab:green", REFERENCE: "tab:red"}


def plot_table(found: Found, path: Path) -> None:
    """One PNG of four panels (of three, where nobody knows whether an edit is right)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    judged = any("success" in summary for summary in found.values())
    size = (27 if judged else 19, 3.2 + 0.34 * len(found))
    figure, axes = plt.subplots(1, 4 if judged else 3, figsize=size, layout="constrained")
    figure.set_facecolor("white")
    _points(axes[0], found, "whole_frame" if judged else "seam")
    _differences(axes[1], found, "whole_frame" if judged else "ssim")
    _seams(axes[2], found)
    if judged:
        _kinds(axes[3], found)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def _points(axes: Any, found: Found, column: str) -> None:
    """A point a row with both intervals; numbers stand for names, which would lie over each other."""
    rows = [row for row, summary in found.items() if "psnr" in summary and column in summary]
    for number, row in enumerate(rows, start=1):
        x, y = found[row]["psnr"], found[row][column]
        bars = [[[f["mean"] - f["low"]], [f["high"] - f["mean"]]] for f in (x, y)]
        axes.errorbar(
            x["mean"], y["mean"], xerr=bars[0], yerr=bars[1], fmt="o", ms=4, lw=0.7,
            color=COLOURS.get(row, "tab:blue"), alpha=0.9, label=f"{number} {row}",
        )  # fmt: skip
        axes.annotate(str(number), (x["mean"], y["mean"]), xytext=(4, 4), textcoords="offset points", size=8)
    axes.set_xlabel(TITLES["psnr"])
    axes.set_ylabel(TITLES[column])
    below = -0.9 / axes.figure.get_figheight()  # clear of the axis' title, however tall the picture is
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, below), ncols=3, handlelength=1)
    axes.grid(alpha=0.3)
    axes.set_title("Means and 95 % intervals of the model's own video")


def _differences(axes: Any, found: Found, other: str) -> None:
    """Differences of the background's PSNR, and of another column beside it, to the reference."""
    rows = [row for row, summary in found.items() if summary["difference"] and row != CEILING][::-1]
    places = np.arange(len(rows))
    for column, colour, shift in (("psnr", "tab:blue", 0.15), (other, "tab:orange", -0.15)):
        with_column = [(p, found[r]["difference"][column]) for p, r in zip(places, rows, strict=True)
                       if column in found[r]["difference"]]  # fmt: skip
        if with_column:
            means, low, high = (np.array([f[name] for _, f in with_column]) for name in ("mean", "low", "high"))
            axes.errorbar(means, [p + shift for p, _ in with_column], xerr=[means - low, high - means], fmt="o", ms=4,
                          color=colour, label=TITLES[column])  # fmt: skip
    axes.axvline(0, color="0.4", lw=0.8)
    axes.set_yticks(places, rows, fontsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="x")
    axes.set_title(f"Difference to {REFERENCE}, edit by edit")


def _seams(axes: Any, found: Found) -> None:
    """Raw and delivered seam of every row, side by side."""
    rows = [row for row, summary in found.items() if "seam" in summary][::-1]
    for column, colour, shift in (("seam", "tab:blue", 0.15), ("delivered_seam", "tab:purple", -0.15)):
        drawn = [(p, found[row][column]) for p, row in enumerate(rows) if column in found[row]]
        if drawn:
            means, low, high = (np.array([f[name] for _, f in drawn]) for name in ("mean", "low", "high"))
            axes.errorbar(means, [p + shift for p, _ in drawn], xerr=[means - low, high - means], fmt="o", ms=4,
                          color=colour, label=SEAMS[column])  # fmt: skip
    axes.set_yticks(np.arange(len(rows)), rows, fontsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3, axis="x")
    axes.set_title("Seams, root mean square, 0 to 255")


def _kinds(axes: Any, found: Found) -> None:
    """Success by kind of edit, form of mask, objects and captions."""
    rows, groups = list(found), sorted({group for summary in found.values() for group in summary["groups"]})
    shares = np.array(
        [
            [
                *(found[r]["groups"].get(g, {}).get("success", np.nan) for g in groups),
                found[r].get("second_whole", {}).get("mean", np.nan),
            ]
            for r in rows
        ]
    )
    axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for i, j in np.ndindex(shares.shape):
        if np.isfinite(shares[i, j]):
            colour = "black" if 0.15 < shares[i, j] < 0.85 else "white"
            axes.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", size=8, color=colour)
    names = [*groups, "second object,\nthe clip's captions"]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_title("Edits that are right, %")
