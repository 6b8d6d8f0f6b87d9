"""Names of results: below the output folder, and nowhere else."""

from pathlib import Path, PurePosixPath

from kvlock_fast.batch.fields import short
from kvlock_fast.batch.ledger import NAME
from kvlock_fast.media import ENCODERS, STILLS

SUFFIXES = (*ENCODERS, *STILLS)
REPORTS = "reports"
OWN_FILES = (NAME, "index.html", "results.jsonl", "results.parquet")
MOST_BYTES = 200
"""Of one part of a name: file systems take 255, and a list of prompts and temporary files add a few."""


def numbered(output: str, number: int) -> str:
    """NAME-2.EXT of NAME.EXT."""
    path = PurePosixPath(output)
    return str(path.with_name(f"{path.stem}-{number}{path.suffix}"))


def output_problem(output: str, folder: Path) -> str | None:
    """Why a result cannot have this name; None if it can. Links are followed as they are now."""
    if "\0" in output:
        return f"must not hold a NUL, got {short(output)}"
    path = PurePosixPath(output)
    if path.is_absolute() or (len(output) > 1 and output[1] == ":"):
        return f"must be relative to the output folder, got {short(output)}"
    if "\\" in output or any(ord(letter) < 32 for letter in output):
        return f"must not hold a backslash or control characters, got {short(output)}"
    if ".." in path.parts or path.name in ("", "."):
        return f"must name a file within the output folder, got {short(output)}"
    if any(len(part.encode(errors="replace")) > MOST_BYTES for part in path.parts):
        return f"must not have a part longer than {MOST_BYTES} bytes, got {short(output)}"
    if any(part.startswith(".") for part in path.parts):
        return f"must not start with a dot, got {short(output)}"
    if not path.suffix:
        kinds = ", ".join(SUFFIXES)
        return f"must end in {kinds}, got {short(output)}: a result is one file, not a folder of images"
    if path.suffix.lower() not in SUFFIXES:
        return f"must end in {', '.join(SUFFIXES)}, got {short(output)}"
    if path.parts[0] == REPORTS:
        return f"must not lie in {REPORTS}/, where the reports go, got {short(output)}"
    return _place_problem(output, folder)


def _place_problem(output: str, folder: Path) -> str | None:
    """What is wrong with the place where the name leads today."""
    place = folder / output
    try:
        if place.is_symlink() or not place.resolve().is_relative_to(folder.resolve()):
            return f"leads out of the output folder by a link, got {short(output)}"
        if place.is_dir():
            return f"is a folder already, got {short(output)}"
        inside = [part for part in place.parents if part.is_relative_to(folder) and part != folder]
        if any(part.exists() and not part.is_dir() for part in inside):
            return f"lies below a file, got {short(output)}"
    except (OSError, RuntimeError) as error:
        return f"cannot be a file: {error}"
    return None


def id_problem(id: str) -> str | None:
    """Why a job cannot have this id; None if it can: it names files."""
    if id.startswith(".") or any(letter in "/\\" or ord(letter) < 32 or letter == "\x7f" for letter in id):
        return f"must not start with a dot or hold a slash, a backslash or control characters, got {short(id)}"
    if len(id.encode(errors="replace")) > MOST_BYTES:
        return f"must not be longer than {MOST_BYTES} bytes, got {short(id)}"
    return None


def report_name(id: str) -> str:
    """Where the page about a job goes, below the output folder."""
    return f"{REPORTS}/{id}.html"
