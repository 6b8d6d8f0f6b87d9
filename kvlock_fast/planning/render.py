"""A plan for people, as text of at most 80 columns, and for programs, as plain values."""

import textwrap
from typing import Any

from kvlock_fast.planning import costs
from kvlock_fast.planning.job import Job
from kvlock_fast.planning.planner import Plan, Row
from kvlock_fast.units import text_bytes, text_seconds, text_table

WIDTH = 80
PAYS = 1.1
"""How many times faster foreground-only steps must be to be worth their own mode."""
NOTE = (
    f"Times are the least that an H200 can take: arithmetic at {costs.MATRIX_RATE / 1e12:.0f} TFLOP/s "
    f"({costs.NARROW_RATE / 1e12:.0f} in attention with heads of {costs.NARROW_HEAD}), a link of "
    f"{costs.LINK_BANDWIDTH / 1e9:.0f} GB/s and a disk of {costs.DISK_BANDWIDTH / 1e9:.0f} GB/s; "
    "not measured on this machine. Memory is exact for the cache, an estimate for activations. 1 GB = 10^9 bytes."
)


def render(plan: Plan) -> str:
    """Write the plan as text: what is asked, the cache by format, the tiers, the choice."""
    parts = [_heading(plan.job), _formats(plan), _tiers(plan), _remarks(plan), _choice(plan), _wrap(NOTE)]
    return "\n\n".join(part for part in parts if part)


def _heading(job: Job) -> str:
    model = job.model
    locked = len(job.layout("native").shape.layers)
    text = f" + {model.text_tokens} of text" if model.text_tokens else ""
    share = 100 * job.foreground_tokens / job.tokens
    edits = f", {job.edits} times" if job.edits > 1 else ""
    stored = f", {job.steps_stored} stored" if job.steps_stored != job.locked else ""
    branches = "guided (two branches)" if job.guided else "unguided (one branch)"
    if job.steps_alone:
        branches += f" in {job.steps_guided} of {job.num_steps} steps"
    layers = f"{model.layers}" if locked == model.layers else f"{locked} of {model.layers} locked"
    facts = [
        ("model", f"{model.name}, {_dtype(job)}, {layers} layers of {model.heads} heads x {model.head_dim}"),
        ("video", f"{job.frames} frames of {job.height}x{job.width}: {job.tokens} tokens{text}"),
        ("mask", f"{share:.3g} % foreground: {job.foreground_tokens} tokens; {job.background_tokens} background"),
        ("steps", f"{job.num_steps}, {job.locked} of them locked{stored}"),
        ("edits", f"{job.prompts} prompt{'s' * (job.prompts > 1)}{edits}, {branches}"),
    ]
    if job.sparse_steps is not None:
        surely, most = job.sparse_steps
        steps = f"{surely} steps" if surely == most else f"{surely} to {most} steps, as alpha turns out,"
        facts.append(("tokens", f"{job.foreground_tokens} of {job.tokens} computed in {steps} of {job.num_steps}"))
    return "\n".join(f"{name:<7}{line}" for name, line in facts)


def _formats(plan: Plan) -> str:
    """The cache by format; nothing where only lockstep was asked for."""
    figures, job = _format_figures(plan), plan.job
    if not figures:
        return ""
    rows = [["cache", "codes/step", "scales/step", "all steps", "smaller than naive"]]
    for name, f in figures.items():
        per_step, whole = f["ratio_to_naive_per_step"], f["ratio_to_naive"]
        ratio = "-" if per_step is None else f"{per_step:.3g}x"
        ratio += "" if whole is None or whole == per_step else f"; {whole:.3g}x in all"
        sizes = (f["payload_bytes_per_step"], f["scale_bytes_per_step"], f["bytes"])
        rows.append([name, *map(_amount, sizes), ratio])
    naive = (job.naive_bytes_per_step, 0, job.naive_bytes_per_step * job.num_steps)
    rows.append(["naive", *map(_amount, naive), "(bf16, all tokens, all steps)"])
    return text_table(rows, "<>>>")


def _tiers(plan: Plan) -> str:
    """One line a row of the plan, below what is there; a "!" where that is less than needed."""
    machine, several = plan.machine, plan.job.prompts > 1
    amounts = (machine.gpu_bytes, machine.host_bytes, machine.disk_bytes)
    rows = [
        ["tier", "format", "GPU", "host", "disk", "transfer", "compute", "forwards", "at once" if several else "fits"],
        ["there:", "", *("none" if n is None else text_bytes(n) for n in amounts)],
    ]
    previous = None
    for row in plan.rows:
        chosen = (row.tier, row.format) == (plan.choice.tier, plan.choice.format)
        fits = "no" if row.short else str(row.prompts) if several else "yes"
        needed = (("GPU", row.needed.gpu), ("host", row.needed.host), ("disk", row.needed.disk))
        times = (_time(row.transfer_seconds), _time(row.compute_seconds))
        new = row.tier != previous
        rows += [[]] * (new and previous is not None)
        marked = (_amount(count) + "!" * (name in row.short) for name, count in needed)
        rows.append([row.tier * new, row.format or "-", *marked, *times, str(row.rows), fits + " <-" * chosen])
        previous = row.tier
    return text_table(rows, "<<>>>>>>", gap=1)


