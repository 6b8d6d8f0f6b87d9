"""From a Chrome trace of torch.profiler to time, share and launches by range.

Exclusive times, which add up to the whole: a range has what none of the ranges inside it has, "other" what no range
has. On the CPU time is the main thread's, and a launch is an operator called from Python. With a GPU time is the GPU's:
a kernel's belongs to the innermost range that was open where it was launched, however much later it ran; a copy counts
only while no kernel runs; "idle" is when the GPU does nothing.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvlock_fast.nvtx import COLOURS
from kvlock_fast.units import text_seconds, text_table

ROOT = "profile"
"""The range around everything; its own time is "other"."""
KERNELS, COPIES, LAUNCHERS = {"kernel"}, {"gpu_memcpy", "gpu_memset"}, {"cuda_runtime", "cuda_driver"}


@dataclass
class Range:
    """A range as it ran, in seconds since the root began.

    main: on the root's thread; seconds: on the host; own, device: seconds outside inner ranges on the host, and on the
    GPU; inside: seconds with inner ranges, on whichever counts; launches: outside inner ranges.
    """

    name: str
    start: float
    seconds: float
    main: bool
    depth: int = 0
    parent: "Range | None" = None
    own: float = 0.0
    device: float = 0.0
    inside: float = 0.0
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
    """Ranges and rows of a run. rows add up to `seconds`; beside: rows of other threads, which run meanwhile (on the
    CPU); on_gpu: whether time is the GPU's.
    """

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
        return [r.inside for r in self.ranges if r.main and row_name(r.name) == "step"]


Event = dict[str, Any]


def read_trace(trace: dict[str, Any]) -> Timeline:
    """Read a Chrome trace. Raises ValueError unless it holds exactly one root."""
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
    ranges = [
        r for thread, theirs in threads.items() for r in _nest(theirs, roots[0], thread == main, on_gpu, launched)
    ]
    root = next(r for r in ranges if r.name == ROOT)
    if on_gpu:
        _add_device_times(events, launched, root)
    # Whose thread it is does not matter to the GPU.
    beside = [] if on_gpu else _rows([r for r in ranges if not r.main], False, None)
    rows = _rows([r for r in ranges if r.main or on_gpu], on_gpu, root)
    return Timeline(ranges, rows, beside, root.seconds, on_gpu)


def row_name(name: str) -> str:
    """The name of a range's row: all steps share one."""
    return "step" if name.startswith("step ") else name


def _is_ours(event: Event) -> bool:
    return event["name"] == ROOT or event["name"].partition(" ")[0] in COLOURS


def _nest(events: list[Event], root: Event, main: bool, on_gpu: bool, launched: dict[Any, Range]) -> list[Range]:
    """One thread's ranges in order; `launched` takes the range of each launch by its correlation number."""
    ranges: list[Range] = []
    stack: list[tuple[float, Range | None]] = []  # ends of open ranges, and of open operators (None)
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        if event["cat"] == "user_annotation" and not _is_ours(event):
            continue
        while stack and stack[-1][0] <= event["ts"]:
            stack.pop()
        around, opened = next((r for _, r in reversed(stack) if r is not None), None), None
        if event["cat"] == "user_annotation":
            start, seconds = (event["ts"] - root["ts"]) / 1e6, event["dur"] / 1e6
            depth = 0 if around is None else around.depth + 1
            opened = Range(event["name"], start, seconds, main, depth, around, own=seconds)
            opened.inside = 0.0 if on_gpu else seconds
            ranges.append(opened)
            if around is not None:
                around.own -= seconds
        elif around is not None and event["cat"] in LAUNCHERS:
            launched[event["args"].get("correlation")] = around
        elif around is not None and not on_gpu and stack[-1][1] is not None:
            around.launches += 1
        stack.append((event["ts"] + event["dur"], opened))
    return [r for r in ranges if not main or r.parent is not None or r.name == ROOT]


def _add_device_times(events: list[Event], launched: dict[Any, Range], root: Range) -> None:
    """Give each range the GPU's time for what was launched in it, and count the kernels."""
    for event, seconds in _exposed(events):
        where = launched.get(event["args"].get("correlation"), root)
        where.device += seconds
        where.launches += event["cat"] in KERNELS
        above: Range | None = where
        while above is not None:
            above.inside += seconds
            above = above.parent


def _exposed(events: list[Event]) -> Iterator[tuple[Event, float]]:
    """Kernels and copies with their seconds outside earlier ones, and outside any kernel."""
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
    """Length of the part of [first, last] inside sorted, disjoint intervals."""
    total = 0.0
    for i in range(max(0, bisect_right(busy, (first, float("inf"))) - 1), len(busy)):
        if busy[i][0] >= last:
            break
        total += max(0.0, min(last, busy[i][1]) - max(first, busy[i][0]))
    return total


def _rows(ranges: list[Range], on_gpu: bool, root: Range | None) -> list[Row]:
    """Rows by name in the order of time, "other" and "idle" last; names that took no time of the GPU have none."""
    rows: dict[str, Row] = {}
    for r in sorted(ranges, key=lambda r: (r is root, r.start)):
        row = rows.setdefault(row_name(r.name), Row(row_name(r.name)))
        row.calls += 1
        row.launches += r.launches
        row.seconds += r.device if on_gpu else r.own
        row.inside += r.inside
        row.host += r.own
    if root is not None:
        other = rows[ROOT]
        other.name, other.inside = "other", other.seconds
        if on_gpu:
            idle = max(0.0, root.seconds - sum(row.seconds for row in rows.values()))
            rows["idle"] = Row("idle", 1, 0, idle, idle)
    return [row for row in rows.values() if row.seconds > 0 or row.launches]


def as_json(timeline: Timeline) -> dict[str, Any]:
    """Give plain values, times in seconds; a row's host_seconds are those of its launching, on the GPU only."""
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
    """Write a line for each range, and their sum."""
    total = Row("total", 0, timeline.launches, sum(row.seconds for row in timeline.rows))
    columns = ["range", "calls", "kernels" if timeline.on_gpu else "operators", "time", "share", "with inside"]
    rows = [_cells(row, timeline) for row in timeline.rows]
    text = text_table([columns + ["host"] * timeline.on_gpu, *rows, _cells(total, timeline)[:5]], "<>>>>>>")
    if timeline.beside:
        text += "\n\nmeanwhile, in other threads, on the host:\n"
        text += text_table([columns[:4], *(_cells(row, timeline)[:4] for row in timeline.beside)], "<>>>")
    return text


def _cells(row: Row, timeline: Timeline) -> list[str]:
    share = f"{100 * row.seconds / timeline.seconds:.1f} %"
    cells = [row.name, str(row.calls or ""), str(row.launches), text_seconds(row.seconds), share]
    return [*cells, text_seconds(row.inside), *([text_seconds(row.host)] if timeline.on_gpu else [])]
