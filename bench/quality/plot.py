"""Pictures of the table: success against the background, differences to the reference, success by kind of edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.quality.rows import CEILING
from bench.quality.summary import REFERENCE
from kvlock_fast.files import atomic_path

Found = dict[str, dict[str, Any]]


def plot_table(found: Found, path: Path) -> None:
    """One PNG of three panels (of two, where nobody knows whether an edit is right)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    judged = any("success" in summary for summary in found.values())
    height = 2.5 + 0.32 * len(found)
    figure, axes = plt.subplots(1, 3 if judged else 2, figsize=(20 if judged else 13, height), layout="constrained")
    figure.set_facecolor("white")
    _points(axes[0], found, "success" if judged else "seam")
    _differences(axes[1], found)
    if judged:
        _kinds(axes[2], found)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def _points(axes: Any, found: Found, column: str) -> None:
    """A point a row with both intervals; numbers stand for names, which would lie over each other."""
    rows = [row for row, summary in found.items() if "psnr" in summary and column in summary]
    scale = 100 if column == "success" else 1
    for number, row in enumerate(rows, start=1):
        x, y = found[row]["psnr"], found[row][column]
        colour = "tab:green" if row == CEILING else "tab:red" if row == REFERENCE else "tab:blue"
        bars = [[[f["mean"] - f["low"]], [f["high"] - f["mean"]]] for f in (x, y)]
        axes.errorbar(
            x["mean"], scale * y["mean"], xerr=bars[0], yerr=scale * np.array(bars[1]), fmt="o", ms=4, lw=0.7,
            color=colour, alpha=0.9, label=f"{number} {row}",
        )  # fmt: skip
        axes.annotate(str(number), (x["mean"], scale * y["mean"]), xytext=(4, 4), textcoords="offset points", size=8)
    axes.set_xlabel("background PSNR, dB")
    axes.set_ylabel("edit is right, %" if column == "success" else "seam error")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4, handlelength=1)
    axes.grid(alpha=0.3)
    axes.set_title("Means and 95 % intervals")


def _differences(axes: Any, found: Found) -> None:
    """Of the background's PSNR, and of success beside it, to the reference."""
    rows = [row for row, summary in found.items() if summary["difference"] and row != CEILING][::-1]
    places = np.arange(len(rows))
    for column, scale, colour, shift in (("psnr", 1, "tab:blue", 0.15), ("success", 10, "tab:orange", -0.15)):
        with_column = [(p, found[r]["difference"][column]) for p, r in zip(places, rows, strict=True)
                       if column in found[r]["difference"]]  # fmt: skip
        if with_column:
            means = np.array([scale * f["mean"] for _, f in with_column])
            low, high = (np.array([scale * f[name] for _, f in with_column]) for name in ("low", "high"))
            label = "PSNR, dB" if column == "psnr" else "right, in 10 points of 100"
            axes.errorbar(means, [p + shift for p, _ in with_column], xerr=[means - low, high - means], fmt="o", ms=4,
                          color=colour, label=label)  # fmt: skip
    axes.axvline(0, color="0.4", lw=0.8)
    axes.set_yticks(places, rows, fontsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="x")
    axes.set_title(f"Difference to {REFERENCE}, case by case")


def _kinds(axes: Any, found: Found) -> None:
    """Success by kind of edit and form of mask."""
    rows, groups = list(found), sorted({group for summary in found.values() for group in summary["groups"]})
    shares = np.array([[found[r]["groups"].get(g, {}).get("success", np.nan) for g in groups] for r in rows])
    axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for i, j in np.ndindex(shares.shape):
        if np.isfinite(shares[i, j]):
            axes.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", size=8)
    axes.set_xticks(range(len(groups)), groups, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_title("Edits that are right, %")
