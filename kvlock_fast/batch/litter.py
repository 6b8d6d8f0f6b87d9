"""What a killed program left in an output folder."""

import contextlib
import re
from pathlib import Path

# The temporary names of kvlock_fast.files.
_TEMPORARY = re.compile(r"\.kvlock-[0-9a-f]{12}(\..+)?")


def remove_litter(folder: Path) -> int:
    """Remove half-written files below a folder that only this process writes to; how many there were."""
    found = [path for path in folder.rglob(".kvlock-*") if _TEMPORARY.fullmatch(path.name) and path.is_file()]
    for path in found:
        with contextlib.suppress(OSError):  # another program's, which was quicker
            path.unlink()
    return len(found)
