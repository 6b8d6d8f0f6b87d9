"""From a Chrome trace of torch.profiler to time, share and launches by range.

Exclusive times, which add up to the whole: a range has what none of the ranges inside it has, "other" what no range
has. On the CPU time is the main thread's, and a launch is an operator called from Python. With a GPU time is the GPU's:
a kernel's belongs to the innermost range that was open where it was launched, however much later it ran; a copy counts
only while no kernel runs; "idle" is when the GPU does nothing.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from kvlock_fast.nvtx import COLOURS
from kvlock_fast.units import text_seconds

ROOT = "profile"
"""The range around everything; its own time is "other"."""
KERNELS, COPIES, LAUNCHERS = {"kernel"}, {"gpu_memcpy", "gpu_memset"}, {"cuda_runtime", "cuda_driver"}


@dataclass
class Range:
    """One range as it ran, in seconds since the root began. main: on the root's thread; seconds: on the host;
    own, device: of them outside inner ranges, and on the GPU; launches: outside inner ranges.
    """

    name: str
    start: float
    seconds: float
    main: bool
    depth: int = 0
    parent: "Range | None" = None
    own: float = 0.0
    device: float = 0.0
    launches: int = 0


@dataclass
class Row:
    """All ranges of a name. seconds: exclusive; inside: also what ran in the ranges inside; host: exclusive."""

    name: str
    calls: int = 0
    launches: int = 0
    seconds: float = 0.0
    inside: float = 0.0
    host: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """rows add up to `seconds`; beside: rows of other threads, which run meanwhile (on the CPU); on_gpu: whose time."""

    ranges: list[Range]
    rows: list[Row]
    beside: list[Row]
    seconds: float
    on_gpu: bool

    @property
    def launches(self) -> int:
        return sum(row.launches for row in self.rows)

    def steps(self) -> list[float]:
        """Seconds of each denoising step, with all that is inside."""
        inside = _inside(self.ranges, self.on_gpu)
        return [inside[id(r)] for r in self.ranges if r.main and row_name(r.name) == "step"]


def read_trace(trace: dict[str, Any]) -> Timeline:
    """Raises ValueError unless the trace holds exactly one root."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    roots = [e for e in events if e.get("cat") == "user_annotation" and e["name"] == ROOT]
    if len(roots) != 1:
        raise ValueError(f"a trace of a profile has one range named {ROOT!r}, this one has {len(roots)}")
    launched: dict[Any, Range] = {}
    threads = defaultdict(list)
    for event in events:
        if event.get("cat") in {"user_annotation", "cpu_op", *LAUNCHERS}:
            threads[event["pid"], event["tid"]].append(event)
    main = roots[0]["pid"], roots[0]["tid"]
    on_gpu = any(e.get("cat") in KERNELS for e in events)
    ranges = []
    for thread, theirs in threads.items():
        ranges += _nest(theirs, roots[0], thread == main, on_gpu, launched)
    root = next(r for r in ranges if r.name == ROOT)
    if on_gpu:
        _add_device_times(events, launched, root)
    ranges.sort(key=lambda r: r.start)
    if on_gpu:  # whose time it is does not matter to the GPU
        return Timeline(ranges, _rows(ranges, True, root), [], root.seconds, True)
    main_rows, beside = ([r for r in ranges if r.main is main] for main in (True, False))
    return Timeline(ranges, _rows(main_rows, False, root), _rows(beside, False, None), root.seconds, False)


def row_name(name: str) -> str:
    """The name of a range's row: all steps share one."""
    return "step" if name.startswith("step ") else name


def _is_ours(event: dict[str, Any]) -> bool:
    return event["name"] == ROOT or event["name"].partition(" ")[0] in COLOURS


@dataclass
class _Open:
    """What of a thread is open at a moment: our ranges, and operators (range None)."""

    end: float
    range: Range | None = field(default=None)


def _nest(
    events: list[dict[str, Any]], root: dict[str, Any], main: bool, on_gpu: bool, launched: dict[Any, Range]
) -> list[Range]:
    """One thread's ranges in order; `launched` takes the range of each launch by its correlation number."""
    ranges: list[Range] = []
    stack: list[_Open] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        if event["cat"] == "user_annotation" and not _is_ours(event):
            continue
        while stack and stack[-1].end <= event["ts"]:
            stack.pop()
        around = next((o.range for o in reversed(stack) if o.range is not None), None)
        opened = _Open(event["ts"] + event["dur"])
        if event["cat"] == "user_annotation":
            start, seconds = (event["ts"] - root["ts"]) / 1e6, event["dur"] / 1e6
            depth = 0 if around is None else around.depth + 1
            opened.range = Range(event["name"], start, seconds, main, depth, around, own=seconds)
            ranges.append(opened.range)
            if around is not None:
                around.own -= seconds
        elif event["cat"] == "cpu_op":
            if around is not None and not on_gpu and stack[-1].range is not None:
                around.launches += 1
        elif event["cat"] in LAUNCHERS and around is not None:
            launched[event["args"].get("correlation")] = around
        stack.append(opened)
    return [r for r in ranges if not main or r.parent is not None or r.name == ROOT]


