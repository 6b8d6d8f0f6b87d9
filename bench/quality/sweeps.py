"""What the values of the lock do: one of them changed at a time, 32 held-out edits a point, judged as in the table.

    python -m bench.quality.sweeps                              # every value, from each of BASES
    python -m bench.quality.sweeps --bases paper --parameters tau,b --cases 8

Cases are the table's first ones (bench/quality/cases.py), finished points are kept in `--work` as there. Writes
bench/results/quality_sweeps.json, .md and .png. alpha of the warm-up has a kappa of half the steps,
as at the demo's 20 steps there is nothing before the 20 of the paper.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.machine import machine
from bench.quality.cases import FIRST_SEED
from bench.quality.measures import COLUMNS
from bench.quality.run import Plan, gathered, run
from bench.quality.summary import TITLES, Figures, change, differences, summarise
from kvlock_fast.config import PRESETS, LockConfig
from kvlock_fast.demo import GUIDANCE, STEPS
from kvlock_fast.errors import InputError
from kvlock_fast.files import atomic_path, write_text

RESULTS = Path(__file__).parents[1] / "results" / "quality_sweeps.json"
BASES = ("paper", "kvlock", "free-path")
SWEEPS: dict[str, tuple[Any, ...]] = {
    "tau": (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, "auto"),
    "kappa": (0, 5, 10, 20),
    "min_predictions": (2, 3, 5, 10),
    "reduction": ("elements", "mean"),
    "variance_window": (2, 5, 10, 20),
    "b": (0.5, 1.0, 2.0, 3.0),
    "warmup_alpha": (0.0, 0.5, 1.0),
    "alpha_floor": (0.0, 0.5, 1.0),
    "omega_floor": (0.0, 1.0, 2.0, 3.0),
    "background_latents": ("model", "source"),
    "source_path": ("renoise", "invert"),
    "lock_interval": ((0.0, 0.25), (0.0, 0.55), (0.0, 1.0)),
    "guidance_interval": ((0.0, 0.25), (0.0, 0.55), (0.0, 1.0)),
    "source_noise": (1, 2, 3, 4, "fresh"),
    "skip_share": (0.0, 0.05, 0.1, 0.15, 0.2),
}
"""By the lock's own names; variance_window is W, warmup_alpha is alpha of the warm-up."""
Point = tuple[str, str, Any]
"""A base, a parameter and its value."""


