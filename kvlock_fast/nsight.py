"""NVIDIA's profilers: the commands that run `kvlock-fast profile` under them."""

import shlex
import shutil
import subprocess
from pathlib import Path

from kvlock_fast.nvtx import DOMAIN

KERNELS = 64
"""Kernels that the printed ncu command looks at: each is run again dozens of times."""


def commands(run: list[str], output: Path) -> dict[str, list[str]]:
    """The command `run` under nsys and ncu, by the tool's name; their reports go to the folder `output`."""
    report = output / "profile"
    nsys = ["nsys", "profile", "--trace=cuda,nvtx,osrt,cublas,cudnn", "--capture-range=cudaProfilerApi",
            "--capture-range-end=stop", "--force-overwrite=true", f"--output={report}"]  # fmt: skip
    ncu = ["ncu", "--profile-from-start=off", "--nvtx", f"--nvtx-include={DOMAIN}@attention/", "--set=full",
           f"--launch-count={KERNELS}", "--force-overwrite", f"--export={report}"]  # fmt: skip
    return {"nsys": [*nsys, *run], "ncu": [*ncu, *run]}


def run_tools(asked: list[str], commands: dict[str, str]) -> list[str]:
    """Run the tools that were asked for; a sentence for each that is missing or failed."""
    problems = []
    for name in asked:
        if shutil.which(name) is None:
            problems.append(f"{name} is not on the PATH: install NVIDIA Nsight, or run the command above where it is")
            continue
        status = subprocess.run(shlex.split(commands[name]), stdout=2).returncode
        if status:
            problems.append(f"{name} ended with status {status}")
    return problems
