"""What Nsight Compute wrote as CSV (`--csv --page raw`), as JSON.

python -m bench.kernels.ncu out/ncu.csv out/ncu.json
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

UNITS_THAT_SAY_MORE = {"ns", "us", "ms", "s", "byte", "Kbyte", "Mbyte", "Gbyte", "%"}


def read(path: Path) -> list[dict[str, Any]]:
    """One entry for each kernel that ran, in order: its name, and every metric with its unit as a number."""
    table = [line for line in path.read_text().splitlines() if line.startswith('"')]
    if len(table) < 2:
        return []
    names, units, *runs = csv.reader(table)
    found = []
    for run in runs:
        values = dict(zip(names, run, strict=True))
        entry: dict[str, Any] = {"kernel": values["Kernel Name"]}
        for name, unit in zip(names, units, strict=True):
            if "__" in name and values[name]:
                label = f"{name}, {unit}" if unit in UNITS_THAT_SAY_MORE else name
                entry[label] = float(values[name].replace(",", ""))
        found.append(entry)
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(read(Path(sys.argv[1])), indent=1) + "\n")
