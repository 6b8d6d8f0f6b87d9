"""`kvlock-fast report`: its options."""

from pathlib import Path
from typing import Annotated

import typer

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import option


@app.command()
def report(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="What edit --trace or demo wrote.")],
    output: Annotated[Path, option("The HTML page.")],
    source: Annotated[str | None, option("The source's video; else the file that the trace names.")] = None,
    mask: Annotated[str | None, option("Its mask, as for edit; else what the trace names.")] = None,
    edited: Annotated[list[str] | None, option("The edit; once for each prompt. Else as the trace names.")] = None,
    sheet: Annotated[Path | None, option("Write one picture of the edit as well, PNG.")] = None,
) -> None:
    """Make the page about an edit again, from its trace and what is left of its videos."""
    from kvlock_fast.files import check_writable
    from kvlock_fast.media.clip import refuse_same
    from kvlock_fast.report.from_trace import remake_report

    edits = edited or []
    for path in (output, sheet):
        if path is not None:
            check_writable(path)
    inputs = [("the trace", trace), ("--source", source), ("--mask", mask), *(("--edited", path) for path in edits)]
    refuse_same([*inputs, ("--output", output), ("--sheet", sheet)])
    remake_report(trace, output, sheet, source, mask, edits)
    print(f"open {output} to see it" + (f", {sheet} for one picture" if sheet is not None else ""))
