"""The method's table: presets, ablations and neighbours over the same held-out edits, judged from pixels.

    python -m bench.quality                             # 100 edits a row, every row; resumes where it was stopped
    python -m bench.quality --cases 8 --rows kvlock,cfg # a part of it
    python -m bench.quality --cases 40 --rows ceiling,factors,factors/model --output F.json     # one factor at a time
    python -m bench.quality --quick                     # two steps of two cases: does everything run?
    python -m bench.quality --check                     # two rows on edits that were kept back: does the table hold?
    python -m bench.quality --model M --clips DIR       # a real model on real clips (bench/quality/subject.py)
    python -m bench.quality.sweeps                      # what the values of the lock do

The demo's world knows the answer: seven kinds of edit, three forms of mask (bench/quality/cases.py), the same cases for
every row, the source's keys and values shared among rows. Columns: bench/quality/measures.py. Rows: a preset's name, or
that with /model or /source for other background latents, and with /clip for captions of the whole clip instead of the
mask's (bench/quality/rows.py). Every finished row of a case is kept in `--work`; the same command again makes what
is missing and the same table. Writes bench/results/quality.json, quality.md, quality.png and quality_targets.md.
`--first-seed` takes other held-out edits; `--check` those that are kept back, and says whether two rows on them agree
with the table, within the intervals (status 1 if not; writes quality_check.json and quality_check.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.machine import machine
from bench.quality import check, targets
from bench.quality.cases import CHECK_SEED, FIRST_SEED
from bench.quality.perceptual import PACKAGE, installed_weights
from bench.quality.plot import plot_table
from bench.quality.rows import CEILING, asked_rows, check_rows, default_rows, lock_of
from bench.quality.run import Plan, gathered, run
from bench.quality.subject import read_clips
from bench.quality.summary import REFERENCE, by_captions, markdown, summarise
from kvlock_fast.config import LockConfig
from kvlock_fast.demo import GUIDANCE, STEPS
from kvlock_fast.errors import InputError
from kvlock_fast.files import write_text

RESULTS = Path(__file__).parents[1] / "results"
QUICK_STEPS, QUICK_CASES = 6, 2
CHECKED = (CEILING, REFERENCE, "flowedit/source")
"""Rows of `--check`; own_error is to the ceiling."""


def locks_of(rows: tuple[str, ...]) -> dict[str, LockConfig | None]:
    """By row; None for the autoencoder alone."""
    return {row: None if row == CEILING else lock_of(row) for row in rows}


def make_plan(given: argparse.Namespace, rows: tuple[str, ...]) -> tuple[Plan, list[int]]:
    """What is run, and the numbers of the cases."""
    steps = QUICK_STEPS if given.quick and given.steps is None else given.steps
    cases = QUICK_CASES if given.quick and given.cases is None else given.cases
    if given.clips is None:
        first = given.first_seed if given.first_seed is not None else CHECK_SEED if given.check else FIRST_SEED
        subjects: tuple[str, dict[str, Any]] = ("demo", {"first_seed": first})
        count = 100 if cases is None else cases
    else:
        found = read_clips(given.clips)
        subjects = ("clips", {"folder": str(given.clips)})
        count = len(found) if cases is None else min(cases, len(found))
    real = given.model != "demo"
    plan = Plan(
        given.model,
        steps or (50 if real else STEPS),
        given.guidance or (5.0 if real else GUIDANCE),
        locks_of(rows),
        subjects,
        given.work,
        given.vace,
        videos=given.videos,
        lpips=given.lpips or installed_weights(),
    )
    return plan, list(range(count))


def write_results(plan: Plan, numbers: list[int], output: Path) -> str:
    """The table's JSON, Markdown, picture and targets; the Markdown."""
    found, captions, about = results_of(plan, numbers)
    text = markdown(found, captions)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps({"about": about, "rows": found, "captions": captions}, indent=1) + "\n")
    write_text(output.with_suffix(".md"), text)
    reached = targets.markdown(found)
    if plan.subjects[0] == "demo":
        write_text(output.with_name(f"{output.stem}_targets.md"), reached)
        text = f"{text}\n{reached}"
    plot_table(found, output.with_suffix(".png"))
    return text


