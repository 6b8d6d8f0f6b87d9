"""Errors that are the user's to mend, and warnings of what was changed.

The command line prints such a message as the last line on stderr and exits with status 2; library users can catch
`InputError` (or `ValueError`). Everything else that is raised is a fault of this program.
"""

import sys
import warnings
from pathlib import Path


class InputError(ValueError):
    """Bad input. The message is one clear sentence that names the argument or file and quotes the value."""


class OutputError(InputError):
    """An output that cannot be written. The message names the path."""


class InputWarning(UserWarning):
    """Input that was changed to fit. The command line prints such a message as a line on stderr."""


_INSIDE = str(Path(__file__).parent)
_BETWEEN = ("contextlib.py", "functools.py")
"""Files whose frames lie between ours: context managers, and torch's and Python's decorators."""


def warn(message: str) -> None:
    """Warn of input that was changed or cut; the warning names the caller's line, the first outside the package."""
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE) | frame.f_code.co_filename.endswith(
        _BETWEEN
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, InputWarning, stacklevel=level)
