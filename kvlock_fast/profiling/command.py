"""`kvlock-fast profile`: a locked edit under torch.profiler and NVTX, and the commands for Nsight.

The table, the picture and trace.json come from one run under torch.profiler. Nsight's tools are given the same run
without it (`--ranges-only`): two users of the GPU's tracing interface exclude each other. Only the denoising stage lies
between cudaProfilerStart and cudaProfilerStop.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import torch

from kvlock_fast.config import FORMATS, TIERS, LockConfig
from kvlock_fast.edit import find_device
from kvlock_fast.errors import InputError, warn
from kvlock_fast.files import atomic_path, output_folder, write_text
from kvlock_fast.nvtx import DOMAIN, span, switched_on
from kvlock_fast.profiling import timeline
from kvlock_fast.profiling.extent import extent_text
from kvlock_fast.profiling.picture import draw
from kvlock_fast.profiling.subjects import PipelineSubject, Subject, Wanted, make_subject
from kvlock_fast.profiling.timeline import Timeline
from kvlock_fast.settings import MOST_STEPS
from kvlock_fast.version import __version__

Progress = Callable[[str, int, int], None]


class ProfilerSwitch:
    """cudaProfilerStart and Stop around the denoising stage, which it knows by a run's progress; nothing on a CPU."""

    def __init__(self, device: torch.device, progress: Progress):
        self.device, self.progress, self.running = device, progress, False

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "denoise" and done == 0:
            self._switch(True)
        elif stage == "decode" and done == 0:
            self._switch(False)
        self.progress(stage, done, total)

    def close(self) -> None:
        """Stop, unless that is done."""
        self._switch(False)

    def _switch(self, on: bool) -> None:
        if self.device.type != "cuda" or self.running == on:
            return
        self.running = on
        torch.cuda.synchronize(self.device)
        cudart: Any = torch.cuda.cudart()
        torch.cuda.check_error(cudart.cudaProfilerStart() if on else cudart.cudaProfilerStop())


def profile(wanted: Wanted, progress: Progress) -> tuple[Timeline, dict[str, Any]]:
    """Run, and write profile.json, profile.txt, profile.png and trace.json; returns the figures of profile.json."""
    folder = output_folder(wanted.output)
    subject = prepare(wanted, progress)
    with atomic_path(folder / "trace.json") as path:
        trace = traced(subject, wanted.steps, path, progress)
    made = timeline.read_trace(trace)
    if subject.device.type == "cuda" and not made.on_gpu:
        message = "torch.profiler could not trace the GPU (is another profiler running?): times are the host's"
        warn(message)
    data = figures(wanted, subject, made)
    write_text(folder / "profile.json", json.dumps(data, indent=1))
    write_text(folder / "profile.txt", render(data, made))
    draw(data, folder / "profile.png")
    return made, data


def ranges_only(wanted: Wanted, progress: Progress) -> None:
    """Run for an attached tool: with ranges, and the denoising stage between start and stop."""
    subject = prepare(wanted, progress)
    with switched_on():
        _run(subject, wanted.steps, progress)


def prepare(wanted: Wanted, progress: Progress) -> Subject:
    """Load the model, and run one step, which compiles, chooses and loads. Raises InputError naming what is wrong."""
    if not 1 <= wanted.steps <= MOST_STEPS:
        raise InputError(f"--steps must be a whole number from 1 to {MOST_STEPS}, got {wanted.steps}")
    device = find_device(wanted.device)
    progress("load", 0, 1)
    subject = make_subject(wanted, wanted.steps, device)
    if device.type == "cuda" or isinstance(subject, PipelineSubject):
        with TemporaryDirectory(prefix="kvlock-") as folder:
            subject.run(1, Path(folder), lambda stage, done, total: None)
    progress("load", 1, 1)
    return subject


def traced(subject: Subject, steps: int, path: Path, progress: Progress) -> dict[str, Any]:
    """Run under torch.profiler, and write the Chrome trace.

    Args:
        subject: what to run.
        steps: denoising steps.
        path: where the trace is written.
        progress: called along the way.

    Returns:
        The trace.
    """
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (subject.device.type == "cuda")
    # The copies of a stored source are made by a thread of their own.
    every_thread = _ExperimentalConfig(profile_all_threads=True)
    profiler = torch.profiler.profile(activities=activities, experimental_config=every_thread)
    with _without_notes():
        profiler.start()
    try:
        with switched_on():
            _run(subject, steps, progress)
    finally:
        with _without_notes():
            profiler.stop()
    profiler.export_chrome_trace(str(path))
    return json.loads(path.read_text())


