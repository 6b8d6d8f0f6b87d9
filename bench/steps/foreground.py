"""What foreground-only computation saves, by the share of the mask: a step, an edit, against the whole and diffusers.

    python -m bench.steps.foreground --device cpu --mask-share 0.2 --json out/foreground.json  # minutes on two cores
    python -m bench.steps.foreground                                                           # all shares
    python -m bench.steps.foreground --device cuda --shape "wan-1.3b 81f"                      # steps, random weights

Every step has alpha = 1, and the source's K and V come from a cache: the pass that made it is in none of the figures.
Contenders take turns; a figure is the ratio of medians. Before anything is timed, the two locked edits must agree.
`bound` is the ratio of the transformer's FLOPs. `cost_per_edit`: of a step of B prompts on one source, divided by B.
"""

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench import machine
from bench.kernels.measure import relative_error
from bench.steps.cases import SHAPES
from bench.steps.foreground_cases import FOREGROUND, FULL, UNLOCKED, ModelEdits, RandomEdits

SHARES = (0.05, 0.1, 0.2, 0.4, 0.64)
HEADLINE = 0.2
"""The share whose figures stand at the top of the JSON."""
BATCHES = (1, 2, 4, 8)
CONTENDERS = (UNLOCKED, FULL, FOREGROUND)
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Relative error between the two locked edits' latents."""


def measure(edits: ModelEdits | RandomEdits, asked: float, steps: int, rounds: int, batches: tuple[int, ...],
            dtype: torch.dtype) -> dict[str, Any]:  # fmt: skip
    """All figures of one share."""
    error = check(edits, dtype)
    seconds = {name: {"step": [], "edit": []} for name in CONTENDERS}
    shuffle, order = random.Random(0), list(CONTENDERS)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            run = edits.run(name, steps)
            seconds[name]["step"] += run.steps
            seconds[name]["edit"] += [] if run.edit is None else [run.edit]
    step = {name: statistics.median(each["step"]) for name, each in seconds.items()}
    edit = {name: statistics.median(each["edit"]) for name, each in seconds.items() if each["edit"]}
    flops = {name: edits.flops(name) for name in CONTENDERS}
    bound = flops[FULL] / flops[FOREGROUND]
    speedup = step[FULL] / step[FOREGROUND]
    return {
        "mask_share_asked": asked, "mask_share": edits.share, "tokens": edits.tokens, "error": error,
        "speedup_step_full_over_foreground": speedup,
        "speedup_step_diffusers_over_foreground": step[UNLOCKED] / step[FOREGROUND],
        "edit_ratio": edit[FULL] / edit[FOREGROUND] if edit else None,
        "edit_ratio_diffusers": edit[UNLOCKED] / edit[FOREGROUND] if edit else None,
        "step_seconds": step, "edit_seconds": edit or None, "flops_per_step": flops,
        "bound": bound, "share_of_bound": speedup / bound,
        "cost_per_edit": cost_per_edit(edits, batches),
    }  # fmt: skip


def check(edits: ModelEdits | RandomEdits, dtype: torch.dtype) -> float:
    """The relative error of the foreground-only edit's latents; ValueError where it is not the same edit."""
    full, sparse = (edits.run(name, 3, output="latent").latents for name in (FULL, FOREGROUND))
    error = relative_error(sparse, full)
    if not error <= ALLOWED[dtype]:
        raise ValueError(f"the foreground-only edit is another: relative error {error:.3g}, allowed {ALLOWED[dtype]:g}")
    return error


def cost_per_edit(edits: ModelEdits | RandomEdits, batches: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Seconds of a step for each of B edits on one source, by B."""
    return {
        name: {str(n): statistics.median(edits.run(name, 4, n, "latent").steps) / n for n in batches}
        for name in (FULL, FOREGROUND)
    }


def headline(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures at 20 %: of one edit (B = 1) from a stored cache, alpha = 1 in every step."""
    row = next((row for row in rows if row["mask_share_asked"] == HEADLINE), None)
    if row is None:
        return {}
    found = {"speedup_step_full_over_foreground": row["speedup_step_full_over_foreground"]}
    if row["edit_ratio"] is not None:
        found["speedup_edit_full_over_foreground"] = row["edit_ratio"]
        found["speedup_edit_diffusers_over_foreground"] = row["edit_ratio_diffusers"]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown, a line a share."""
    lines = [
        "| mask, tokens | step: full / foreground | of the bound | diffusers / foreground | edit: full / foreground | "
        "edit: diffusers / foreground |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        edit = ["-" if row[key] is None else f"{row[key]:.2f}x" for key in ("edit_ratio", "edit_ratio_diffusers")]
        lines.append(
            f"| {row['mask_share']:.0%} of {row['tokens']} | {row['speedup_step_full_over_foreground']:.2f}x "
            f"| {row['share_of_bound']:.0%} of {row['bound']:.1f}x "
            f"| {row['speedup_step_diffusers_over_foreground']:.2f}x | {edit[0]} | {edit[1]} |"
        )
    costs = rows[-1]["cost_per_edit"]
    for name, by_batch in costs.items():
        line = ", ".join(f"B = {n}: {1e3 * seconds:.0f} ms" for n, seconds in by_batch.items())
        lines.append(f"\na step's cost per edit at {rows[-1]['mask_share']:.0%}, {name}: {line}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 where the two ways do not make the same edit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mask-share", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--model", default="demo", help="a diffusers folder, or demo")
    parser.add_argument("--size", default="128x128", help="HEIGHTxWIDTH of the clip's 17 frames")
    parser.add_argument("--shape", choices=[*SHAPES], help="a known size with random weights instead: its steps only")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--json", type=Path, help="write the figures")
    parser.add_argument("--commit", help="for a copy of the tree without its history")
    given = parser.parse_args(arguments)
    if given.steps < 2 or given.rounds < 1 or not all(0 < share < 1 for share in given.mask_share):
        parser.error("--steps must be at least 2, --rounds at least 1, every --mask-share between 0 and 1")
    device = torch.device(given.device)
    rows = []
    with TemporaryDirectory() as folder:
        for share in given.mask_share:
            if given.shape is not None:
                dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
                edits: Any = RandomEdits(given.shape, share, device, dtype)
            else:
                size = tuple(int(side) for side in given.size.split("x"))
                edits = ModelEdits(given.model, size, share, device, Path(folder) / str(share))
                dtype = edits.pipe.model.transformers[0].dtype
            try:
                rows.append(measure(edits, share, given.steps, given.rounds, tuple(given.batches), dtype))
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
    print(table(rows))
    if given.json is not None:
        what = {"model": given.shape or given.model, "size": None if given.shape else given.size, "steps": given.steps}
        what["threads"] = torch.get_num_threads() if device.type == "cpu" else None
        about = {"machine": machine.machine(given.commit), "device": given.device, "dtype": str(dtype), **what}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({**about, **headline(rows), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
