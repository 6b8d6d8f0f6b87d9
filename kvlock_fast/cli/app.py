"""The application that the commands are registered with, and how help is drawn."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from kvlock_fast.parameters import OUTPUT
from kvlock_fast.version import __version__


class Command(TyperCommand):
    """A command with --help in the panel of outputs, and both names of a switch in one column of the help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Draw the help. The command is made anew for every call, so its options may be changed for it."""
        options = self.get_params(ctx)
        for option in options:
            option.opts, option.secondary_opts = [*option.opts, *option.secondary_opts], []
            if getattr(option, "is_flag", False):
                option.metavar = ""
            if option is options[-1] and any(getattr(one, "rich_help_panel", None) == OUTPUT for one in options):
                setattr(option, "rich_help_panel", OUTPUT)  # noqa: B010
        super().format_help(ctx, formatter)


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
