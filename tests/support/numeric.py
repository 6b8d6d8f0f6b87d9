"""The tests marked `numeric` by every instruction set that this processor has, on one thread and on two.

    python -m tests.support.numeric [more of pytest's options]

ATen takes its CPU kernels by ATEN_CPU_CAPABILITY; a result that holds by one of them only holds by chance.
"""

import os
import subprocess
import sys
import time

import torch

CAPABILITIES = ("default", "avx2", "avx512")
"""In this order: a processor has all up to its own."""


def legs() -> list[tuple[str, str]]:
    """(capability, threads) of each run."""
    own = torch.backends.cpu.get_cpu_capability().lower()
    most = CAPABILITIES.index(own) if own in CAPABILITIES else 0
    if most + 1 < len(CAPABILITIES):
        print(f"numeric: this processor is {own}: without {', '.join(CAPABILITIES[most + 1 :])}", flush=True)
    return [(capability, threads) for capability in CAPABILITIES[: most + 1] for threads in ("1", "2")]


def main(options: list[str]) -> int:
    """Run pytest once a leg; the exit status: that of the first leg that failed, after all have run."""
    status = 0
    for capability, threads in legs():
        print(f"numeric: {capability}, {threads} thread{'s' if threads > '1' else ''}", flush=True)
        leg = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": threads}
        # As many workers as leave each of its threads a core: threads that wait for one spin.
        workers = max(1, len(os.sched_getaffinity(0)) // int(threads))
        command = [sys.executable, "-m", "pytest", "-q", "-m", "numeric", "-n", str(workers), *options]
        start = time.monotonic()
        code = subprocess.run(command, env=leg).returncode
        print(f"numeric: {capability}, {threads}: {time.monotonic() - start:.0f} s", flush=True)
        status = status or code
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