def _remarks(plan: Plan) -> str:
    """Meaning of the columns, and whether foreground-only computation pays."""
    job = plan.job
    branches = "two a prompt (guidance needs both)" if job.guided else "one a prompt"
    columns = (
        f"Needed, and ! where that is not there. transfer, compute: of one locked step; the step waits where the "
        f"transfer is the longer. forwards: of one locked step, {branches}, and in lockstep one of the source; a "
        f"stored tier has {job.source_forwards} forwards of the source before the first edit instead."
    )
    columns += " at once: prompts in a forward." if job.prompts > 1 else ""
    columns += " Without a GPU all memory is the host's." if plan.machine.gpu_bytes is None else ""
    along = f" The source also runs along in {job.steps_along} steps that are not stored." if job.steps_along else ""
    gains = foreground_gains(job)
    pays = "pays" if gains["stored"] > PAYS else "does not pay"
    foreground = (
        f"Foreground-only computation {pays}: steps up to {gains['stored']:.1f}x faster with a stored cache, "
        f"{gains['lockstep']:.1f}x in lockstep (where alpha is 1 and every layer is locked)."
    )
    return "\n\n".join((_wrap(columns + along), _wrap(foreground)))


def _choice(plan: Plan) -> str:
    choice = plan.choice
    name = "none" if choice.tier is None else " ".join(filter(None, (choice.tier, choice.format)))
    at_once = f", {choice.prompts} prompts in a forward" if choice.prompts > 1 else ""
    return _wrap(f"choice: {name}{at_once}: {choice.reason}.")


def foreground_gains(job: Job) -> dict[str, float]:
    """Speed-up of a step that computes foreground and text only, with a stored cache and in lockstep."""
    queries = max(1, job.foreground_tokens + job.model.text_tokens)
    rows, whole = job.rows(job.prompts, False), job.forward_seconds
    part = rows * costs.forward_seconds(job.model, job.all_tokens, queries)
    # In lockstep the source's row stays whole.
    return {"stored": rows * whole / part, "lockstep": (1 + rows) * whole / (whole + part)}


def as_json(plan: Plan) -> dict[str, Any]:
    """Give the plan as plain values: bytes and seconds, names as strings."""
    job, model = plan.job, plan.job.model
    gains = foreground_gains(job)
    return {
        "model": model.name,
        "dtype": _dtype(job),
        "frames": job.frames,
        "height": job.height,
        "width": job.width,
        "steps": job.num_steps,
        "steps_locked": job.locked,
        "steps_stored": job.steps_stored,
        "layers": model.layers,
        "locked_layers": len(job.layout("native").shape.layers),
        "prompts": job.prompts,
        "edits": job.edits,
        "guided": job.guided,
        "steps_guided": job.num_steps - job.steps_alone if job.guided else 0,
        "tokens": job.tokens,
        "text_tokens": model.text_tokens,
        "foreground_tokens": job.foreground_tokens,
        "background_tokens": job.background_tokens,
        "naive_bytes_per_step": job.naive_bytes_per_step,
        "naive_bytes": job.naive_bytes_per_step * job.num_steps,
        "formats": _format_figures(plan),
        "memory": {
            "weight_bytes": job.weight_bytes,
            "activation_bytes_per_row": job.activation_bytes,
            "latent_bytes": job.latent_bytes(job.prompts),
        },
        "machine": vars(plan.machine),
        "forward_seconds": job.forward_seconds,
        "tiers": [_row_figures(row) for row in plan.rows],
        "foreground_only": {"pays": gains["stored"] > PAYS, "gain": gains},
        "tokens_computed": _tokens_computed(job),
        "choice": vars(plan.choice),
        "rates": costs.RATES,
        "note": NOTE,
    }


def _tokens_computed(job: Job) -> dict[str, int]:
    """Tokens of the video in a full step and in one of the foreground alone, and how many of these there are."""
    surely, most = job.sparse_steps or (0, 0)
    per_step = {"full_step": job.tokens, "foreground_step": job.foreground_tokens}
    return {**per_step, "foreground_steps_at_least": surely, "foreground_steps_at_most": most}


def _format_figures(plan: Plan) -> dict[str, dict[str, float | int | None]]:
    """Figures of the formats that the plan has rows of; ratios are None where nothing is stored."""
    job, figures = plan.job, {}
    for format in dict.fromkeys(row.format for row in plan.rows if row.format):
        layout = job.layout(format)
        whole = layout.nbytes * job.steps_stored
        figures[format] = {
            "payload_bytes_per_step": layout.payload_bytes,
            "scale_bytes_per_step": layout.scale_bytes,
            "bytes_per_step": layout.nbytes,
            "bytes": whole,
            "ratio_to_naive_per_step": job.naive_bytes_per_step / layout.nbytes if layout.nbytes else None,
            "ratio_to_naive": job.naive_bytes_per_step * job.num_steps / whole if whole else None,
        }
    return figures


def _row_figures(row: Row) -> dict[str, Any]:
    times = {name: getattr(row, name) for name in ("transfer_seconds", "compute_seconds", "exposed_seconds")}
    return {
        "tier": row.tier,
        "format": row.format,
        **{f"{place}_bytes": count for place, count in vars(row.needed).items()},
        "fits": row.fits,
        "short": list(row.short),
        "prompts_at_once": row.prompts,
        "forwards_per_step": row.rows,
        **{f"{name}_per_step": seconds for name, seconds in times.items()},
        "source_seconds": row.source_seconds,
        "seconds": row.seconds,
    }


def _dtype(job: Job) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(job.dtype).removeprefix("torch.")]


def _amount(count: float | None) -> str:
    return text_bytes(count) if count else "-"


def _time(seconds: float) -> str:
    return text_seconds(seconds) if seconds else "-"


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH)
