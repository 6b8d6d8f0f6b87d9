"""The targets of the default preset beside what the table reached: quality_targets.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.quality.measures import EXACT
from bench.quality.rows import CEILING
from bench.quality.summary import REFERENCE, TITLES, change

Found = dict[str, dict[str, Any]]
BETTER = {"success": 1, "psnr": 1, "seam": -1, "whole_frame": 1, "flicker": -1}
"""Columns in which no untrained row may be better, and the sign of a better difference."""
TARGETS = {"own_error": "background error beyond the autoencoder's (mean square, 0 to 1)", "seam": "seam error, raw"}
"""Names that are longer than a column's title."""
TRAINED = "vace"
"""Rows that begin with it are trained for the demo's world."""


@dataclass(frozen=True)
class Target:
    """A line of the table. reached: None where the run does not have it; met: of must and of aim, None for no aim."""

    name: str
    must: str
    aim: str
    reached: str | None
    met: tuple[bool, bool | None] = (False, None)

    @property
    def verdict(self) -> str:
        """The table's row of this target; a missed one is written as missed."""
        if self.reached is None:
            return "not measured"
        must, aim = self.met
        if not must:
            return "**missed**"
        return {None: "met", True: "met, the aim too", False: "met, the aim missed"}[aim]


def targets(found: Found) -> list[Target]:
    """All of them, for the reference's row of `summarise`."""
    own = found.get(REFERENCE, {})
    beside = _limit(own, "second_object", 0.90, 0.97, "{:.0%} of {cases}", least=True)
    return [
        _limit(own, "own_error", 3e-4, 2e-4, "{:.2e} ({low:.2e} to {high:.2e})"),
        _limit(own, "seam", 14, 11, "{:.1f} ({low:.1f} to {high:.1f})"),
        _limit(own, "delivered_seam", 17, 14, "{:.1f} ({low:.1f} to {high:.1f})"),
        _exact(own),
        _limit(own, "one_object", 0.95, None, "{:.0%} of {cases}", least=True),
        _one_object(found, own),
        beside,
        _untrained(found),
        _trained(found),
    ]


def markdown(found: Found) -> str:
    """A line a target."""
    lines = [
        f"# The edit's targets, by `{REFERENCE}`",
        "",
        f"Written by `python -m bench.quality` from {found.get(REFERENCE, {}).get('cases', 0)} edits a row.",
        "",
        "| target | must | aim | reached | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in targets(found):
        lines.append(f"| {one.name} | {one.must} | {one.aim} | {one.reached or ''} | {one.verdict} |")
    return "\n".join(lines) + "\n"


def better_rows(found: Found, column: str, wanted: Callable[[str], bool]) -> list[str]:
    """Rows whose paired difference to the reference says that they are better, 0 outside its interval."""
    listed = []
    for row, summary in found.items():
        figure = summary["difference"].get(column)
        if row == CEILING or figure is None or not wanted(row):
            continue
        sure = figure["low"] > 0 if BETTER[column] > 0 else figure["high"] < 0
        # A flicker of 0 is the source's own; one further below 0 than the reference's lies above is no better.
        calmer = abs(summary[column]["mean"]) < abs(found[REFERENCE][column]["mean"])
        if sure and (column != "flicker" or calmer):
            listed.append(f"`{row}` in {TITLES[column]}, {change(column, figure)}")
    return listed


def _limit(own: dict[str, Any], column: str, must: float, aim: float | None, form: str, least: bool = False) -> Target:
    """A mean on the right side of two limits."""

    def said(limit: float | None) -> str:
        if limit is None:
            return ""
        return f"at {'least' if least else 'most'} {f'{limit:.0%}' if least else f'{limit:g}'}"

    name, figure = TARGETS.get(column, TITLES[column]), own.get(column)
    if figure is None:
        return Target(name, said(must), said(aim), None)
    sign = 1 if least else -1
    met = [None if limit is None else sign * figure["mean"] >= sign * limit for limit in (must, aim)]
    return Target(name, said(must), said(aim), form.format(figure["mean"], **figure), (bool(met[0]), met[1]))


def _exact(own: dict[str, Any]) -> Target:
    name, figure = "delivered background, without the codec", own.get("delivered_psnr")
    if figure is None:
        return Target(name, "the source's", "", None)
    exact = figure["low"] == EXACT and figure["mean"] == EXACT
    return Target(name, "the source's", "", "the source's" if exact else f"{figure['mean']:.1f} dB", (exact, None))


def _one_object(found: Found, own: dict[str, Any]) -> Target:
    """The ceiling's difference to the reference must not be surely above 0."""
    name, must = "one object: the ceiling's share less its own", "0 in the paired interval"
    figure = found.get(CEILING, {}).get("difference", {}).get("one_object")
    if figure is None or "one_object" not in own:
        return Target(name, must, "", None)
    return Target(name, must, "", change("success", figure), (figure["low"] <= 0, None))


def _untrained(found: Found) -> Target:
    return _none_better(found, "untrained rows that are better", tuple(BETTER), lambda row: not _is_trained(row))


def _trained(found: Found) -> Target:
    return _none_better(found, f"rows of {TRAINED} that are better", ("psnr", "seam"), _is_trained)


def _is_trained(row: str) -> bool:
    return row.partition("/")[0] == TRAINED


def _none_better(found: Found, name: str, columns: tuple[str, ...], wanted: Callable[[str], bool]) -> Target:
    shown = f"{name} ({', '.join(TITLES[column] for column in columns)})"
    compared = [r for r, s in found.items() if r not in (CEILING, REFERENCE) and s["difference"] and wanted(r)]
    if not compared:
        return Target(shown, "none", "", None)
    listed = [one for column in columns for one in better_rows(found, column, wanted)]
    return Target(shown, "none", "", "; ".join(listed) or f"none of {len(compared)}", (not listed, None))
