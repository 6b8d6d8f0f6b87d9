"""What foreground-only computation does to edits: the demo's world, by share of the mask, preset and seam.

    python -m bench.quality.foreground               # 8 held-out edits a row; a quarter of an hour on two cores
    python -m bench.quality.foreground --cases 4     # a quick look

Every row is made twice from the same noise, in full as the preset has it and by the foreground alone, which takes s*
over the foreground and the background's latents from the source; the halo's rows once. tau is the paper's, 0.01: alpha
is 1 nearly always, so that nearly every step is the foreground's alone, which is what is judged. A share is reached by
a smaller object or a wider mask. Judged from pixels: whether the edit is right, the background's PSNR and SSIM, and the
seam, the PSNR of the 4 pixels around the mask. Each finished edit is a line of --work: a second call goes on where the
first stopped.
"""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvlock_fast as kvf
from bench.quality.demo_model import Rows, background_scores, fingerprint, interval
from bench.quality.judge import edit_is_right
from kvlock_fast.demo import GUIDANCE, STEPS
from kvlock_fast.demo.scene import HELD_OUT
from kvlock_fast.demo.world import EDIT_KINDS, EditCase, grow, render, sample_edit
from kvlock_fast.masks import project_mask
from kvlock_fast.models.bundled import model_path

RESULTS = Path(__file__).parents[1] / "results" / "foreground_quality.json"
SEEDS = HELD_OUT + 7 * 10**6
SHARES = (0.05, 0.1, 0.2, 0.4, 0.64)
PRESETS = ("kvlock", "paper")
TAU = 0.01
COMPUTES = ("full", "foreground")
SEAMS = ((1, "cut"), (1, "blend"), (2, "blend"))
"""Halos and how they are mixed, at one share."""
SEAM_SHARE, RING = 0.2, 4
COLUMNS = ("right", "psnr", "ssim", "ring_psnr")


def case_of_share(seed: int, kind: str, share: float, pipe: Any) -> EditCase:
    """A held-out edit whose mask has about this share of the tokens."""
    case = sample_edit(seed, kind)
    if _share(case.mask, pipe) > share:
        low, high = 0.1, 1.0
        for _ in range(8):
            middle = (low + high) / 2
            low, high = (middle, high) if _share(_shrunk(case, middle).mask, pipe) < share else (low, middle)
        return _shrunk(case, high)
    mask = case.mask
    while _share(mask, pipe) < share:
        mask = grow(mask, 1)
    return replace(case, mask=mask)


def _share(mask: np.ndarray, pipe: Any) -> float:
    return project_mask(torch.from_numpy(mask), pipe.model.geometry).share


def _shrunk(case: EditCase, factor: float) -> EditCase:
    """The same edit with a smaller object."""
    clips = []
    for clip in (case.source, case.target):
        thing = clip.scene.objects[0]
        clips.append(render(replace(clip.scene, objects=(replace(thing, radius=thing.radius * factor),))))
    return replace(case, source=clips[0], target=clips[1], mask=grow(clips[0].mask | clips[1].mask, 1))


def edit(pipe: Any, case: EditCase, seed: int, lock: kvf.LockConfig) -> dict[str, Any]:
    """One edit, judged; `share`: of the tokens, `computed`: of them on average over the steps."""
    out = pipe(
        case.source.video, case.mask, source_prompt=case.source_prompt, prompt=case.prompt, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(seed), lock=lock,
    )  # fmt: skip
    video, truth = out.frames[0], case.source.video
    ring = grow(case.mask, RING) & ~case.mask
    error = np.square(video.astype(np.float64) - truth)[ring].mean() if ring.any() else 0.0
    scores = background_scores(video, truth, case.mask)
    computed = float(np.mean([record.tokens for record in out.trace])) / out.trace.tokens
    return {
        "right": edit_is_right(case, video), "psnr": scores["psnr"], "ssim": scores["ssim"],
        "ring_psnr": 10 * math.log10(255**2 / max(error, 1e-10)), "share": out.mask.share, "computed": computed,
    }  # fmt: skip


def measure(rows: Rows, pipe: Any, cases: int) -> None:
    """All rows, case by case."""
    for i in range(cases):
        seed, kind = SEEDS + i, EDIT_KINDS[i % len(EDIT_KINDS)]
        for share in SHARES:
            case = case_of_share(seed, kind, share, pipe)
            for preset in PRESETS:
                for compute in COMPUTES:
                    lock = kvf.LockConfig.preset(preset, compute=compute, tau=TAU)
                    rows.once(f"{preset}/{share}/{compute}/{i}", edit, pipe, case, seed, lock)
            for halo, seam in SEAMS if share == SEAM_SHARE else ():
                lock = kvf.LockConfig.preset("kvlock", compute="foreground", tau=TAU, halo=halo, seam=seam)
                rows.once(f"kvlock/{share}/halo {halo} {seam}/{i}", edit, pipe, case, seed, lock)


def summarise(rows: Rows) -> dict[str, dict[str, Any]]:
    """Means with intervals by row, and the paired differences of foreground to full."""
    groups: dict[str, dict[int, dict]] = {}
    for key, row in rows.rows.items():
        group, _, number = key.rpartition("/")
        groups.setdefault(group, {})[int(number)] = row
    found = {}
    for name, group in groups.items():
        preset, share, what = name.split("/")
        figures = {column: interval([row[column] for row in group.values()]) for column in COLUMNS}
        figures |= {key: float(np.mean([row[key] for row in group.values()])) for key in ("share", "computed")}
        base = groups.get(f"{preset}/{share}/full", {})
        both = sorted(set(base) & set(group)) if what != "full" else []
        if both:
            figures["change"] = {
                column: interval([float(group[i][column]) - float(base[i][column]) for i in both]) for column in COLUMNS
            }
        found[name] = {"cases": len(group), **figures}
    return found


def table(summary: dict[str, dict[str, Any]]) -> str:
    """As Markdown: a line a row, the changes against the same edit in full."""
    lines = [
        "| preset | mask | computed | | right | background PSNR, dB | SSIM | seam PSNR, dB | change of PSNR |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in sorted(summary.items(), key=lambda item: (item[0].split("/")[0], float(item[0].split("/")[1]))):
        preset, _, what = name.split("/")
        change = row.get("change", {}).get("psnr")
        shown = "" if change is None else f"{change['mean']:+.2f} ({change['low']:+.2f} to {change['high']:+.2f})"
        lines.append(
            f"| `{preset}` | {row['share']:.0%} | {row['computed']:.0%} | {what} | {row['right']['mean']:.0%} "
            f"| {row['psnr']['mean']:.1f} | {row['ssim']['mean']:.3f} | {row['ring_psnr']['mean']:.1f} | {shown} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("out/bench/foreground_quality.jsonl"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    pipe = kvf.KVLockPipeline.from_pretrained("demo", torch_dtype=torch.float32)
    about = {"steps": STEPS, "guidance": GUIDANCE, "model": fingerprint(model_path())}
    rows = Rows(given.work, about)
    with torch.inference_mode():
        measure(rows, pipe, given.cases)
    summary = summarise(rows)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps({"about": about | {"cases": given.cases}, "rows": summary}, indent=1) + "\n")
    print(table(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
