"""The picture of a profile: the whole run and one step of it as flames, and the shares of the whole as bars."""

import os
from pathlib import Path
from typing import Any

from kvlock_fast.files import atomic_path
from kvlock_fast.nvtx import colour
from kvlock_fast.units import text_seconds

DEEPEST = 8
MOST_BARS = 14
INK, FAINT, OTHER = "#22262b", "#8a9099", "#c9cdd3"


def draw(data: dict[str, Any], path: str | os.PathLike) -> None:
    """A PNG of profile.json's figures. Raises OutputError where the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.4), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, height_ratios=(2.3, 3.2, 3.4))
    ranges = [r for r in data["timeline"] if r["main_thread"] and r["depth"]]
    shown = [r for r in ranges if r["depth"] <= 2]
    _flames(top, shown, 0.0, data["seconds"], f"The whole run, {text_seconds(data['seconds'])} on the host")
    step = _typical_step(ranges)
    if step is None:
        middle.set_axis_off()
    else:
        first, last = step["start"], step["start"] + step["seconds"]
        inner = [r for r in ranges if first <= r["start"] <= last and r["depth"] >= step["depth"]]
        title = f"{step['name'].capitalize()}, {text_seconds(step['seconds'])}, with all that is inside"
        _flames(middle, inner, first, last, title)
    _bars(bottom, data)
    size = "x".join(map(str, data["size"]))
    figure.suptitle(
        f"kvlock-fast profile: {data['model']}, {data['layers']} layers, {data['frames']} frames of {size}, "
        f"{data['steps']} steps, {data['cache_tier']}, {data['dtype']} on {data['device']}",
        x=0.02, ha="left", fontsize=11, color=INK, fontweight="bold",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 0.98), h_pad=1.6)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, metadata={"Software": None}, pil_kwargs={"optimize": True})


def _typical_step(ranges: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The step of median length."""
    steps = sorted((r for r in ranges if r["name"].startswith("step ")), key=lambda r: r["seconds"])
    return steps[len(steps) // 2] if steps else None


def _flames(axes: Any, ranges: list[dict[str, Any]], first: float, last: float, title: str) -> None:
    """Ranges from left to right in time, inner ones below outer ones."""
    unit, scale = ("ms", 1e3) if last - first < 2 else ("s", 1.0)
    least = min((r["depth"] for r in ranges), default=0)
    rows = min(DEEPEST, max((r["depth"] - least for r in ranges), default=0) + 1)
    for r in ranges:
        level = r["depth"] - least
        if level >= rows:
            continue
        left, width = (r["start"] - first) * scale, r["seconds"] * scale
        axes.barh(level, width, left=left, height=0.9, align="center", color=_hex(r["name"]), edgecolor="white",
                  linewidth=0.4 if r["seconds"] > 0.002 * (last - first) else 0)  # fmt: skip
        label = _label(r["name"], r["seconds"] / (last - first))
        if label:
            axes.text(left + width / 2, level, label, ha="center", va="center", fontsize=8, color=_ink(r["name"]),
                      clip_on=True)  # fmt: skip
    axes.set(xlim=(0, (last - first) * scale), ylim=(rows - 0.5, -0.5), yticks=[])
    axes.set_xlabel(unit, fontsize=8, color=FAINT)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    _plain(axes)


def _label(name: str, share: float) -> str:
    """The name where it has room at 8 points in 12 inches; else its number, or nothing."""
    room = share * 175
    if len(name) + 1 <= room:
        return name
    number = name.rpartition(" ")[2]
    return number if number[:1].isdigit() and len(number) + 1 <= room else ""


def _bars(axes: Any, data: dict[str, Any]) -> None:
    """The exclusive time of each range, the longest first."""
    rows = sorted(data["ranges"], key=lambda row: -row["seconds"])
    shown, rest = rows[:MOST_BARS], rows[MOST_BARS:]
    if rest:
        seconds = sum(row["seconds"] for row in rest)
        shown = [*shown, {"range": f"{len(rest)} more", "seconds": seconds, "share": seconds / data["seconds"],
                          "launches": sum(row["launches"] for row in rest)}]  # fmt: skip
    widest = max(row["share"] for row in shown)
    for i, row in enumerate(shown):
        axes.barh(i, row["share"], height=0.8, color=_hex(row["range"]))
        text = f"{100 * row['share']:.1f} %   {text_seconds(row['seconds'])}   {row['launches']} {data['launches_of']}"
        axes.text(row["share"] + 0.006 * widest, i, text, va="center", fontsize=8, color=INK)
    axes.set(xlim=(0, 1.3 * widest), ylim=(len(shown) - 0.4, -0.6), xticks=[], yticks=range(len(shown)))
    title = f"Exclusive time by range ({data['time_of']}); together {text_seconds(data['seconds'])}"
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    _plain(axes)
    axes.spines["bottom"].set_visible(False)
    axes.set_yticklabels([row["range"] for row in shown], color=INK)


def _plain(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(axis="both", length=0, labelsize=8, colors=FAINT)


def _hex(name: str) -> str:
    return OTHER if name in ("other", "idle") or name.endswith("more") else f"#{colour(name):06x}"


def _ink(name: str) -> str:
    """Black or white, whichever reads better on the range's colour."""
    value = colour(name)
    light = 0.299 * (value >> 16) + 0.587 * (value >> 8 & 255) + 0.114 * (value & 255)
    return INK if light > 145 else "white"
