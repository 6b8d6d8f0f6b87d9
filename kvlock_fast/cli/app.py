"""The application that the commands are registered with."""

from typing import Annotated

import typer

from kvlock_fast.cli.options import option
from kvlock_fast.version import __version__

app = typer.Typer(
    name="kvlock-fast",
    help="Edit a region of a video by text; the background stays the source's.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kvlock-fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, option("Print the version.", "--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Edit a region of a video by text; the background stays the source's."""
