"""How good the demo model is: autoencoder, text to video, edits, on held-out seeds, judged from pixels.

    python -m bench.quality.demo_model                # 100 cases of each, half an hour or more on two cores
    python -m bench.quality.demo_model --cases 10     # a quick look
    python -m bench.quality.demo_model --clips FOLDER # also the autoencoder on real clips, resized

Every finished case is a line of `--work`: a second call continues where the first was stopped, and calls with different
`--parts` or `--presets` may run side by side. Writes
`bench/results/demo_quality.json` and prints a Markdown table. Intervals of 95 %: Wilson's for shares, normal for means.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np

from bench.quality.judge import edit_is_right, judge
from kvlock_fast.demo import GUIDANCE, STEPS
from kvlock_fast.demo.scene import HELD_OUT, sample_scene
from kvlock_fast.demo.world import EDIT_KINDS, render, sample_edit
from kvlock_fast.media.metrics import psnr

RESULTS = Path(__file__).parents[1] / "results" / "demo_quality.json"
TAU = 0.01
"""Of the edits, the paper's: alpha is 1 nearly always, with source latents or not, so figures compare the models."""
# Held-out seeds of each part, apart from each other and from those that training looks at.
SEEDS = {"autoencoder": HELD_OUT + 2 * 10**6, "text": HELD_OUT + 3 * 10**6, "edit": HELD_OUT + 4 * 10**6}


class Rows:
    """Finished cases by key, kept in a JSONL file whose first line says what was measured."""

    def __init__(self, path: Path, about: dict) -> None:
        self.path, self.rows = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if lines and lines[0] == about:
            self.rows = {row["key"]: row for row in lines[1:]}
        else:
            path.write_text(json.dumps(about) + "\n")

    def once(self, key: str, measure, *arguments) -> dict:
        """The row of `key`: `measure(*arguments)` if it is not there yet."""
        if key not in self.rows:
            self.rows[key] = {"key": key} | measure(*arguments)
            with self.path.open("a") as file:
                file.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]


