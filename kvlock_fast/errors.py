"""Errors that are the user's to mend, and warnings of what was changed.

The command line prints such a message as the last line on stderr and exits with status 2; library users can catch
`InputError` (or `ValueError`). Everything else that is raised is a fault of this program.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad input. The message is one clear sentence that names the argument or file and quotes the value."""


class OutputError(InputError):
    """An output that cannot be written. The message names the path."""


class OutputLost(OutputError):
    """A place that takes no file any more, whatever the file: full, read-only, removed. The message names the path."""


class InputWarning(UserWarning):
    """Input that was changed to fit. The command line prints such a message as a line on stderr."""


_INSIDE = str(Path(__file__).parent) + os.sep
_BETWEEN = ("contextlib", "functools", "torch.utils._contextlib")
"""Modules whose frames lie between ours: context managers, and Python's and torch's decorators."""


def warn(message: str) -> None:
    """Warn of input that was changed or cut; the warning names the caller's line, the first outside the package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_INSIDE) or frame.f_globals.get("__name__") in _BETWEEN
    ):
        frame = frame.f_back
    where = frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__")
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, InputWarning, *where, registry)


def one_line(error: BaseException, most: int = 300) -> str:
    """An error's message as one line of at most `most` characters; its kind where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


@contextmanager
def os_errors(what: str, kind: type[InputError] = OutputError) -> Iterator[None]:
    """Raise an OSError as an error of the user's, in one sentence: what failed, and the system's reason."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror or error}") from error
