"""The table from finished cases: means with 95 % intervals, paired differences to the default row, Markdown.

Intervals: percentiles of 2,000 bootstrap samples over cases (always the same ones); of success itself Wilson's, as all
or none of a few cases right would else have no width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.quality.demo_model import interval
from bench.quality.measures import COLUMNS, EXACT, own_error
from bench.quality.rows import CEILING, CLIP, base_of

REFERENCE = "kvlock"
"""The default, that differences are to."""
SAMPLES = 2000
Figures = dict[str, dict[str, Any]]
"""Of one row, by case."""

TITLES = {
    "success": "edit is right", "one_object": "right: one object", "second_object": "right: beside a second object",
    "second_whole": "the same, by captions of the whole clip", "whole_frame": "whole frame PSNR, dB", "lpips": "LPIPS",
    "consistency": "consistency", "psnr": "background PSNR, dB", "delivered_psnr": "delivered PSNR, dB",
    "own_error": "own error, 1e-4", "ssim": "SSIM", "seam": "seam error", "delivered_seam": "delivered seam step",
    "flicker": "flicker", "seconds": "seconds", "peak_bytes": "peak memory, GB",
}  # fmt: skip
TABLES = {
    "The edit": ("success", "one_object", "second_object", "second_whole", "whole_frame", "lpips", "consistency"),
    "The background and the mask's edge: the model's own video, and delivered, pasted into the source": (
        "psnr", "delivered_psnr", "own_error", "ssim", "seam", "delivered_seam", "flicker", "seconds", "peak_bytes"
    ),
}  # fmt: skip
"""Columns side by side, by what is said above them."""
COMPARED = (
    ("success", "second_object", "second_whole", "whole_frame", "lpips"),
    ("psnr", "own_error", "seam", "delivered_seam", "flicker"),
)
"""Columns of the paired differences: two tables."""
SHARES = ("success", "one_object", "second_object", "second_whole")


def bootstrapped(values: list[float]) -> dict[str, float]:
    """Mean and 95 % interval of it."""
    given = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(given), (SAMPLES, len(given)))
    low, high = np.percentile(given[picks].mean(axis=1), (2.5, 97.5))
    return {"mean": float(given.mean()), "low": float(low), "high": float(high)}


def summarise(rows: dict[str, Figures], groups: dict[str, str], unranked: frozenset[str]) -> dict[str, dict[str, Any]]:
    """By row: cases, each column's mean and interval, `difference` to the reference, success by group, rank.

    unranked: rows that are there but not compared. Of a row with captions of the whole clip the success is a column of
    the row without.
    """
    found = {}
    rows = _with_columns(rows, groups)
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


def _with_columns(rows: dict[str, Figures], groups: dict[str, str]) -> dict[str, Figures]:
    """Rows with the columns that other rows or a case's group decide, without those by captions of the whole clip."""
    found: dict[str, Figures] = {row: {} for row in rows if row == base_of(row)}
    for row, figures in found.items():
        whole = rows.get(f"{row}/{CLIP}", {})
        for name, case in rows[row].items():
            figures[name] = dict(case)
            if "psnr" in case and "psnr" in rows.get(CEILING, {}).get(name, {}):
                figures[name]["own_error"] = own_error(case["psnr"], rows[CEILING][name]["psnr"])
            for group in ("one object", "second object"):
                if "success" in case and group in groups[name].split(", "):
                    figures[name][group.replace(" ", "_")] = case["success"]
            if "success" in whole.get(name, {}):
                figures[name]["second_whole"] = whole[name]["success"]
    return found


def by_captions(rows: dict[str, Figures]) -> dict[str, dict[str, dict[str, float]]]:
    """Means by captions of the masked region and of the whole clip, and their paired difference, by row and column."""
    found = {}
    for row, figures in rows.items():
        region = rows.get(base_of(row), {})
        if row == base_of(row) or not set(figures) & set(region):
            continue
        both = {name: region[name] for name in figures if name in region}
        found[base_of(row)] = {
            column: {
                "region": float(np.mean([case[column] for case in both.values() if column in case])),
                "clip": float(np.mean([figures[name][column] for name in both if column in figures[name]])),
                **difference,
            }
            for column, difference in differences(both, figures).items()
        }
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
    """Rank rows by success, then by the whole frame's PSNR; where neither is known, by the background's."""
    ranked = [row for row, summary in found.items() if summary["ranked"]]

    def key(row: str) -> tuple[float, ...]:
        columns = (found[row].get(column) for column in ("success", "whole_frame", "psnr"))
        return tuple(-column["mean"] if column else 0.0 for column in columns)

    for place, row in enumerate(sorted(ranked, key=key), start=1):
        found[row]["rank"] = place


