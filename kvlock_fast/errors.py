"""Errors that are the user's to mend.

The command line prints such a message as the last line on stderr and exits with status 2; library users can catch
`InputError` (or `ValueError`). Everything else that is raised is a fault of this program.
"""


class InputError(ValueError):
    """Bad input. The message is one clear sentence that names the argument or file and quotes the value."""


class OutputError(InputError):
    """An output that cannot be written. The message names the path."""


class InputWarning(UserWarning):
    """Input that was changed to fit. The command line prints such a message as a line on stderr."""
