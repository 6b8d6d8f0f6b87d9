"""Whether runs on different edits agree: rows' means and their paired differences, by their 95 % intervals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.quality.rows import CEILING
from bench.quality.summary import REFERENCE, TITLES, cell, change
from kvlock_fast.errors import InputError

Found = dict[str, dict[str, Any]]
COLUMNS = ("success", "second_object", "whole_frame", "lpips", "psnr", "own_error", "seam", "delivered_seam", "flicker")
"""Columns that are compared."""


@dataclass(frozen=True)
class Agreement:
    """One figure in both runs, as cells of a table, and whether the two intervals share a value."""

    row: str
    column: str
    earlier: str
    again: str
    agrees: bool


def compare(earlier: Found, again: Found) -> list[Agreement]:
    """Each column of each row that both runs have, and of its difference to the reference; without the ceiling's."""
    found = []
    for row in again:
        if row == CEILING or row not in earlier:
            continue
        for column in COLUMNS:
            for name, of, form in ((row, lambda s: s, cell), (f"{row} to {REFERENCE}", _differences, change)):
                a, b = (of(run[row]).get(column) for run in (earlier, again))
                if a is not None and b is not None:
                    shared = max(a["low"], b["low"]) <= min(a["high"], b["high"])
                    found.append(Agreement(name, column, form(column, a), form(column, b), shared))
    return found


def _differences(summary: dict[str, Any]) -> dict[str, Any]:
    return summary["difference"]


def markdown(found: list[Agreement]) -> str:
    """A line a figure, and how many agree."""
    lines = ["| row | figure | the table | other edits | |", "| --- | --- | ---: | ---: | --- |"]
    for one in found:
        verdict = "agrees" if one.agrees else "**apart**"
        lines.append(f"| {one.row} | {TITLES[one.column]} | {one.earlier} | {one.again} | {verdict} |")
    agree = sum(one.agrees for one in found)
    return "\n".join(lines) + f"\n\n{agree} of {len(found)} figures agree: their 95 % intervals overlap.\n"


def read_rows(path: Path) -> Found:
    """Rows of a table's JSON. Raises InputError naming a file without them."""
    try:
        return json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--against '{path}' is not a table of python -m bench.quality: {error}") from error
