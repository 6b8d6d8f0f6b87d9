"""The result index: a page to look at, JSON lines and a table for programs, all from the ledger."""

import base64
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kvlock_fast.batch.jobs import Job
from kvlock_fast.batch.ledger import Ledger
from kvlock_fast.batch.places import Results
from kvlock_fast.batch.runner import State
from kvlock_fast.files import atomic_path, write_text
from kvlock_fast.report.page import template
from kvlock_fast.version import __version__

SECONDS_PER_INDEX = 30


def result_rows(ledger: Ledger) -> list[dict[str, Any]]:
    """Rows of plain values, one a job: what was asked, and what came of it."""
    rows = []
    for row in ledger.rows():
        job = Job.from_spec(row["spec"])
        done = row["state"] == "done"
        rows.append(
            {
                "id": job.id,
                "state": row["state"],
                "output": job.output if done else None,
                "report": row["report"],
                "source": job.setup.source,
                "mask": job.setup.mask,
                "source_prompt": job.setup.source_prompt,
                "prompt": job.prompt,
                "model": job.setup.model,
                "seed": job.setup.seed,
                "steps": job.setup.steps,
                "tries": row["tries"],
                "seconds": row["seconds"],
                **dict.fromkeys(("background_psnr", "background_ssim", "delivered_psnr", "delivered_seam")),
                **(json.loads(row["metrics"]) if row["metrics"] else {}),
                "bytes": row["bytes"],
                "error": row["error"],
                "finished": row["finished"],
            }
        )
    return rows


@dataclass
class Index:
    """The index of a batch's results in its output folder; as a watcher, it is renewed now and then."""

    folder: Path
    ledger: Ledger
    results: Results
    title: str
    _last: float = field(default_factory=time.monotonic)

    def write(self) -> None:
        """Write index.html, results.jsonl, and results.parquet where pyarrow is installed. Raises OutputError."""
        rows = result_rows(self.ledger)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(self.folder / "results.jsonl", lines)
        _write_parquet(self.folder / "results.parquet", rows)
        pictures = {row["id"]: row["thumbnail"] for row in self.ledger.rows()}
        states = Counter(row["state"] for row in rows)
        page = template(Path(__file__).with_name("index.html.jinja"), trim_blocks=True).render(
            title=self.title,
            version=__version__,
            cards=[_card(row, pictures[row["id"]], self.results) for row in rows],
            counts={state: states[state] for state in ("done", "failed", "running", "pending")},
            sources=sorted({row["source"] for row in rows}),
            made=time.strftime("%F %H:%M"),
        )
        write_text(self.folder / "index.html", page)

    def __call__(self, state: State) -> None:
        if time.monotonic() - self._last >= SECONDS_PER_INDEX:
            self.write()
            self._last = time.monotonic()


def _card(row: dict[str, Any], thumbnail: bytes | None, results: Results) -> dict[str, Any]:
    picture = None if thumbnail is None else f"data:image/jpeg;base64,{base64.b64encode(thumbnail).decode()}"
    links = {name: _link(row[name], results) for name in ("output", "report")}
    return {**row, "picture": picture, "links": links, "psnr": _decibels(row)}


def _decibels(row: dict[str, Any]) -> str:
    """The PSNR in words. JSON has no infinity: a background that was not touched has no PSNR, but an SSIM."""
    if row["background_psnr"] is not None:
        return f"{row['background_psnr']:.1f}"
    return "∞" if row["background_ssim"] is not None else "–"


def _link(name: str | None, results: Results) -> str | None:
    if name is None:
        return None
    url = results.url(quote(name))
    # A relative name with a colon would be taken for a scheme.
    return url if results.system is not None else f"./{url}"


def _write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]  # optional
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    with atomic_path(path) as temporary:
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), temporary)