def points_of(bases: list[str], parameters: list[str], steps: int) -> dict[str, tuple[Point, LockConfig]]:
    """By row name; a base's own value is a point as well, where the sweep does not have it."""
    found = {}
    for base in bases:
        for parameter in parameters:
            also = {"kappa": max(1, steps // 2)} if parameter == "warmup_alpha" else {}
            own = LockConfig.preset(base).as_dict()[parameter]
            for value in dict.fromkeys((*SWEEPS[parameter], own)):
                try:
                    lock = LockConfig.preset(base, **{**also, parameter: value})
                except ValueError:  # more than one noise, of a free edit
                    continue
                found[f"{base} {parameter}={value}"] = (base, parameter, value), lock
    return found


def by_parameter(
    points: dict[str, tuple[Point, LockConfig]], rows: dict[str, Figures], groups: dict[str, str]
) -> dict[str, dict[str, list]]:
    """By base and parameter: a list of points in the order of their values, words last.

    `difference` of a point: to the base's own value, case by case.
    """
    sweeps: dict[str, dict[str, list]] = {}
    found = summarise(rows, groups, frozenset())
    for row, ((base, parameter, value), _) in points.items():
        if row in found:
            figures = {name: found[row][name] for name in ("cases", *COLUMNS) if name in found[row]}
            own = f"{base} {parameter}={LockConfig.preset(base).as_dict()[parameter]}"
            figures["difference"] = {} if row == own else differences(rows[row], rows.get(own, {}))
            sweeps.setdefault(base, {}).setdefault(parameter, []).append({"value": value, **figures})
    for parameters in sweeps.values():
        for listed in parameters.values():
            listed.sort(key=lambda point: _order(point["value"]))
    return sweeps


def markdown(sweeps: dict[str, dict[str, list]]) -> str:
    """A line a point; differences are case by case, with 95 % intervals, * where 0 is outside."""
    lines = [
        f"| from | value | {TITLES['success']} | {TITLES['psnr']} | {TITLES['seam']} | {TITLES['consistency']} "
        "| right, to its own value | PSNR, to its own value |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for base, parameters in sweeps.items():
        for parameter, listed in parameters.items():
            for point in listed:
                right, psnr, seam, calm = (point.get(c) for c in ("success", "psnr", "seam", "consistency"))
                cells = [
                    f"{100 * right['mean']:.0f} % ({100 * right['low']:.0f} to {100 * right['high']:.0f})",
                    *(f"{f['mean']:.2f} ± {(f['high'] - f['low']) / 2:.2f}" if f else "" for f in (psnr, seam)),
                    f"{calm['mean']:.3f}" if calm else "",
                    *(change(name, point["difference"].get(name)) for name in ("success", "psnr")),
                ]
                lines.append(f"| `{base}` | {parameter} = {point['value']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(sweeps: dict[str, dict[str, list]], path: Path) -> None:
    """A panel a parameter: the background's PSNR, and below it how many edits are right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parameters = list(dict.fromkeys(name for listed in sweeps.values() for name in listed))
    size, shared = (2.4 * len(parameters) + 1, 5.5), {"sharex": "col", "sharey": "row"}
    figure, axes = plt.subplots(2, len(parameters), figsize=size, layout="constrained", squeeze=False, **shared)
    figure.set_facecolor("white")
    for column, parameter in enumerate(parameters):
        for base, colour in zip(sweeps, ("tab:blue", "tab:red", "tab:green"), strict=False):
            listed = sweeps[base].get(parameter, [])
            values = sorted({p["value"] for one in sweeps.values() for p in one.get(parameter, [])}, key=_order)
            places = [values.index(point["value"]) for point in listed]
            for panel, (name, scale) in zip(axes[:, column], (("psnr", 1), ("success", 100)), strict=True):
                means = [scale * point[name]["mean"] for point in listed]
                errors = [[scale * abs(point[name][end] - point[name]["mean"]) for point in listed]
                          for end in ("low", "high")]  # fmt: skip
                dots = "o" if all(isinstance(value, str) for value in values) else "o-"
                panel.errorbar(places, means, yerr=errors, fmt=dots, ms=4, lw=1, capsize=2, color=colour, label=base)
                panel.grid(alpha=0.3)
                panel.set_xticks(range(len(values)), map(str, values), rotation=45)
        axes[0, column].set_title(
            {"variance_window": "W", "warmup_alpha": "alpha of the warm-up"}.get(parameter, parameter)
        )
    axes[0, 0].set_ylabel("background PSNR, dB")
    axes[1, 0].set_ylabel("edit is right, %")
    axes[0, 0].legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def _order(value: Any) -> tuple[bool, Any]:
    """Words come after numbers, and what is not set last."""
    return isinstance(value, str) or value is None, "" if value is None else value


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 2 for bad input, with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=32, help="edits a point")
    parser.add_argument("--bases", default=",".join(BASES), help="presets to start from, with commas between")
    parser.add_argument("--parameters", default=",".join(SWEEPS), help="which of them, with commas between")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/bench/quality_sweeps"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    try:
        points = _asked(given)
        locks = {row: lock for row, (_, lock) in points.items()}
        plan = Plan("demo", given.steps, given.guidance, locks, ("demo", {"first_seed": given.first_seed}), given.work)
        numbers = list(range(given.cases))
        run(plan, numbers, min(given.workers, given.cases))
    except (InputError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sweeps = by_parameter(points, *gathered(plan, numbers))
    bases = {base: LockConfig.preset(base).as_dict() for base in sweeps}
    about = {**plan.about, "cases": given.cases, "bases": bases, "machine": machine()}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(given.output, json.dumps({"about": about, "sweeps": sweeps}, indent=1) + "\n")
    write_text(given.output.with_suffix(".md"), markdown(sweeps))
    plot(sweeps, given.output.with_suffix(".png"))
    print(markdown(sweeps))
    return 0


def _asked(given: argparse.Namespace) -> dict[str, tuple[Point, LockConfig]]:
    bases, parameters = given.bases.split(","), given.parameters.split(",")
    for name, known, option in [(b, PRESETS, "--bases") for b in bases] + [
        (p, SWEEPS, "--parameters") for p in parameters
    ]:
        if name not in known:
            raise InputError(f"{option} names {name!r}: one of {', '.join(known)}")
    for name in ("cases", "steps", "workers"):
        if getattr(given, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(given, name)}")
    return points_of(bases, parameters, given.steps)


if __name__ == "__main__":
    sys.exit(main())