def _add_device_times(events: list[dict[str, Any]], launched: dict[Any, Range], root: Range) -> None:
    """Give each range the GPU's time for what was launched in it, and count the kernels."""
    for event, seconds in _exposed(events):
        where = launched.get(event["args"].get("correlation"), root)
        where.device += seconds
        where.launches += event["cat"] in KERNELS


def _exposed(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Kernels and copies with the seconds in which nothing that counts before them was running."""
    busy: list[tuple[float, float]] = []
    for kinds in (KERNELS, COPIES):
        theirs = sorted((e for e in events if e.get("cat") in kinds), key=lambda e: e["ts"])
        taken, until = [], float("-inf")
        for event in theirs:
            first, last = max(event["ts"], until), event["ts"] + event["dur"]
            until = max(until, last)
            yield event, max(0.0, last - first - _overlap(first, last, busy)) / 1e6
            if last > first:
                taken.append((first, last))
        busy = sorted(busy + taken)


def _overlap(first: float, last: float, busy: list[tuple[float, float]]) -> float:
    """How much of [first, last] lies in intervals that are sorted and apart."""
    total = 0.0
    for i in range(max(0, bisect_right(busy, (first, float("inf"))) - 1), len(busy)):
        if busy[i][0] >= last:
            break
        total += max(0.0, min(last, busy[i][1]) - max(first, busy[i][0]))
    return total


def _inside(ranges: Iterable[Range], on_gpu: bool) -> dict[int, float]:
    """Of each range by id: its seconds with all that is inside."""
    if not on_gpu:
        return {id(r): r.seconds for r in ranges}
    totals: dict[int, float] = defaultdict(float)
    for r in ranges:
        above: Range | None = r
        while above is not None:
            totals[id(above)] += r.device
            above = above.parent
    return totals


def _rows(ranges: list[Range], on_gpu: bool, root: Range | None) -> list[Row]:
    """By name in the order of time; "other" and "idle" last. Without a row: what took no time of the GPU."""
    rows: dict[str, Row] = {}
    inside = _inside(ranges, on_gpu)
    for r in sorted(ranges, key=lambda r: (r is root, r.start)):
        row = rows.setdefault(row_name(r.name), Row(row_name(r.name)))
        row.calls += 1
        row.launches += r.launches
        row.seconds += r.device if on_gpu else r.own
        row.inside += inside[id(r)]
        row.host += r.own
    if root is not None:
        other = rows[ROOT]
        other.name, other.inside = "other", other.seconds
        if on_gpu:
            idle = max(0.0, root.seconds - sum(row.seconds for row in rows.values()))
            rows["idle"] = Row("idle", 1, 0, idle, idle)
    return [row for row in rows.values() if row.seconds > 0 or row.launches]


def as_json(timeline: Timeline) -> dict[str, Any]:
    """Plain values, times in seconds; a row's host_seconds are what its launching took, on the GPU only."""
    on_gpu, whole = timeline.on_gpu, timeline.seconds
    return {
        "seconds": whole,
        "time_of": "gpu" if on_gpu else "main thread",
        "launches_of": "kernels" if on_gpu else "operators",
        "launches": timeline.launches,
        "ranges": [_row_json(row, whole, on_gpu) for row in timeline.rows],
        "other_threads": [_row_json(row, whole, False) for row in timeline.beside],
        "step_seconds": timeline.steps(),
        "timeline": [
            {"name": r.name, "start": r.start, "seconds": r.seconds, "depth": r.depth, "main_thread": r.main}
            for r in timeline.ranges
        ],
    }


def _row_json(row: Row, whole: float, on_gpu: bool) -> dict[str, Any]:
    figures = {"range": row.name, "calls": row.calls, "launches": row.launches, "seconds": row.seconds,
               "share": row.seconds / whole, "seconds_with_inside": row.inside}  # fmt: skip
    return {**figures, "host_seconds": row.host} if on_gpu else figures


def table(timeline: Timeline) -> str:
    """For people: a line a range, and what they add up to."""
    total = Row("total", 0, timeline.launches, sum(row.seconds for row in timeline.rows))
    columns = ["range", "calls", "kernels" if timeline.on_gpu else "operators", "time", "share", "with inside"]
    rows = [_cells(row, timeline) for row in timeline.rows]
    text = _aligned([columns + ["host"] * timeline.on_gpu, *rows, _cells(total, timeline)[:5]])
    if timeline.beside:
        text += "\n\nmeanwhile, in other threads, on the host:\n"
        text += _aligned([columns[:4], *(_cells(row, timeline)[:4] for row in timeline.beside)])
    return text


def _cells(row: Row, timeline: Timeline) -> list[str]:
    share = f"{100 * row.seconds / timeline.seconds:.1f} %"
    cells = [row.name, str(row.calls or ""), str(row.launches), text_seconds(row.seconds), share]
    return [*cells, text_seconds(row.inside), *([text_seconds(row.host)] if timeline.on_gpu else [])]


def _aligned(lines: list[list[str]]) -> str:
    """Columns two spaces apart, the first to the left, the others to the right; lines may end early."""
    widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
    first = [line[0].ljust(widths[0]) for line in lines]
    rest = ["  ".join(map(str.rjust, line[1:], widths[1:])) for line in lines]
    return "\n".join(f"{a}  {b}" for a, b in zip(first, rest, strict=True))
