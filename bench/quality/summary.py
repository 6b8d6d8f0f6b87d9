"""The table from finished cases: means with 95 % intervals, paired differences to `kvlock`, Markdown.

Intervals: percentiles of 2,000 bootstrap samples over cases (always the same ones); of success itself Wilson's, as all
or none of a few cases right would else have no width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.quality.demo_model import interval
from bench.quality.measures import COLUMNS
from bench.quality.rows import CEILING

REFERENCE = "kvlock"
SAMPLES = 2000
Figures = dict[str, dict[str, Any]]
"""Of one row, by case."""

TITLES = {
    "success": "edit is right", "consistency": "consistency", "psnr": "background PSNR, dB", "ssim": "SSIM",
    "lpips": "LPIPS", "seam": "seam error", "flicker": "flicker", "seconds": "seconds", "peak_bytes": "peak memory, GB",
}  # fmt: skip


def bootstrapped(values: list[float]) -> dict[str, float]:
    """Mean and 95 % interval of it."""
    given = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(given), (SAMPLES, len(given)))
    low, high = np.percentile(given[picks].mean(axis=1), (2.5, 97.5))
    return {"mean": float(given.mean()), "low": float(low), "high": float(high)}


def summarise(rows: dict[str, Figures], groups: dict[str, str], unranked: frozenset[str]) -> dict[str, dict[str, Any]]:
    """By row: cases, each column's mean and interval, `difference` to the reference, success by group, rank.

    unranked: rows that are there but not compared.
    """
    found = {}
    for row, figures in rows.items():
        if not figures:
            continue
        summary: dict[str, Any] = {"cases": len(figures), "ranked": row not in unranked and row != CEILING}
        for column in COLUMNS:
            values = [case[column] for case in figures.values() if column in case]
            if values:
                summary[column] = interval(values) if isinstance(values[0], bool) else bootstrapped(values)
                summary[column]["cases"] = len(values)
        summary["difference"] = {} if row == REFERENCE else differences(figures, rows.get(REFERENCE, {}))
        summary["groups"] = _by_group(figures, groups)
        found[row] = summary
    _rank(found)
    return found


def differences(figures: Figures, reference: Figures) -> dict[str, dict[str, float]]:
    """By column: case by case, to the same cases of the reference, their mean and its interval."""
    both = [name for name in figures if name in reference]
    found = {}
    for column in COLUMNS:
        pairs = [
            (figures[n][column], reference[n][column]) for n in both if column in figures[n] and column in reference[n]
        ]
        if pairs:
            found[column] = bootstrapped([float(a) - float(b) for a, b in pairs]) | {"cases": len(pairs)}
    return found


def _by_group(figures: Figures, groups: dict[str, str]) -> dict[str, dict[str, float]]:
    """Means of success and psnr by each word of a case's group, such as its kind and its mask's form."""
    members: dict[str, list[dict[str, Any]]] = {}
    for name, case in figures.items():
        for word in groups[name].split(", "):
            members.setdefault(word, []).append(case)
    return {
        word: {"cases": len(cases)}
        | {
            column: float(np.mean([case[column] for case in cases if column in case]))
            for column in ("success", "psnr")
            if any(column in case for case in cases)
        }
        for word, cases in sorted(members.items())
    }


def _rank(found: dict[str, dict[str, Any]]) -> None:
    """By success, and among equals by the background's PSNR; where success is not known by PSNR alone."""
    ranked = [row for row, summary in found.items() if summary["ranked"]]

    def key(row: str) -> tuple[float, float]:
        columns = (found[row].get(column) for column in ("success", "psnr"))
        return tuple(-column["mean"] if column else 0.0 for column in columns)

    for place, row in enumerate(sorted(ranked, key=key), start=1):
        found[row]["rank"] = place


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """A line a row: means, half an interval's width beside them; then the differences to the reference."""
    columns = [c for c in COLUMNS if any(c in summary for summary in found.values())]
    lines = [
        f"| row | rank | {' | '.join(TITLES[c] for c in columns)} |",
        f"| --- | ---: |{' ---: |' * len(columns)}",
    ]
    for row, summary in found.items():
        cells = [_cell(c, summary.get(c)) for c in columns]
        lines.append(f"| {_shown(row, summary)} | {summary.get('rank', '')} | {' | '.join(cells)} |")
    compared = [c for c in columns if c not in ("seconds", "peak_bytes")]
    if any(summary["difference"] for summary in found.values()):
        lines += [
            "",
            f"Paired differences to `{REFERENCE}`, 95 % intervals; * where 0 is outside:",
            "",
            f"| row | {' | '.join(TITLES[c] for c in compared)} |",
            f"| --- |{' ---: |' * len(compared)}",
        ]
        for row, summary in found.items():
            if summary["difference"]:
                cells = [change(c, summary["difference"].get(c)) for c in compared]
                lines.append(f"| {_shown(row, summary)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(row: str, summary: dict[str, Any]) -> str:
    if row == CEILING:
        return "the autoencoder (ceiling)"
    return f"`{row}`" if summary["ranked"] else f"`{row}` (untrained, not ranked)"


SCALE = {"success": (100.0, "{:.0f} %"), "peak_bytes": (1e-9, "{:.2f}"), "psnr": (1, "{:.1f}"), "seam": (1, "{:.1f}"),
         "seconds": (1, "{:.1f}"), "flicker": (1, "{:+.2f}")}  # fmt: skip


def _cell(column: str, figure: dict[str, float] | None) -> str:
    if figure is None:
        return ""
    scale, form = SCALE.get(column, (1, "{:.3f}"))
    mean = form.format(scale * figure["mean"])
    if column == "success":
        return f"{mean} ({100 * figure['low']:.0f} to {100 * figure['high']:.0f})"
    if column in ("seconds", "peak_bytes"):
        return mean
    half = form.replace("+", "").format(scale * (figure["high"] - figure["low"]) / 2)
    return f"{mean} ± {half}"


def change(column: str, figure: dict[str, float] | None) -> str:
    """A difference as the tables write it."""
    if figure is None:
        return ""
    scale, form = SCALE.get(column, (1, "{:.3f}"))
    form = form.replace("{:", "{:+").replace("++", "+").replace(" %", "")
    low, mean, high = (form.format(scale * figure[name]) for name in ("low", "mean", "high"))
    sure = figure["low"] > 0 or figure["high"] < 0
    return f"{mean} ({low} to {high}){'*' if sure else ''}"
