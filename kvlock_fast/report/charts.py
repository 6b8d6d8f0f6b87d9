"""The schedule as line charts: points in the unit of pixels of an SVG that the report's template draws.

No drawing here, so the page's own colours serve light and dark alike.
"""

import math
from typing import Any

WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 30

# (key in a record, title, what it says)
_PANELS = [
    ("variance", "Variance of the predictions", "over the window, foreground only; what decides the rest"),
    ("alpha", "Locking α", "1 keeps the source's keys and values in the background, 0 lets go"),
    ("omega", "Guidance ω", "how strongly the prompt pulls"),
    ("s_star", "Projection s*", "scale of the unconditional prediction"),
]

_TOKENS = ("tokens", "Tokens computed", "of each branch; fewer where the foreground alone was")


def schedule_charts(trace: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Lay out a chart per scheduled quantity, a line per sample; [] where the trace has no records.

    `tau` among the settings (also one level down) becomes a dashed line in the chart of the variance.
    """
    records = trace.get("records", [])
    if not records:
        return []
    tau = next((s["tau"] for s in (settings, *settings.values()) if isinstance(s, dict) and "tau" in s), None)
    reference = float(tau) if isinstance(tau, (int, float)) else None
    panels = [*_PANELS, *([_TOKENS] if computes_less(trace) else [])]
    return [_chart(trace, key, title, note, reference if key == "variance" else None) for key, title, note in panels]


def computes_less(trace: dict[str, Any]) -> bool:
    """Whether some step computed less than all tokens; a trace need not know."""
    whole = trace.get("tokens")
    return bool(whole) and any(record.get("tokens", whole) < whole for record in trace["records"])


def _chart(trace: dict[str, Any], key: str, title: str, note: str, reference: float | None) -> dict[str, Any]:
    steps = max(trace["steps"], 1)
    lines: dict[int, list[tuple[int, float]]] = {}
    for record in trace["records"]:
        value = record[key]
        if value is not None and math.isfinite(value):
            lines.setdefault(record["sample"], []).append((record["step"], value))
    values = [value for line in lines.values() for _, value in line]
    # The reference line belongs in view, but not at the price of flattening the curve.
    near = reference if reference is not None and (not values or reference <= 3 * max(values)) else None
    ticks = axis_ticks(values + ([] if near is None else [near]))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step + 0.5) / steps

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (ticks[-1] - value) / (ticks[-1] - ticks[0])

    warmup = min(trace["warmup_steps"], steps)
    return {
        "title": title,
        "note": note,
        "empty": not values,
        "lines": [
            {
                "sample": sample,
                "points": " ".join(f"{x(k):.1f},{y(v):.1f}" for k, v in line),
                "last": line[-1][1],
                "end": (round(x(line[-1][0]), 1), round(y(line[-1][1]), 1)),
            }
            for sample, line in sorted(lines.items())
        ],
        "rows": [{"y": round(y(t), 1), "label": f"{t:g}"} for t in ticks],
        "columns": [{"x": round(x(k), 1), "label": k} for k in range(0, steps, max(1, math.ceil(steps / 6)))],
        "warmup": round(x(warmup - 0.5) - LEFT, 1) if warmup else 0,
        "reference": None if near is None else {"y": round(y(near), 1), "label": f"τ = {near:g}"},
    }


def axis_ticks(values: list[float]) -> list[float]:
    """Three to seven round numbers that enclose `values` and 0."""
    low, high = min([0.0, *values]), max([0.0, *values])
    if low == high:
        high = 1.0
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
