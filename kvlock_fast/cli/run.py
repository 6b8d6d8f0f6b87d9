"""Running a command: warnings in one line, errors in one sentence, and the exit status."""

import sys
import warnings
from importlib import import_module
from typing import Any

from kvlock_fast.cli.app import app
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.renamed import OPTIONS

COMMANDS = (
    "edit",
    "batch",
    "invert",
    "mask",
    "report",
    "demo",
    "kernels",
    "plan",
    "profile",
    "doctor",
    "cache",
    "migrate",
)
"""Commands in the order of `--help`; each registers itself with the application."""
for name in COMMANDS:
    import_module(f"kvlock_fast.cli.{name}")


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _usage_message(error: Any, arguments: list[str]) -> str:
    """The library's sentence, with the value that was given where it leaves that out."""
    message = error.format_message().replace("\n", " ").rstrip(".")
    new = OPTIONS.get(getattr(error, "option_name", ""))
    if new is not None and any(new in parameter.opts for parameter in error.ctx.command.params):
        return f"{error.option_name} is called {new} now"
    for option in getattr(getattr(error, "param", None), "opts", ()):
        for i, argument in reversed(list(enumerate(arguments))):
            given = arguments[i + 1] if argument == option and i + 1 < len(arguments) else None
            given = argument.removeprefix(f"{option}=") if argument.startswith(f"{option}=") else given
            if given is not None and f"'{given}'" not in message:
                return f"{message}, got '{given}'"
    return message


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status: 0 done, 1 some work failed, 2 bad input."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", InputWarning)
            result = app(args=arguments, prog_name="kvlock-fast", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (InputError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted"
    except Exception as error:
        # Usage errors of the command-line library, whose classes move between its versions.
        if not hasattr(error, "format_message"):
            raise
        message = _usage_message(error, arguments)
    print(f"error: {message.encode(errors='backslashreplace').decode()}", file=sys.stderr, flush=True)
    return 130 if message == "interrupted" else 2
