"""The method's table: presets, ablations and neighbours over the same held-out edits, judged from pixels.

    python -m bench.quality                             # 100 edits a row, every row; resumes where it was stopped
    python -m bench.quality --cases 8 --rows kvlock,cfg # a part of it
    python -m bench.quality --quick                     # two steps of two cases: does everything run?
    python -m bench.quality --model M --clips DIR       # a real model on real clips (bench/quality/subject.py)
    python -m bench.quality.sweeps                      # what the values of the lock do

The demo's world knows the answer: seven kinds of edit, three forms of mask (bench/quality/cases.py), the same cases for
every row, the source's keys and values shared among rows. Columns: bench/quality/measures.py. Rows: a preset's name, or
that with /model or /source for other background latents (bench/quality/rows.py). Every finished row of a case is kept
in `--work`; the same command again makes what is missing and the same table. Writes bench/results/quality.json,
quality.md and quality.png. `--first-seed` takes other held-out edits, to check the table by.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.machine import machine
from bench.quality.cases import FIRST_SEED
from bench.quality.measures import lpips_model
from bench.quality.plot import plot_table
from bench.quality.rows import CEILING, check_rows, default_rows, lock_of
from bench.quality.run import Plan, gathered, run
from bench.quality.subject import read_clips
from bench.quality.summary import markdown, summarise
from kvlock_fast.config import LockConfig
from kvlock_fast.demo import GUIDANCE, STEPS
from kvlock_fast.errors import InputError
from kvlock_fast.files import write_text

RESULTS = Path(__file__).parents[1] / "results"
QUICK_STEPS, QUICK_CASES = 6, 2


def locks_of(rows: tuple[str, ...]) -> dict[str, LockConfig | None]:
    """By row; None for the autoencoder alone."""
    return {row: None if row == CEILING else lock_of(row) for row in rows}


def make_plan(given: argparse.Namespace, rows: tuple[str, ...]) -> tuple[Plan, list[int]]:
    """What is run, and the numbers of the cases."""
    steps = QUICK_STEPS if given.quick and given.steps is None else given.steps
    cases = QUICK_CASES if given.quick and given.cases is None else given.cases
    if given.clips is None:
        subjects: tuple[str, dict[str, Any]] = ("demo", {"first_seed": given.first_seed})
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
    )
    return plan, list(range(count))


def write_results(plan: Plan, numbers: list[int], output: Path) -> str:
    """The table's JSON, Markdown and picture; the Markdown."""
    rows, groups = gathered(plan, numbers)
    unranked = frozenset(row for row, lock in plan.locks.items() if lock and lock.family and not plan.vace_weights)
    found = summarise(rows, groups, unranked)
    text = markdown(found)
    about = {**plan.about, "vace": plan.vace_weights, "cases": len(numbers), "lpips": lpips_model() is not None}
    about["machine"] = machine()
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps({"about": about, "rows": found}, indent=1) + "\n")
    write_text(output.with_suffix(".md"), text)
    plot_table(found, output.with_suffix(".png"))
    return text


def parser() -> argparse.ArgumentParser:
    """Of the command above."""
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
    made.add_argument("--first-seed", type=int, default=FIRST_SEED)
    made.add_argument("--workers", type=int, default=2, help="processes that share the cases; 1 on a GPU")
    made.add_argument("--videos", type=Path, help="keep the edited videos there, for bench.quality.vbench")
    made.add_argument("--work", type=Path, default=Path("out/bench/quality"))
    made.add_argument("--output", type=Path, default=RESULTS / "quality.json")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 2 for bad input, with one sentence."""
    given = parser().parse_args(arguments)
    try:
        _check(given)
        rows = default_rows() if given.rows is None else tuple(name.strip() for name in given.rows.split(","))
        check_rows(rows)
        plan, numbers = make_plan(given, rows)
        run(plan, numbers, min(given.workers, max(1, len(numbers))))
        print(write_results(plan, numbers, given.output))
    except (InputError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(given: argparse.Namespace) -> None:
    for name in ("cases", "steps", "workers"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if given.model != "demo" and given.clips is None:
        raise InputError(f"--model {given.model!r} needs --clips: the demo's world is known to the demo's model only")


if __name__ == "__main__":
    sys.exit(main())
