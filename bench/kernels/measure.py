"""Timing peers fairly: the same inputs, interleaved, warmed up, medians; checked before anything is timed.

A sample is a few calls between two events, on inputs that rotate through more than the L2 cache. The calls are queued
while the GPU spins, so that the host's time never counts; it is reported on its own (`host_us`).
"""

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

L2_BYTES, MOST_SETS = 64 << 20, 64  # an H200 has 50 MB
SAMPLE_SECONDS, MOST_CALLS = 1e-3, 16
LEAST_SAMPLES, MOST_SAMPLES = 10, 60
SECONDS_PER_CONTENDER = 0.4
WARM_UP_CALLS = 3
LEAST_SPIN, MOST_SPIN = 1 << 20, 1 << 25  # cycles: about 0.5 and 17 ms


@dataclass(frozen=True)
class Contender:
    """One way to compute a row. run(i): on input set i; `before` restores what it changes, and is not timed."""

    run: Callable[[int], Any]
    kind: str  # "ours", "peer", "sweep" (a candidate), "ceiling"
    tolerance: float = 1e-2  # of the relative error, in the 2-norm
    ceiling: str = ""  # which measured ceiling its figure is compared with
    flops: float = 0.0
    bytes: float = 0.0
    before: Callable[[], None] = lambda: None


@dataclass
class Case:
    """The contenders of one row, what they should compute on input set 0, and those that cannot take part."""

    contenders: dict[str, Contender]
    reference: Callable[[], Tensor]
    sets: int
    view: Callable[[Any], Tensor] = lambda out: out
    absent: dict[str, str] = field(default_factory=dict)
    counts_launches: bool = False


def input_sets(nbytes: int) -> int:
    """How many sets of inputs of so many bytes leave nothing in the L2 cache; MOST_SETS, where they are small."""
    return min(MOST_SETS, max(2, math.ceil(2 * L2_BYTES / max(nbytes, 1))))


def relative_error(out: Tensor, reference: Tensor) -> float:
    """|out - reference| / |reference|; inf where something is not finite."""
    error = (out.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)
    return error.item() if torch.isfinite(error) else math.inf


def check(case: Case) -> dict[str, dict[str, Any]]:
    """`error` of every contender, and `problem` where it fails or computes something else."""
    reference, found = case.reference(), {}
    for name, contender in case.contenders.items():
        if contender.kind == "ceiling":
            continue
        try:
            contender.before()
            error = relative_error(case.view(contender.run(0)), reference)
        except Exception as failure:
            lines = str(failure).strip().splitlines() or [""]
            found[name] = {"error": None, "problem": f"{type(failure).__name__}: {lines[0]}"[:200]}
            continue
        wrong = not error <= contender.tolerance
        found[name] = {"error": error if math.isfinite(error) else None}
        found[name]["problem"] = (
            f"wrong: relative error {error:.3g}, allowed {contender.tolerance:g}" if wrong else None
        )
    return found


class CudaClock:
    """Times calls on the current device by events."""

    def __init__(self):
        self.spin = LEAST_SPIN

    def sample(self, contender: Contender, calls: int, first: int, sets: int) -> tuple[float, float, bool]:
        """Seconds a call, on the device and on the host; whether the device had to wait for the host."""
        contender.before()
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(self.spin)
            start.record()
            begun = time.perf_counter()
            for i in range(first, first + calls):
                contender.run(i % sets)
            host = time.perf_counter() - begun
            end.record()
            waited = start.query()  # the spinning was over before everything was queued
            end.synchronize()
            if not waited or self.spin >= MOST_SPIN:
                return start.elapsed_time(end) / 1e3 / calls, host / calls, waited
            self.spin *= 2

    def wait(self) -> None:
        torch.cuda.synchronize()


def time_case(case: Case, names: list[str], clock: Any, seconds: float = SECONDS_PER_CONTENDER) -> dict[str, dict]:
    """ms (median), ms_low, ms_high (10th and 90th percentile), host_us, samples and waited of the contenders named.

    waited: whether in any sample the device waited for the host, whose time then counts too.
    """
    calls, samples = {}, {}
    for name in names:
        contender = case.contenders[name]
        for i in range(WARM_UP_CALLS):
            contender.before()
            contender.run(i % case.sets)
        clock.wait()
        guess = max(clock.sample(contender, 1, 0, case.sets)[0], 1e-7)
        calls[name] = max(1, min(MOST_CALLS, round(SAMPLE_SECONDS / guess)))
        samples[name] = max(LEAST_SAMPLES, min(MOST_SAMPLES, round(seconds / (guess * calls[name]))))
    times: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in names}
    shuffle, first = random.Random(0), 0
    for turn in range(max(samples.values(), default=0)):
        due = [name for name in names if turn < samples[name]]
        shuffle.shuffle(due)
        for name in due:
            times[name].append(clock.sample(case.contenders[name], calls[name], first, case.sets))
            first += calls[name]
    return {name: _summary(found) for name, found in times.items()}


def _summary(times: list[tuple[float, float, bool]]) -> dict[str, float]:
    device, host, waited = (sorted(column) for column in zip(*times, strict=True))
    tenth = len(device) // 10
    return {
        "ms": 1e3 * statistics.median(device),
        "ms_low": 1e3 * device[tenth],
        "ms_high": 1e3 * device[-1 - tenth],
        "host_us": 1e6 * statistics.median(host),
        "samples": len(device),
        "waited": waited[-1],
    }


def count_launches(contender: Contender) -> int | None:
    """Kernels that one call starts on the device; None where the profiler cannot say."""
    from torch.profiler import ProfilerActivity, profile

    contender.before()
    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            contender.run(0)
            torch.cuda.synchronize()
    except RuntimeError:
        return None
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len([e for e in kernels if not e.name.startswith("Mem")]) or None


def ceilings(device: str, kinds: tuple[str, ...]) -> dict[str, Contender]:
    """What the machine can do at most, as contenders: "copy" (bytes), "bf16" and "fp8" (matrix products)."""
    found = {}
    n, numbers = (64, 1 << 12) if device == "cpu" else (8192, 1 << 28)  # on the CPU they are never timed
    if "copy" in kinds:
        a, b = (torch.empty(numbers, dtype=torch.float32, device=device) for _ in range(2))
        a.normal_()
        found["copy"] = Contender(lambda i: b.copy_(a), "ceiling", bytes=2.0 * a.nbytes)
    if "bf16" in kinds:
        x, y = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
        found["bf16"] = Contender(lambda i: x @ y, "ceiling", flops=2.0 * n**3)
    if "fp8" in kinds:
        p, q = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=device)

        def product(i: int) -> Tensor:
            return torch._scaled_mm(p, q.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        found["fp8"] = Contender(product, "ceiling", flops=2.0 * n**3)
    return {f"ceiling {name}": contender for name, contender in found.items()}


def rates(contender: Contender, figures: dict[str, Any]) -> dict[str, float | None]:
    """tflops and gbps of a contender; None where it was not timed, or where that is not its measure."""
    seconds = figures.get("ms") and figures["ms"] / 1e3
    return {
        "tflops": contender.flops / seconds / 1e12 if seconds and contender.flops else None,
        "gbps": contender.bytes / seconds / 1e9 if seconds and contender.bytes else None,
    }
