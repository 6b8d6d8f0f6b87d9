"""Amounts of memory and time, read and written for people, and tables of them."""

import re
from collections.abc import Iterable, Sequence

from kvlock_fast.errors import InputError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str, option: str) -> int:
    """24GB (10^9), 24GiB (2^30), 512MB or plain bytes. Raises InputError naming the option."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,6})?)\s*(?:([kmgt]i?)?b?)", text.strip().lower())
    if match is None:
        raise InputError(f"{option} must be an amount of memory like 24GB or 24GiB, got '{text[:80]}'")
    return int(float(match[1]) * UNITS[match[2] or ""])


def text_bytes(count: float) -> str:
    """Three digits and a decimal unit: 6.04 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{_digits(count / size)} {unit}"
    return f"{count:.0f} B"


def text_seconds(seconds: float) -> str:
    """Three digits and a unit: 48.3 ms."""
    for unit, size in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{_digits(seconds / size)} {unit}"
    return "0 s" if seconds == 0 else f"{seconds * 1e6:.2f} us"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def text_table(rows: Iterable[Sequence[str]], justify: str = "", gap: int = 2) -> str:
    """Lay out rows of cells in aligned columns; rows may end early, and nothing is wrapped or coloured.

    Args:
        rows: the cells, row by row.
        justify: "<" or ">" for each column; columns without one are aligned to the left.
        gap: spaces between columns.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    table = Table.grid(padding=(0, gap, 0, 0))
    for side in justify.ljust(max(map(len, rows), default=0), "<"):
        table.add_column(justify="right" if side == ">" else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell.expandtabs(1)) for cell in row))
    console = Console(width=10_000, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
