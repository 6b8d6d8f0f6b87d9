"""`kvlock-fast migrate`: its options."""

from pathlib import Path
from typing import Annotated

import typer

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import option


@app.command()
def migrate(
    manifest: Annotated[Path, typer.Argument(help="A manifest, or a file of defaults, written for version 0.1.")],
    output: Annotated[Path | None, option("Write it there; else in its place, the old one kept as NAME.0.1.")] = None,
) -> None:
    """Rewrite a batch manifest of version 0.1 with today's names."""
    from kvlock_fast.batch.migrate import migrate_file

    place, changed = migrate_file(manifest, output)
    if not changed:
        print(f"{manifest}: nothing to rename, " + ("left as it is" if output is None else f"copied to {place}"))
    else:
        kept = "" if output is not None else f"; the old one is {manifest.name}.0.1"
        print(f"{place}: {changed} line{'s' if changed > 1 else ''} rewritten{kept}")
