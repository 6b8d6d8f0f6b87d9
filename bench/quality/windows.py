"""Clips longer than the model's window: what stretches and their overlap do to an edit, on the demo's world.

    python -m bench.quality.windows               # 8 held-out clips of 49 frames a row; a few minutes on two cores
    python -m bench.quality.windows --cases 2     # a quick look

The bundled model was trained on 17 frames. Each clip is edited whole (three times that) and in stretches of 17 frames
by overlap. Judged from pixels: whether the edit is right, the background's PSNR, and the seam: how much more the masked
pixels change from frame to frame where stretches meet than elsewhere, as a ratio (the source's own beside it: 1 is no
seam at all). Each finished edit is a line of --work: a second call goes on where the first stopped.
"""

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvlock_fast as kvf
from bench.quality.demo_model import Rows, background_scores, fingerprint, interval
from bench.quality.judge import edit_is_right
from kvlock_fast.demo import GUIDANCE, STEPS
from kvlock_fast.demo.scene import HELD_OUT
from kvlock_fast.demo.world import EDIT_KINDS, EditCase, sample_edit
from kvlock_fast.loop.windows import Windows, places_of
from kvlock_fast.models.bundled import model_path

RESULTS = Path(__file__).parents[1] / "results" / "windows.json"
SEEDS, FRAMES, WINDOW = HELD_OUT + 8 * 10**6, 49, 17
OVERLAPS = (None, 4, 8, 12)
"""None: the whole clip at once."""
COLUMNS = ("right", "psnr", "seam", "seam_of_source", "seconds")


def seam_frames(overlap: int, geometry: Any) -> np.ndarray:
    """Frames [F - 1] whose change from the one before lies where stretches meet: bool."""
    window, shared = Windows(WINDOW, overlap).latent_sizes(geometry)
    stride = geometry.temporal_stride
    places = places_of((FRAMES - 1) // stride + 1, window, shared)
    met = np.zeros(FRAMES - 1, bool)
    for before, after in pairwise(places):
        first, last = stride * (after.start - 1), stride * before.stop
        met[max(0, first) : last] = True
    return met


def change_ratio(video: np.ndarray, mask: np.ndarray, met: np.ndarray) -> float:
    """Mean change of masked pixels from frame to frame where stretches meet, over that elsewhere."""
    steps = np.abs(np.diff(video.astype(np.float64), axis=0)).mean(-1)
    inside = mask[1:] & mask[:-1]
    return float(steps[met][inside[met]].mean() / steps[~met][inside[~met]].mean())


def edit(pipe: Any, case: EditCase, seed: int, overlap: int | None) -> dict[str, Any]:
    """One edit, judged; the seams of the whole clip are looked for where those of the least overlap would be."""
    frames = None if overlap is None else WINDOW
    out = pipe(
        case.source.video, case.mask, source_prompt=case.source_prompt, prompt=case.prompt, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(seed),
        clip_frames=frames, clip_overlap=overlap,
    )  # fmt: skip
    video, met = out.frames[0], seam_frames(overlap or OVERLAPS[1], pipe.model.geometry)
    scores = background_scores(video, case.source.video, case.mask)
    return {
        "right": edit_is_right(case, video), "psnr": scores["psnr"], "seam": change_ratio(video, case.mask, met),
        "seam_of_source": change_ratio(case.target.video, case.mask, met),
        "seconds": sum(out.trace.stage_seconds[name] for name in ("denoise", "decode")),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("out/bench/windows.jsonl"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    pipe = kvf.KVLockPipeline.from_pretrained("demo", torch_dtype=torch.float32)
    about = {"steps": STEPS, "frames": FRAMES, "clip_frames": WINDOW, "model": fingerprint(model_path())}
    rows = Rows(given.work, about)
    with torch.inference_mode():
        for i in range(given.cases):
            case = sample_edit(SEEDS + i, EDIT_KINDS[i % len(EDIT_KINDS)], frames=FRAMES)
            for overlap in OVERLAPS:
                rows.once(f"{overlap}/{i}", edit, pipe, case, SEEDS + i, overlap)
    summary = summarise(rows)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps({"about": about, "rows": summary}, indent=1) + "\n")
    print(table(summary))
    return 0


def summarise(rows: Rows) -> dict[str, dict[str, Any]]:
    """Means with intervals, by overlap."""
    groups: dict[str, list[dict]] = {}
    for key, row in rows.rows.items():
        groups.setdefault(key.split("/")[0], []).append(row)
    return {
        name: {"cases": len(group)} | {column: interval([row[column] for row in group]) for column in COLUMNS}
        for name, group in groups.items()
    }


def table(summary: dict[str, dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| overlap | right | background PSNR, dB | change at seams / elsewhere | of the true edit |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, row in summary.items():
        overlap = "the whole clip" if name == "None" else f"{name} frames"
        seam = row["seam"]
        lines.append(
            f"| {overlap} | {row['right']['mean']:.0%} | {row['psnr']['mean']:.1f} | {seam['mean']:.2f} "
            f"({seam['low']:.2f} to {seam['high']:.2f}) | {row['seam_of_source']['mean']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
