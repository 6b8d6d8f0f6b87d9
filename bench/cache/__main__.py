"""What a cache of the source's keys and values costs and gains: errors of its formats, edits, bytes, seconds.

    python -m bench.cache --output out/cache.json               # 12 cases a row: an hour on two cores
    python -m bench.cache --output out/cache.json --budget 600  # no row of edits is begun after 10 minutes
    python -m bench.cache --quick                               # a look at every part, well under a minute
    python -m bench.cache --dry-run                             # the rows; every figure but the arithmetic null

Parts: errors (SQNR of each format by layer, keys before and after RoPE), edits (held-out cases of the demo world under
each format, step stride and choice of steps), packing (bytes on models' shapes, by arithmetic), hits (whole edits by a
stored cache against lockstep), disk (entries against plain safetensors). Finished edits are lines of `--work`: a second
call goes on where the first was stopped. Draws the edits beside the output. Exit status 1 if something computes wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.cache import plot
from bench.cache.quality import Edits, Setting, Variant, measure_errors, variants
from bench.cache.speed import HIT_FORMATS, NATIVE_ERROR, measure_disk, measure_hits, packing
from bench.cache.tables import text_of
from bench.quality.demo_model import Rows, fingerprint

PACKAGES = ("diffusers", "transformers", "safetensors", "xxhash")
PARTS = ("errors", "edits", "packing", "hits", "disk")
QUICK = Setting(steps=3, kappa=1)


def load_editor() -> Any:
    """The demo model on the CPU, in fp32."""
    from kvlock_fast.edit import load_pipeline

    return load_pipeline("demo", "cpu", "fp32")


def measure_edits(edits: Edits, rows: list[Variant], cases: range, budget: float) -> list[dict[str, Any]]:
    """The rows, as many as the budget in seconds allows; the others say that they are unmeasured."""
    begun, found = time.monotonic(), []
    for variant in rows:
        if time.monotonic() - begun > budget and not edits.finished(variant, cases):
            found.append(unmeasured(variant, edits.setting, "no time was left"))
            continue
        found.append(edits.run(variant, cases))
        print(f"{variant.name}: {found[-1]['psnr']['mean']:.2f} dB", file=sys.stderr, flush=True)
    return found


def unmeasured(variant: Variant, setting: Setting, why: str) -> dict[str, Any]:
    """A row without figures."""
    return {"name": variant.name, **vars(variant), "stored_steps": variant.stored_steps(setting), "unmeasured": why}


def measure(options: argparse.Namespace, setting: Setting, commit: str | None) -> dict[str, Any]:
    """All parts that were asked for; null for the others. Finished edits count if they are of the same commit."""
    found: dict[str, Any] = dict.fromkeys(PARTS)
    cases = range(options.seed, options.seed + options.cases)
    if "packing" in options.parts:
        found["packing"] = packing()
    rows = variants(options.quick)
    if options.dry_run:
        found["edits"] = [unmeasured(variant, setting, "a dry run") for variant in rows]
        return found
    editor = load_editor()
    with torch.inference_mode():
        if "errors" in options.parts:
            steps = error_steps(setting.steps)
            found["errors"] = measure_errors(editor, cases, steps[:1] if options.quick else steps, setting)
        if "edits" in options.parts:
            edits = Edits(editor, Rows(options.work, about(setting) | {"commit": commit}), setting)
            found["edits"] = measure_edits(edits, rows, cases, options.budget)
    if "hits" in options.parts:
        formats = HIT_FORMATS[:1] if options.quick else HIT_FORMATS
        found["hits"] = measure_hits(editor, options.rounds, setting, formats)
    if "disk" in options.parts:
        found["disk"] = measure_disk(options.megabytes, 3, options.rounds)
    return found


def error_steps(steps: int) -> tuple[int, int, int]:
    """An early, a middle and a late step."""
    return steps // 10, steps // 2, steps - 1 - steps // 10


def about(setting: Setting) -> dict[str, Any]:
    """What the demo world is edited with."""
    from kvlock_fast.models.bundled import model_path

    return {**vars(setting), "model": fingerprint(model_path())}


def wrong(found: dict[str, Any]) -> list[str]:
    """What did not give what it should."""
    hits = (found["hits"] or {}).items()
    lines = [
        f"{name}: latents are {f['error']:.3g} from lockstep's, allowed {NATIVE_ERROR:g}"
        for name, f in hits
        if name.endswith("native") and not f["error"] <= NATIVE_ERROR
    ]
    return lines + [
        f"{name}: other bytes are read than were written" for name in (found["disk"] or {}).get("wrong", ())
    ]


def plain(value: Any) -> Any:
    """As JSON has it: what is not finite is null."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command above."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("out/cache.json"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--cases", type=int, default=12, help="held-out clips, and edits a row")
    parser.add_argument("--seed", type=int, default=0, help="number of the first held-out case")
    parser.add_argument("--rounds", type=int, default=5, help="of what is timed")
    parser.add_argument("--megabytes", type=int, default=300, help="to write and read")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument("--work", type=Path, default=Path("out/bench/cache.jsonl"), help="finished edits")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    parser.add_argument("--quick", action="store_true", help="one case of three rows, 3 steps, one round, 9 MB")
    parser.add_argument("--dry-run", action="store_true", help="list the rows; only arithmetic has figures")
    options = parser.parse_args(arguments)
    if options.cases < 1 or options.rounds < 1 or options.megabytes < 1 or options.seed < 0:
        parser.error("--cases, --rounds and --megabytes must be at least 1, and --seed at least 0")
    if options.quick:
        options.cases, options.rounds, options.megabytes = 1, 1, 9
        options.work = options.work.with_name(f"{options.work.stem}-quick.jsonl")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command above."""
    options = parse(arguments)
    setting = QUICK if options.quick else Setting()
    settings = {name: getattr(options, name) for name in ("cases", "seed", "rounds", "megabytes", "quick")}
    settings |= {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    settings |= about(setting)
    there = machine.machine(options.commit)
    there["versions"] |= {name: version(name) for name in PACKAGES}
    found = plain({"machine": there, "settings": settings} | measure(options, setting, there["commit"]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    print(text_of(found))
    plot.draw(found, options.output.with_suffix(".png"))
    for line in wrong(found):
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong(found) else 0


if __name__ == "__main__":
    sys.exit(main())
