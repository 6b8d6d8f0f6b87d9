"""Every kernel beside its peers on this machine's GPU, in one process.

    python -m bench.kernels --output out/kernels.json     # all rows, some minutes
    python -m bench.kernels --quick                       # one small row of each part
    python -m bench.kernels --parts attention --shapes wan-1.3b
    python -m bench.kernels --dry-run                     # the rows, without a GPU; every figure null

Inputs are random and rotate through more than the L2 cache; contenders are checked against a reference in fp32 before
anything is timed, then run interleaved, and so do the ceilings they are compared with (a copy, matrix products). A
figure is a median; one that was not measured is null. Exit status 1 if one of ours computes something wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.kernels import attention_cases, memory_cases, path_cases
from bench.kernels.measure import Case, CudaClock, check, count_launches, rates, time_case
from bench.kernels.shapes import Plan, plans

PARTS: dict[str, Callable[..., Case]] = {
    "attention": attention_cases.attention_case,
    "sweep": attention_cases.sweep_case,
    "dispatch": attention_cases.dispatch_case,
    "locked": path_cases.locked_case,
    "prologue": path_cases.prologue_case,
    "blend": memory_cases.blend_case,
    "quantize": memory_cases.quantize_case,
    "dequantize": memory_cases.dequantize_case,
    "epilogue": memory_cases.epilogue_case,
    "guidance": memory_cases.guidance_case,
}
TIMES = ("ms", "ms_low", "ms_high", "host_us", "samples", "waited")
FIGURES = (*TIMES, "tflops", "gbps", "percent_of_ceiling", "launches", "error")
EMPTY = dict.fromkeys((*FIGURES, "problem"))


def describe(plan: Plan) -> dict[str, Any]:
    """What a row is about."""
    shape = plan.shape
    size = {"tokens": shape.tokens, "queries": shape.query_tokens, "heads": shape.heads, "dim": shape.dim}
    return {"part": plan.part, "shape": shape.name, "variant": plan.variant, **size}


def measure_row(plan: Plan, clock: Any, device: str = "cuda") -> dict[str, Any]:
    """The row with its figures."""
    case = PARTS[plan.part](plan.shape, plan.variant, device)
    checked = check(case)
    sound = [name for name in case.contenders if not checked.get(name, EMPTY)["problem"]]
    timed = time_case(case, sound, clock)
    found = {}
    for name, contender in case.contenders.items():
        figures = EMPTY | {"kind": contender.kind} | checked.get(name, {}) | timed.get(name, {})
        figures |= rates(contender, figures)
        if case.counts_launches and name in timed and contender.kind != "ceiling":
            figures["launches"] = count_launches(contender)
        found[name] = figures
    for name, contender in case.contenders.items():
        found[name]["percent_of_ceiling"] = _percent(found, name, contender.ceiling)
    return finished(plan, found, case.absent)


def _percent(found: dict[str, dict], name: str, ceiling: str) -> float | None:
    """How near the row's own ceiling a contender comes."""
    unit = "gbps" if ceiling == "copy" else "tflops"
    most, reached = found.get(f"ceiling {ceiling}", EMPTY).get(unit), found[name].get(unit)
    return 100 * reached / most if most and reached else None


def empty_row(plan: Plan, why: str) -> dict[str, Any]:
    """The row with every figure null."""
    case = PARTS[plan.part](plan.shape, plan.variant, "meta")
    found = {name: EMPTY | {"kind": contender.kind} for name, contender in case.contenders.items()}
    return finished(plan, found, case.absent) | {"unmeasured": why}


def finished(plan: Plan, found: dict[str, dict], absent: dict[str, str]) -> dict[str, Any]:
    """A row of the JSON: contenders by name, and how many times faster ours are than each peer."""
    for name, why in absent.items():
        found[name] = EMPTY | {"kind": "peer", "problem": why}
    return describe(plan) | {"contenders": found, "ratios": ratios(found)}


def ratios(found: dict[str, dict]) -> dict[str, dict[str, float | None]]:
    """ratios[ours][peer]: the peer's time by ours; null where one was not measured."""
    peers = [name for name, figures in found.items() if figures["kind"] == "peer"]
    table = {}
    for name, figures in found.items():
        if figures["kind"] == "ours":
            pairs = {peer: (found[peer]["ms"], figures["ms"]) for peer in peers}
            table[name] = {peer: theirs / ours if theirs and ours else None for peer, (theirs, ours) in pairs.items()}
    return table