@contextmanager
def _without_notes() -> Iterator[None]:
    """Keep the notes that torch's profiler prints on stderr, past Python, from there; all else comes through."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            os.write(2, b"".join(line for line in held if not line.startswith(b"USDT:")))


def _run(subject: Subject, steps: int, progress: Progress) -> None:
    capture = ProfilerSwitch(subject.device, progress)
    with TemporaryDirectory(prefix="kvlock-") as folder:
        try:
            with span(timeline.ROOT):
                subject.run(steps, Path(folder), capture)
                if subject.device.type == "cuda":
                    torch.cuda.synchronize(subject.device)
        except torch.OutOfMemoryError as error:
            what = extent_text(subject.extent)
            raise InputError(f"{what}: there is too little memory on {subject.device}") from error
        finally:
            capture.close()


def figures(wanted: Wanted, subject: Subject, made: Timeline) -> dict[str, Any]:
    """Give all of profile.json."""
    extent = subject.extent
    cuda = subject.device.type == "cuda"
    under_nsight = commands(_own_command(wanted, subject), wanted.output)
    return {
        "model": extent.model.name,
        "weights": "random" if wanted.config not in (None, "demo") else "its own",
        "layers": extent.model.layers,
        "frames": extent.frames,
        "size": [extent.height, extent.width],
        "tokens": extent.tokens,
        "steps": wanted.steps,
        "preset": wanted.preset,
        "cache_tier": wanted.tier,
        "cache_format": None if wanted.tier == "lockstep" else wanted.format,
        "device": torch.cuda.get_device_name(subject.device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "versions": {"kvlock_fast": __version__, "torch": torch.__version__, "cuda": torch.version.cuda},
        **timeline.as_json(made),
        "commands": {tool: shlex.join(words) for tool, words in under_nsight.items()},
    }


def render(data: dict[str, Any], made: Timeline) -> str:
    """Write all of profile.txt: what ran, the table, the commands."""
    size, steps = "x".join(map(str, data["size"])), _count(data["steps"], "step")
    device = "a CPU" if data["device"] == "cpu" else data["device"]
    host = _count(data["threads"], "host thread")
    return "\n".join((
        f"{data['model']}, {_count(data['layers'], 'layer')} of {data['weights']} weights",
        f"{data['frames']} frames of {size}, {data['tokens']} tokens; {steps}, {data['preset']}, {data['cache_tier']}",
        f"{data['dtype']} on {device}, {host}; exclusive times of the {data['time_of']}",
        "",
        timeline.table(made),
        "",
        "for Nsight Systems, the denoising stage of this run:",
        f"  {data['commands']['nsys']}",
        f"for Nsight Compute, {KERNELS} kernels of its attention:",
        f"  {data['commands']['ncu']}",
        "",
    ))  # fmt: skip


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _own_command(wanted: Wanted, subject: Subject) -> list[str]:
    """`kvlock-fast profile` of this very run, which writes nothing itself; defaults are left out but for the extent."""
    extent, usual = subject.extent, Wanted()
    source = ["--config", wanted.config] if wanted.config is not None else ["--model", wanted.model]
    extent_words = ["--frames", extent.frames, "--size", f"{extent.height}x{extent.width}", "--steps", wanted.steps]
    options = {"--layers": "layers", "--preset": "preset", "--cache-tier": "tier", "--cache-format": "format",
               "--dtype": "dtype"}  # fmt: skip
    changed = {option: name for option, name in options.items() if getattr(wanted, name) != getattr(usual, name)}
    words = [*source, *extent_words, *(word for o, name in changed.items() for word in (o, getattr(wanted, name)))]
    words += ["--force"] * wanted.force + ["--device", wanted.device] * (wanted.device != "auto")
    words += ["--output", wanted.output, "--ranges-only", "--quiet"]
    installed = shutil.which("kvlock-fast")
    start = ["kvlock-fast"] if installed else [sys.executable, "-m", "kvlock_fast.cli"]
    return [*start, "profile", *map(str, words)]


def checked(**values: Any) -> Wanted:
    """Check what is asked for. Raises InputError naming what is wrong."""
    wanted = Wanted(**values)
    try:
        lock = LockConfig.preset(wanted.preset)
    except ValueError as error:
        raise InputError(str(error)) from error
    if not lock.locks:
        raise InputError(f"--preset {wanted.preset} never locks: a profile is of a locked edit")
    for option, value, known in (("--cache-tier", wanted.tier, TIERS), ("--cache-format", wanted.format, FORMATS)):
        if value not in known:
            raise InputError(f"{option} must be one of {', '.join(known)}, got '{value}'")
    return wanted


KERNELS = 64
"""Kernels that the printed ncu command looks at: each is run again dozens of times."""


def commands(run: list[str], output: Path) -> dict[str, list[str]]:
    """Put nsys and ncu in front of the command `run`, by the tool's name; their reports go to the folder `output`."""
    report = output / "profile"
    nsys = ["nsys", "profile", "--trace=cuda,nvtx,osrt,cublas,cudnn", "--capture-range=cudaProfilerApi",
            "--capture-range-end=stop", "--force-overwrite=true", f"--output={report}"]  # fmt: skip
    ncu = ["ncu", "--profile-from-start=off", "--nvtx", f"--nvtx-include={DOMAIN}@attention/", "--set=full",
           f"--launch-count={KERNELS}", "--force-overwrite", f"--export={report}"]  # fmt: skip
    return {"nsys": [*nsys, *run], "ncu": [*ncu, *run]}


def run_tools(asked: list[str], commands: dict[str, str]) -> list[str]:
    """Run the tools that were asked for; returns a sentence for each that is missing or failed."""
    problems = []
    for name in asked:
        if shutil.which(name) is None:
            problems.append(f"{name} is not on the PATH: install NVIDIA Nsight, or run the command above where it is")
            continue
        status = subprocess.run(shlex.split(commands[name]), stdout=2).returncode
        if status:
            problems.append(f"{name} ended with status {status}")
    return problems
