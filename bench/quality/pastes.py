"""Pastes of an edit into its source: the step at the mask's edge, the whole frame, and what becomes of the object.

    python -m bench.quality.pastes                # 42 held-out edits by the default, every paste and feather
    python -m bench.quality.pastes --cases 3      # a quick look

Each edit is made once and pasted in every way. Columns: `delivered_seam` of measures.py; `whole_frame`, of the
delivered video; `tint`, how far the object's mean colour lies from the true one, in levels of 0 to 255, inside its
outline. Each finished edit is a line of --work: a second call goes on where the first stopped.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import binary_erosion

import kvlock_fast as kvf
from bench.quality.cases import QualityCase, quality_case
from bench.quality.demo_model import Rows, fingerprint, interval
from kvlock_fast.demo import GUIDANCE, STEPS
from kvlock_fast.demo.scene import HELD_OUT
from kvlock_fast.demo.world import coverage
from kvlock_fast.media import metrics
from kvlock_fast.media.paste import composite
from kvlock_fast.models.bundled import model_path
from kvlock_fast.settings import PASTES

RESULTS = Path(__file__).parents[1] / "results" / "pastes.json"
FIRST_SEED = HELD_OUT + 61 * 10**6
WAYS = [f"{paste} {feather}" for paste, feather in product(PASTES, (0, 1, 2))]
COLUMNS = ("delivered_seam", "whole_frame", "tint")
RIM = 3
"""Pixels of an object's outline that `tint` leaves out: a fade or a shift of colours is meant to show there."""


def edit(pipe: Any, case: QualityCase, seed: int) -> dict[str, dict[str, float]]:
    """One edit, pasted in every way; columns by way."""
    clip = case.edit
    out = pipe(
        clip.source.video, clip.mask, source_prompt=clip.source_prompt, prompt=clip.prompt,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    found = {}
    for way in WAYS:
        paste, feather = way.split()
        found[way] = figures(case, composite(clip.source.video, out.frames[0], clip.mask, int(feather), paste))
    return found


def figures(case: QualityCase, delivered: np.ndarray) -> dict[str, float]:
    """The columns of one delivered video; no tint where nothing is to be seen, or nothing but its outline."""
    answer, core = case.edit.target.video, core_of(case)
    step = metrics.edge_step(case.edit.mask, delivered, answer)
    found = {"whole_frame": metrics.psnr(delivered, answer)} | ({} if step is None else {"delivered_seam": step})
    if core.any():
        found["tint"] = float(np.abs(delivered[core].mean(0) - answer[core].mean(0)).mean())
    return found


def core_of(case: QualityCase) -> np.ndarray:
    """Pixels of the edited object, without its outline: bool [F, H, W]."""
    if case.path is None:
        return np.zeros_like(case.edit.mask)
    whole = coverage(case.edit.target.scene.objects[0], case.edit.mask.shape) == 1
    return np.stack([binary_erosion(frame, iterations=RIM) for frame in whole]) & case.edit.mask


def summarise(rows: Rows) -> dict[str, dict[str, Any]]:
    """Means with intervals, by way."""
    edits = list(rows.rows.values())
    return {
        way: {column: interval([row[way][column] for row in edits if column in row[way]]) for column in COLUMNS}
        for way in WAYS
    }


def table(summary: dict[str, dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| paste, feather | step at the edge | whole frame PSNR, dB | object's colour off by |",
        "| --- |" + " ---: |" * 3,
    ]
    for way, row in summary.items():
        cells = (f"{row[c]['mean']:.1f} ({row[c]['low']:.1f} to {row[c]['high']:.1f})" for c in COLUMNS)
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=42)
    parser.add_argument("--work", type=Path, default=Path("out/bench/pastes.jsonl"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    pipe = kvf.KVLockPipeline.from_pretrained("demo", torch_dtype=torch.float32)
    about = {"steps": STEPS, "lock": kvf.LockConfig().as_dict(), "model": fingerprint(model_path()), "seed": FIRST_SEED}
    rows = Rows(given.work, about)
    with torch.inference_mode():
        for i in range(given.cases):
            rows.once(str(i), edit, pipe, quality_case(i, FIRST_SEED), FIRST_SEED + i)
    summary = summarise(rows)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps({"about": about, "cases": given.cases, "rows": summary}, indent=1) + "\n")
    print(table(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