def markdown(found: dict[str, dict[str, Any]], captions: dict[str, dict[str, dict[str, float]]] | None = None) -> str:
    """A line a row: means, half an interval's width beside them; then the differences to the reference.

    captions: of `by_captions`, a table of its own.
    """
    lines: list[str] = []
    for title, columns in TABLES.items():
        columns = [c for c in columns if any(c in summary for summary in found.values())]
        cells = {
            row: [str(summary.get("rank", "")), *(cell(c, summary.get(c)) for c in columns)]
            for row, summary in found.items()
        }
        lines += [f"{title}:", "", *_table(found, ["rank", *(_title(c, found) for c in columns)], cells), ""]
    for columns in COMPARED:
        columns = [c for c in columns if any(c in summary["difference"] for summary in found.values())]
        cells = {
            row: [change(c, summary["difference"].get(c)) for c in columns]
            for row, summary in found.items()
            if any(c in summary["difference"] for c in columns)
        }
        if cells:
            lines += [f"Paired differences to `{REFERENCE}`, 95 % intervals; * where 0 is outside:", ""]
            lines += [*_table(found, [TITLES[c] for c in columns], cells), ""]
    return "\n".join(lines[:-1]) + "\n" + _by_captions(captions or {})


def _table(found: dict[str, dict[str, Any]], titles: list[str], cells: dict[str, list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    head = [f"| row | {' | '.join(titles)} |", f"| --- |{' ---: |' * len(titles)}"]
    return head + [f"| {_shown(row, found[row])} | {' | '.join(listed)} |" for row, listed in cells.items()]


def _title(column: str, found: dict[str, dict[str, Any]]) -> str:
    """Title of a column; of a share with the number of edits that it is of."""
    counts = {summary[column]["cases"] for summary in found.values() if column in summary}
    return f"{TITLES[column]} (of {max(counts)})" if column in SHARES else TITLES[column]


def _by_captions(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Table of edits beside a second object by both kinds of captions."""
    columns = [c for c in ("success", "whole_frame", "psnr", "seam") if any(c in one for one in found.values())]
    if not columns:
        return ""
    lines = [
        "",
        "Edits beside a second object: captions of what the mask shows, of the whole clip, and the paired difference:",
        "",
        f"| row | {' | '.join(TITLES[c] for c in columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
    ]
    for row, one in found.items():
        cells = []
        for column in columns:
            scale, form = SCALE.get(column, (1, "{:.3f}"))
            if column in one:
                region, clip = (form.format(scale * one[column][name]) for name in ("region", "clip"))
                cells.append(f"{region}, {clip}: {change(column, one[column])}")
            else:
                cells.append("")
        lines.append(f"| `{row}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(row: str, summary: dict[str, Any]) -> str:
    if row == CEILING:
        return "the autoencoder (ceiling)"
    return f"`{row}`" if summary["ranked"] else f"`{row}` (untrained, not ranked)"


SCALE = {
    **dict.fromkeys(SHARES, (100.0, "{:.0f} %")),
    **dict.fromkeys(("psnr", "whole_frame", "delivered_psnr"), (1, "{:.2f}")),
    **dict.fromkeys(("seam", "delivered_seam", "seconds"), (1, "{:.1f}")),
    "own_error": (1e4, "{:.1f}"), "flicker": (1, "{:+.2f}"), "peak_bytes": (1e-9, "{:.2f}"),
}  # fmt: skip
"""Factor and format of a column's cells; three digits for the others."""


def cell(column: str, figure: dict[str, float] | None) -> str:
    """A mean as the tables write it, with its interval or half of that's width."""
    if figure is None:
        return ""
    if column == "delivered_psnr" and figure["low"] == EXACT:
        return "exact"
    scale, form = SCALE.get(column, (1, "{:.3f}"))
    mean = form.format(scale * figure["mean"])
    if column in SHARES:
        return f"{mean} ({100 * max(figure['low'], 0):.0f} to {100 * figure['high']:.0f})"
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
