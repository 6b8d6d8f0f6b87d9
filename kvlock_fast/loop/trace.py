"""What happened: per step and sample the variance, alpha, omega, s* and seconds. Read from the device at the end."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.masks import ProjectedMask
from kvlock_fast.nvtx import span


@dataclass(frozen=True)
class StepRecord:
    """One step of one sample.

    variance is None before two predictions exist; alpha is 0 in steps that do not lock; s_star is 1 where guidance is
    not calibrated and in steps without the unconditional branch; tokens: computed for each branch that is run.
    """

    step: int
    sample: int
    timestep: float
    sigma: float
    variance: float | None
    alpha: float
    omega: float
    s_star: float
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Trace:
    """The schedule as it ran, and how long each stage took.

    forwards: rows that went through a transformer (a batch of 3 counts 3); foreground_share: of the tokens; cache:
    where the source's K and V were (tier, and where they were stored format, steps and bytes); tokens: of the video;
    alpha_wait_seconds: what it cost to have alpha and omega on the host, where they decide how a step is computed.
    """

    prompts: list[str]
    steps: int
    warmup_steps: int
    foreground_share: float
    forwards: int
    stage_seconds: dict[str, float]
    records: list[StepRecord]
    cache: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    alpha_wait_seconds: float = 0.0

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "prompts": self.prompts,
            "samples": len(self.prompts),
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "foreground_share": self.foreground_share,
            "forwards": self.forwards,
            "stage_seconds": self.stage_seconds,
            "cache": self.cache,
            "tokens": self.tokens,
            "alpha_wait_seconds": self.alpha_wait_seconds,
            "records": [vars(record) for record in self.records],
        }


class Clock:
    """Marks in time that do not wait for the device: CUDA events there, the monotonic clock elsewhere."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []
        self.now: Callable[[], Any] = self._event if self.cuda else time.perf_counter

    def mark(self) -> None:
        """Set a mark."""
        self.marks.append(self.now())

    def _event(self) -> torch.cuda.Event:
        with torch.cuda.device(self.device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def intervals(self) -> list[float]:
        """Seconds between one mark and the next."""
        self.wait()
        pairs = zip(self.marks[:-1], self.marks[1:], strict=True)
        return [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs]


class Run:
    """One run of the loop, over some of the prompts.

    clock: has a mark at the start and after each step; tokens: computed of each sample, step by step; steps: the run's
    figures [steps, B, 5], once it has ended; waited: seconds for alpha.
    """

    def __init__(self, device: torch.device):
        self.clock = Clock(device)
        self.steps = torch.empty(0)
        self.tokens: list[list[int]] = []
        self.waited = 0.0

    def mark(self, tokens: list[int]) -> None:
        """Count a step that has been given to the device, and the tokens it computes of each sample."""
        self.tokens.append(tokens)
        self.clock.mark()


@dataclass
class Recorder:
    """Collects device tensors during the loop; reads them once, after it."""

    device: torch.device
    runs: list[Run] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    forwards: int = 0
    cache: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.clock = Clock(self.device)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds of a stage, the device's work included."""
        start = time.perf_counter()
        with span(name):
            yield
            self.clock.wait()
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start

    def start_over(self) -> None:
        """Forget the runs so far, which came to nothing."""
        self.runs.clear()
        self.forwards = 0

    def begin(self) -> Run:
        """Start the clock of a run, whose first step begins now."""
        run = Run(self.device)
        run.clock.mark()
        self.runs.append(run)
        return run

    def end(self, steps: Tensor, waited: float = 0.0) -> None:
        """The run's figures, [steps, B, 5]: variance, alpha, omega, s* and whether the latents hold NaN or inf.

        waited: seconds for alpha.
        """
        self.runs[-1].steps, self.runs[-1].waited = steps, waited

    def first_bad_step(self) -> tuple[int, int] | None:
        """(step, sample) where the latents first became NaN or inf."""
        bad = torch.cat([run.steps[..., 4] for run in self.runs], dim=1).nonzero().tolist()
        return tuple(bad[0]) if bad else None

    def finish(
        self, prompts: list[str], warmup_steps: int, mask: ProjectedMask, timesteps: Tensor, sigmas: Tensor
    ) -> Trace:
        """The whole trace."""
        times, noise = timesteps.tolist(), sigmas.tolist()
        records: list[StepRecord] = []
        sample = 0
        for run in self.runs:
            variance, alpha, omega, s_star = (run.steps[..., i].tolist() for i in range(4))
            seconds, size = run.clock.intervals(), run.steps.shape[1]
            records += [
                StepRecord(
                    step=k,
                    sample=sample + i,
                    timestep=float(times[k]),
                    sigma=noise[k],
                    variance=None if math.isnan(variance[k][i]) else variance[k][i],
                    alpha=alpha[k][i],
                    omega=omega[k][i],
                    s_star=s_star[k][i],
                    seconds=seconds[k],
                    tokens=run.tokens[k][i],
                )
                for k in range(len(seconds))
                for i in range(size)
            ]
            sample += size
        records.sort(key=lambda record: (record.step, record.sample))
        waited = sum(run.waited for run in self.runs)
        return Trace(prompts, len(times), warmup_steps, mask.share, self.forwards, self.stages, records, self.cache,
                     mask.tokens.shape[1], waited)  # fmt: skip