def wrong(rows: list[dict]) -> list[str]:
    """Where one of ours failed its check, one line each."""
    return [
        f"{row['part']} {row['shape']} {row['variant']}: {name}: {figures['problem']}"
        for row in rows
        for name, figures in row["contenders"].items()
        if figures["kind"] in ("ours", "unlocked") and figures["problem"]
    ]


def lines(row: dict[str, Any]) -> str:
    """A row as text."""
    head = " ".join(filter(None, (row["part"], row["shape"], row["variant"])))
    text = [f"{head}{': ' + row['unmeasured'] if 'unmeasured' in row else ''}"]
    for name, f in row["contenders"].items():
        if f["ms"] is None:
            text.append(f"    {name:<40} {f['problem'] or 'unmeasured'}")
            continue
        rate = f"{f['tflops']:8.1f} TFLOP/s" if f["tflops"] else f"{f['gbps'] or 0:8.0f} GB/s   "
        share = f"{f['percent_of_ceiling']:5.1f} %" if f["percent_of_ceiling"] else "       "
        text.append(f"    {name:<40} {f['ms']:10.4f} ms {rate} {share}")
    return "\n".join(text)


def overall_ceilings(rows: list[dict]) -> dict[str, float | None]:
    """The median over the rows of each ceiling, as measured beside them."""
    units = {"copy": "gbps", "bf16": "tflops", "fp8": "tflops"}
    found = {}
    for name, unit in units.items():
        beside = (row["contenders"].get(f"ceiling {name}", EMPTY)[unit] for row in rows)
        values = [value for value in beside if value]
        found[f"{name}_{unit}"] = statistics.median(values) if values else None
    return found


def run_once(chosen: list[Plan]) -> None:
    """Each of ours once: for profilers and sanitizers."""
    for plan in chosen:
        case = PARTS[plan.part](plan.shape, plan.variant, "cuda")
        for name, contender in case.contenders.items():
            if contender.kind == "ours":
                print(f"{plan.part} {plan.shape.name} {plan.variant}: {name}", flush=True)
                contender.before()
                contender.run(0)
                torch.cuda.synchronize()


def measure(chosen: list[Plan], budget: float) -> Iterator[dict[str, Any]]:
    """The rows, as many as the budget in seconds allows; the others unmeasured."""
    begun, clock = time.monotonic(), CudaClock()
    for plan in chosen:
        if time.monotonic() - begun > budget:
            yield empty_row(plan, "no time was left")
            continue
        try:
            yield measure_row(plan, clock)
        except torch.cuda.OutOfMemoryError:
            yield empty_row(plan, "not enough memory")
        torch.compiler.reset()
        torch.cuda.empty_cache()


def write(path: Path, found: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The figures as JSON."""
    whole = found | {"ceilings": overall_ceilings(rows), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command above."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("out/kernels.json"))
    parser.add_argument("--quick", action="store_true", help="one small row of each part")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", help="only these, by name")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    parser.add_argument("--dry-run", action="store_true", help="list the rows, every figure null")
    parser.add_argument("--once", action="store_true", help="run each of ours once, time nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command above."""
    options = parse(arguments)
    chosen = [plan for plan in plans(options.quick) if plan.part in options.parts]
    if options.shapes is not None:
        known = {plan.shape.name for plan in chosen}
        unknown = [name for name in options.shapes if name not in known]
        if unknown:
            print(f"error: --shapes must be of {', '.join(sorted(known))}, got '{unknown[0]}'", file=sys.stderr)
            return 2
        chosen = [plan for plan in chosen if plan.shape.name in options.shapes]
    if not options.dry_run and not torch.cuda.is_available():
        print("error: there is no CUDA device to measure on; --dry-run lists the rows", file=sys.stderr)
        return 2
    if options.once:
        run_once(chosen)
        return 0
    found, rows = {"machine": machine.machine(options.commit), "clocks_before": machine.clocks()}, []
    dry = (empty_row(plan, "a dry run") for plan in chosen)
    for row in dry if options.dry_run else measure(chosen, options.budget):
        rows.append(row)
        print(lines(row), flush=True)
        write(options.output, found, rows)  # after each row: nothing is lost when it is stopped
    write(options.output, found | {"clocks_after": machine.clocks()}, rows)
    for line in wrong(rows):
        print(line, file=sys.stderr)
    return 1 if wrong(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
