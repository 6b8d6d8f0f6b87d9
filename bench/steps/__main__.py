"""A whole denoising step at real shapes, random weights: this project beside diffusers and the lock in plain torch.

    python -m bench.steps --output out/step.json          # on a GPU: Wan-1.3B at 81 and 33 frames, CogVideoX-2B, demo
    python -m bench.steps --shapes demo --steps 6         # on a CPU too: launches, host reads and allocations count
    python -m bench.steps --quick                         # seconds; what the tests run

Contenders are checked against each other, warmed up, then run in turns; a figure is a median over steps, without the
first two of a run. "fast": with processors="fast", all other rows with "generic". Launches, host reads and allocations
are a step's: kernels, waits and blocks on a GPU; operators, values asked for and new storages on a CPU. floor_ms: the
least its forwards could take on an H200, by arithmetic.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import machine
from bench.kernels.measure import relative_error
from bench.steps.cases import QUICK, SHAPES, Steps, StepShape
from kvlock_fast.loop.trace import Clock
from kvlock_fast.planning import costs

HOST_READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
ROUNDS, LEAD = 3, 2
LOCKED_ERROR = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""How far the latents of two ways to lock may be apart, relative in the 2-norm; fp8 caches have their own error."""
FP8_ERROR = 0.1


class Counter(TorchDispatchMode):
    """Operators, host reads and new storages between two marks."""

    def __init__(self):
        super().__init__()
        self.steps: list[dict[str, int]] = []
        self._now = dict.fromkeys(("launches", "host_reads", "allocations"), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        new = sum(x.untyped_storage().data_ptr() not in given for x in made)
        self._now["host_reads"] += name in HOST_READS
        self._now["allocations"] += new
        self._now["launches"] += bool(new) or name.endswith("_")
        return out

    def mark(self) -> None:
        """A step is over."""
        self.steps.append(self._now)
        self._now = dict.fromkeys(self._now, 0)


def counted(run: Callable[..., Any], steps: int, device: torch.device) -> dict[str, float | None]:
    """Launches, host reads and allocations of a step in the steady state."""
    if device.type == "cuda":
        return _counted_on_gpu(run, steps)
    with Counter() as counter:
        run(steps, counter.mark)
    steady = counter.steps[LEAD:] or counter.steps[-1:]
    return {name: statistics.median(step[name] for step in steady) for name in steady[0]}


def _counted_on_gpu(run: Callable[..., Any], steps: int) -> dict[str, float | None]:
    from torch.profiler import ProfilerActivity, profile

    allocations: list[int] = []
    run(steps, lambda: allocations.append(torch.cuda.memory_stats()["allocation.all.allocated"]))
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    found = []
    for count in (steps, steps + 2):  # the difference has no beginnings and ends in it
        with profile(activities=activities) as profiler:
            run(count, lambda: None)
            torch.cuda.synchronize()
        events = profiler.events()
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        found.append((len([e for e in kernels if not e.name.startswith("Mem")]), sum(e.name in WAITS for e in events)))
    launches, waits = ((b - a) / 2 for a, b in zip(*found, strict=True))
    steady = [b - a for a, b in zip(allocations[LEAD:-1], allocations[LEAD + 1 :], strict=True)]
    return {"launches": launches, "host_reads": waits, "allocations": statistics.median(steady) if steady else None}


def timed(run: Callable[..., Any], steps: int, device: torch.device) -> list[float]:
    """Seconds of each step after the first two."""
    clock = Clock(device)
    run(steps, clock.mark)
    return clock.intervals()[LEAD - 1 :]


def measure(shape: StepShape, device: torch.device, dtype: torch.dtype, steps: int, rounds: int) -> dict[str, Any]:
    """All contenders of one shape."""
    made = Steps(shape, device, dtype)
    contenders, rows, times = made.contenders(), {}, {}
    with torch.no_grad():
        truth = contenders["lock in plain torch"](steps, lambda: None)
        for name, run in contenders.items():
            rows[name] = {"rows": made.rows(name), **_checked(name, run, steps, truth, dtype)}
        alive = [name for name, row in rows.items() if row["problem"] is None]
        for name in alive:
            _reset_peak(device)
            rows[name] |= counted(contenders[name], steps, device) | {"peak_bytes": _peak(device)}
            times[name] = []
        shuffle = random.Random(0)
        for _ in range(rounds):
            shuffle.shuffle(alive)
            for name in alive:
                times[name] += timed(contenders[name], steps, device)
    model, tokens = made.extent.model, made.extent.tokens
    for name in alive:
        floor = 1e3 * rows[name]["rows"] * costs.forward_seconds(model, tokens)
        ms = 1e3 * statistics.median(times[name])
        share = floor / ms if device.type == "cuda" else None
        rows[name] |= {"ms": ms, "floor_ms": floor, "share_of_floor": share}
    size = f"{made.extent.height}x{made.extent.width}"
    facts = {"frames": made.extent.frames, "size": size, "layers": model.layers, "tokens": tokens}
    return {"shape": shape.name, **facts, "steps": steps, "contenders": rows}


def _checked(name: str, run: Any, steps: int, truth: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Its error against the lock in plain torch (None for unlocked ones), and what is wrong with it, if anything."""
    try:
        latents = run(steps, lambda: None)
    except Exception as failure:
        return {"error": None, "problem": f"{type(failure).__name__}: {str(failure).splitlines()[:1]}"[:200]}
    if "no lock" in name:
        return {"error": None, "problem": None if latents.isfinite().all() else "not finite"}
    error = relative_error(latents, truth)
    allowed = FP8_ERROR if "fp8" in name else LOCKED_ERROR[dtype]
    wrong = f"wrong: relative error {error:.3g}, allowed {allowed:g}"
    return {"error": error, "problem": None if error <= allowed else wrong}


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def table(found: dict[str, Any]) -> str:
    """One shape's contenders."""
    base = found["contenders"].get("lock in plain torch", {}).get("ms")
    where = f"{found['frames']} frames of {found['size']}, {found['layers']} layers, {found['tokens']} tokens"
    lines = [f"{found['shape']}: {where}", ""]
    head = ("", "ms", "faster", "launches", "host reads", "allocations", "of floor", "error")
    lines.append("".join(f"{cell:>12}" if i else f"{cell:<31}" for i, cell in enumerate(head)))
    for name, row in found["contenders"].items():
        if row["problem"]:
            lines.append(f"{name:<31}  {row['problem']}")
            continue
        faster = base / row["ms"] if base else None
        cells = (
            f"{row['ms']:.1f}", _text(faster, ".2f", "x"), _text(row["launches"], ".0f"),
            _text(row["host_reads"], ".0f"), _text(row["allocations"], ".0f"),
            _text(row["share_of_floor"] and 100 * row["share_of_floor"], ".0f", " %"), _text(row["error"], ".1e"),
        )  # fmt: skip
        lines.append(f"{name:<31}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _text(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if a contender of ours computes something wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], help="default: all but quick on a GPU, demo on a CPU")
    parser.add_argument("--steps", type=int, default=12, help="in a run; at least 4")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="a tiny shape of each family")
    parser.add_argument("--cpu", action="store_true", help="on the CPU though there is a GPU")
    parser.add_argument("--commit", help="for a copy of the tree without its history")
    given = parser.parse_args(arguments)
    if given.steps < 4 or given.rounds < 1:
        parser.error("--steps must be at least 4 and --rounds at least 1")
    cuda = torch.cuda.is_available() and not given.cpu
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    names = given.shapes or (QUICK if given.quick else [n for n in SHAPES if n not in QUICK] if cuda else ["demo"])
    found = []
    for name in names:
        found.append(measure(SHAPES[name], device, dtype, given.steps, given.rounds))
        print(table(found[-1]), end="\n\n", flush=True)
    if not cuda:
        print("no GPU: milliseconds are this CPU's; captured and compiled steps are unmeasured")
    if given.output is not None:
        facts = {"machine": machine.machine(given.commit), "dtype": str(dtype)}
        given.output.write_text(json.dumps({**facts, "shapes": found}, indent=1))
    wrong = any(row["problem"] for shape in found for name, row in shape["contenders"].items() if "ours" in name)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
