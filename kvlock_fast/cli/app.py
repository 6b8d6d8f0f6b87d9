"""The application that the commands are registered with, and how help is drawn."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from kvlock_fast.parameters import OUTPUT
from kvlock_fast.version import __version__


class Command(TyperCommand):
    """A command whose --help stands in the panel of outputs, so that the first panel is what to edit."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if any(getattr(parameter, "rich_help_panel", None) == OUTPUT for parameter in self.params):
            option.rich_help_panel = OUTPUT
        return option


class Application(typer.Typer):
    """A Typer whose commands are of the class `Command`."""

    def command(self, *args: Any, **kwargs: Any) -> Any:
        """Register a command, as `typer.Typer.command` does."""
        return super().command(*args, cls=Command, **kwargs)


app = Application(
    name="kvlock-fast",
    help="Edit a region of a video by text; the background stays the source's.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kvlock-fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Edit a region of a video by text; the background stays the source's."""