def background_scores(video: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """PSNR (dB) and mean SSIM of uint8 [F, H, W, 3] against the truth, over the pixels outside the mask.

    `psnr_locked` leaves out all pixels under a latent that the mask touches: only there can a lock hold anything.
    """
    from skimage.metrics import structural_similarity

    outside = ~mask
    error = np.square(video.astype(np.float64) - truth.astype(np.float64))
    maps = [
        structural_similarity(a, b, channel_axis=-1, full=True)[1].mean(-1)[keep]
        for a, b, keep in zip(video, truth, outside, strict=True)
    ]
    whole, locked = (10 * math.log10(255**2 / max(float(error[m].mean()), 1e-10)) for m in (outside, ~touched(mask)))
    return {"psnr": whole, "ssim": float(np.concatenate(maps).mean()), "psnr_locked": locked}


def touched(mask: np.ndarray) -> np.ndarray:
    """bool [F, H, W], grown to whole latents: 8x8 pixels, frame 0 alone and then frames by fours."""
    from bench.demo_model.data import latent_cover

    cells = latent_cover(mask).numpy() > 0
    times = np.repeat(np.arange(len(cells)), [1] + [4] * (len(cells) - 1))[: len(mask)]
    return cells[times].repeat(8, axis=1).repeat(8, axis=2)


def measure_autoencoder(rows: Rows, pipe, cases: int) -> None:
    """Round trips of held-out clips; whether the judge still reads them right."""
    from bench.demo_model.data import round_trip

    def one(seed: int) -> dict:
        clip = render(sample_scene(seed))
        back, thing = round_trip(pipe.vae, clip.video[None])[0], clip.scene.objects[0]
        before, after = judge(clip.video), judge(back)
        asked = (thing.colour, thing.shape)
        return {
            "psnr": psnr(back, clip.video),
            "judged": (before.colour, before.shape) == asked,
            "judged_after": (after.colour, after.shape) == asked,
        }

    for i in range(cases):
        rows.once(f"autoencoder/{i}", one, SEEDS["autoencoder"] + i)


def measure_real(rows: Rows, pipe, folder: Path) -> None:
    """Round trips of the first 17 frames of each clip in a folder (masks aside), resized to 64x64 and to 128x128."""
    from PIL import Image

    from bench.demo_model.data import round_trip
    from kvlock_fast.media import read_video

    def one(path: Path, size: int) -> dict:
        frames = read_video(path, max_frames=17).frames
        small = np.stack([np.asarray(Image.fromarray(f).resize((size, size), Image.Resampling.BOX)) for f in frames])
        return {"psnr": psnr(round_trip(pipe.vae, small[None])[0], small)}

    for path in sorted(folder.glob("*.mp4")):
        for size in (64, 128) if not path.stem.endswith("_mask") else ():
            rows.once(f"real/{path.stem}/{size}", one, path, size)


def measure_text(rows: Rows, pipe, cases: int, steps: int, guidance: float) -> None:
    """Text to video by the stock pipeline: does the object have the caption's colour and shape?"""
    import torch

    def one(seed: int) -> dict:
        scene = sample_scene(seed)
        out = pipe(
            scene.caption,
            height=64,
            width=64,
            num_frames=17,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=pipe.tokenizer.model_max_length,
            generator=torch.Generator().manual_seed(seed),
        )
        seen, thing = judge((out.frames[0] * 255).round().astype(np.uint8)), scene.objects[0]
        right = {"colour": seen.colour == thing.colour, "shape": seen.shape == thing.shape}
        return right | {"both": all(right.values())}

    for i in range(cases):
        rows.once(f"text/{i}", one, SEEDS["text"] + i)


def measure_edits(rows: Rows, pipe, cases: int, steps: int, guidance: float, presets: list[str]) -> None:
    """Edits of each kind under each lock, and what the autoencoder alone leaves of the same background."""
    import torch

    import kvlock_fast as kvf
    from bench.demo_model.data import round_trip

    editor = kvf.KVLockPipeline.from_pipe(pipe)

    def ceiling(case) -> dict:
        return background_scores(round_trip(pipe.vae, case.source.video[None])[0], case.source.video, case.mask)

    def one(case, seed: int, preset: str, latents: str) -> dict:
        start = time.perf_counter()
        out = editor(
            video=case.source.video,
            mask=case.mask,
            source_prompt=case.source_prompt,
            prompt=case.prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            lock=kvf.LockConfig.preset(preset, background_latents=latents, tau=TAU),
        )
        seconds, video = time.perf_counter() - start, np.asarray(out.frames[0])
        right = edit_is_right(case, video)
        return background_scores(video, case.source.video, case.mask) | {"right": right, "seconds": seconds}

    for i in range(cases):
        for kind in EDIT_KINDS:
            seed = SEEDS["edit"] + i
            case = sample_edit(seed, kind)
            rows.once(f"ceiling/{kind}/{i}", ceiling, case)
            for preset, latents in product(presets, ("model", "source")):
                rows.once(f"edit/{preset}/{latents}/{kind}/{i}", one, case, seed, preset, latents)


def summarise(rows: Rows) -> dict[str, dict]:
    """Mean and interval of every column, per group of rows: their key without its number, and all kinds of edit."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for key, row in rows.rows.items():
        group, _ = key.rsplit("/", 1)
        groups[group].append(row)
        if group.startswith(("edit/", "ceiling/")):
            groups[group.rsplit("/", 1)[0] + "/all"].append(row)
    return {
        name: {"cases": len(group)} | {c: interval([r[c] for r in group]) for c in group[0] if c != "key"}
        for name, group in sorted(groups.items())
    }


def interval(values: list) -> dict[str, float]:
    """Mean and 95 % interval of numbers (normal) or of truths (Wilson)."""
    n, mean = len(values), float(np.mean(values))
    if isinstance(values[0], bool):
        z2 = 1.96**2
        middle = (mean + z2 / (2 * n)) / (1 + z2 / n)
        half = 1.96 * math.sqrt(mean * (1 - mean) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return {"mean": mean, "low": middle - half, "high": middle + half}
    half = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    return {"mean": mean, "low": mean - half, "high": mean + half}


def table(summary: dict[str, dict]) -> str:
    """The summary as Markdown: a line per group and column."""
    lines = ["| what | cases | figure | mean | 95 % interval |", "| --- | ---: | --- | ---: | --- |"]
    for name, figures in summary.items():
        for column, f in figures.items():
            if column != "cases":
                low, high = f"{f['low']:.3f}", f"{f['high']:.3f}"
                lines.append(f"| {name} | {figures['cases']} | {column} | {f['mean']:.3f} | {low} to {high} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a diffusers folder, or demo")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--parts", nargs="+", default=["autoencoder", "text", "edits"])
    parser.add_argument("--presets", nargs="+", default=["kvlock", "cfg"], help="of the edits")
    parser.add_argument("--clips", type=Path, help="folder of real clips for the autoencoder")
    parser.add_argument("--work", type=Path, default=Path("out/bench/demo_quality.jsonl"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    import torch
    from diffusers import WanPipeline

    from kvlock_fast.models.bundled import model_path

    folder = model_path() if options.model == "demo" else Path(options.model)
    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    about = {"steps": options.steps, "guidance": options.guidance, "model": fingerprint(folder)}
    rows = Rows(options.work, about)
    with torch.inference_mode():
        if "autoencoder" in options.parts:
            measure_autoencoder(rows, pipe, options.cases)
        if options.clips:
            measure_real(rows, pipe, options.clips)
        if "text" in options.parts:
            measure_text(rows, pipe, options.cases, options.steps, options.guidance)
        if "edits" in options.parts:
            measure_edits(rows, pipe, options.cases, options.steps, options.guidance, options.presets)
    summary = summarise(rows)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"about": about, "figures": summary}, indent=1) + "\n")
    print(table(summary))


def fingerprint(model: Path) -> str:
    """A short hash of a folder's weight files, or of one file."""
    import hashlib

    digest = hashlib.sha256()
    for path in [model] if model.is_file() else sorted(model.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    main()
