"""What has been reached and must not be lost quietly: eight edits of the demo's world, and the size of the code.

    python -m tests.project.ratchet     # measures, writes tests/project/ratchet.json; commit it with the reason

Each edit is the default's: `kvlock`, the demo's steps and guidance, held-out cases of the quality table's seven kinds.
"""

import json
import math
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_suffix(".json")
CASES = 8


def measure_edits() -> dict[str, float]:
    """Figures of the eight edits.

    own_error: mean square error of the background (0 to 1), less that of the true answers through the autoencoder;
    seam: mean over the edits, 0 to 255; right: how many show what was asked; forwards_per_step: rows through the
    transformer.
    """
    import kvlock_fast as kvf
    from bench.demo_model.data import round_trip
    from bench.quality.cases import quality_case
    from bench.quality.measures import background_figures, own_error
    from kvlock_fast.demo import GUIDANCE, STEPS, model_path

    pipe = kvf.KVLockPipeline.from_pretrained(model_path())
    errors, seams, right, forwards = [], [], 0, 0
    for number in range(CASES):
        case = quality_case(number)
        edit = case.edit
        out = pipe(
            edit.source.video, edit.mask, source_prompt=edit.source_prompt, prompt=edit.prompt,
            num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(number),
        )  # fmt: skip
        ceiling = round_trip(pipe.pipe.vae, edit.target.video[None])[0]
        own, least = (background_figures(video, edit.source.video, edit.mask) for video in (out.frames[0], ceiling))
        errors.append(own_error(own["psnr"], least["psnr"]))
        seams.append(own["seam"])
        right += case.is_right(out.frames[0])
        forwards += out.trace.forwards
    return {
        "own_error": math.fsum(errors) / CASES,
        "seam": math.fsum(seams) / CASES,
        "right": right,
        "forwards_per_step": forwards / (CASES * STEPS),
    }


def measure_code() -> dict[str, int]:
    """Lines of Python in the package and in the kernels."""

    def lines(folder: str) -> int:
        files = (path for path in (ROOT / folder).rglob("*.py") if "kvlock_fast/kernels" not in path.as_posix())
        return sum(len(path.read_text().splitlines()) for path in files)

    return {"package_lines": lines("kvlock_fast"), "kernels_lines": lines("kernels")}


if __name__ == "__main__":
    found = {**measure_edits(), **measure_code()}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(FILE.read_text())