def write_check(plan: Plan, numbers: list[int], output: Path, against: Path) -> tuple[str, bool]:
    """The JSON and Markdown of `--check`; the Markdown, and whether all figures agree."""
    found, captions, about = results_of(plan, numbers)
    compared = check.compare(check.read_rows(against), found)
    if not compared:
        raise InputError(f"--against '{against}' has none of the rows {', '.join(plan.locks)}")
    text = check.markdown(compared)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps({"about": about, "rows": found, "captions": captions}, indent=1) + "\n")
    write_text(output.with_suffix(".md"), text)
    return text, all(one.agrees for one in compared)


def results_of(plan: Plan, numbers: list[int]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Summary by row, rows by both kinds of captions, and what all was made with."""
    rows, groups = gathered(plan, numbers)
    unranked = frozenset(row for row, lock in plan.locks.items() if lock and lock.family and not plan.vace_weights)
    found = summarise(rows, groups, unranked)
    about = {**plan.about, "vace": plan.vace_weights, "cases": len(numbers), "machine": machine()}
    return found, by_captions(rows), about


def parser() -> argparse.ArgumentParser:
    """Parser of the command above."""
    made = argparse.ArgumentParser(
        prog="python -m bench.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--cases", type=int, help="of each row (100; of clips, all of them)")
    made.add_argument("--rows", help="names with commas between; all of them if not given")
    made.add_argument("--quick", action="store_true", help=f"{QUICK_CASES} cases of {QUICK_STEPS} steps")
    made.add_argument("--model", default="demo", help="a diffusers folder, a hub id, or demo")
    made.add_argument("--vace", help="a WanVACEPipeline's folder; else the demo's, or one untrained")
    made.add_argument("--clips", type=Path, help="a folder of clips, masks and prompts, instead of the demo's world")
    made.add_argument("--steps", type=int)
    made.add_argument("--guidance", type=float)
    made.add_argument(
        "--first-seed", type=int, help=f"seed of the first edit ({FIRST_SEED}; with --check {CHECK_SEED})"
    )
    made.add_argument(
        "--lpips", type=Path, help="file of ST-LPIPS' weights; else that of the installed stlpips_pytorch"
    )
    made.add_argument("--check", action="store_true", help=f"compare {', '.join(CHECKED)} on other edits")
    made.add_argument("--against", type=Path, default=RESULTS / "quality.json", help="the table that --check compares")
    made.add_argument("--workers", type=int, default=2, help="processes that share the cases; 1 on a GPU")
    made.add_argument("--videos", type=Path, help="keep the edited videos there, for bench.quality.vbench")
    made.add_argument("--work", type=Path, help="finished rows (out/bench/quality; with --check quality_check beside)")
    made.add_argument("--output", type=Path, help="JSON file of the results (bench/results/quality.json)")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 2 for bad input, with one sentence."""
    given = parser().parse_args(arguments)
    try:
        _check(given)
        usual = CHECKED if given.check else default_rows()
        rows = usual if given.rows is None else asked_rows(given.rows)
        check_rows(rows)
        plan, numbers = make_plan(given, rows)
        if plan.lpips is None:
            print(f"the column lpips is left out: pip install --no-deps {PACKAGE}, or give its file by --lpips")
        run(plan, numbers, min(given.workers, max(1, len(numbers))))
        name = "quality_check" if given.check else "quality"
        output = given.output or RESULTS / f"{name}.json"
        if given.check:
            text, agrees = write_check(plan, numbers, output, given.against)
            print(text)
            return 0 if agrees else 1
        print(write_results(plan, numbers, output))
    except (InputError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(given: argparse.Namespace) -> None:
    if given.work is None:
        given.work = Path("out/bench") / ("quality_check" if given.check else "quality")
    if given.lpips is not None and not given.lpips.is_file():
        raise InputError(f"--lpips '{given.lpips}' is not a file")
    if given.check:
        if given.clips is not None:
            raise InputError("--check has edits of its own: leave out --clips")
        check.read_rows(given.against)
    for name in ("cases", "steps", "workers"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if given.model != "demo" and given.clips is None:
        raise InputError(f"--model {given.model!r} needs --clips: the demo's world is known to the demo's model only")


if __name__ == "__main__":
    sys.exit(main())
