"""The denoising step as a CUDA graph: captured once for each kind of step, replayed for all that are of its kind.

A replay launches the same kernels on the same addresses, so whatever changes from step to step must be read from
memory that stays where it is: the stepper's state, the step's timestep and source latent, the cache's slots.
"""

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch

from kvlock_fast.errors import InputError, InputWarning

GRAPH = ("off", "auto", "on")
MOST_GRAPHS = 8
"""Kinds of steps in a run that are captured: warm-up and locked, two stages, two slots. Others run as they are."""

Work = Callable[[], None]
Capture = Callable[[Work], Work]
"""Takes a step's work, which has run before, and gives what does the same again; does not run it."""


class StepGraphs:
    """Runs steps by kind: the first of a kind as it is, the second captured, the others replayed."""

    def __init__(self, capture: Capture | None):
        """capture: None runs every step as it is."""
        self.capture = capture
        self.replays: dict[Hashable, Work] = {}
        self._seen: set[Hashable] = set()

    @property
    def active(self) -> bool:
        return self.capture is not None

    def run(self, kind: Hashable, work: Work) -> bool:
        """Do the work of one step; whether it was a replay, so that none of its Python ran."""
        if self.capture is None:
            work()
            return False
        if kind in self.replays:
            self.replays[kind]()
            return True
        if kind in self._seen and len(self.replays) < MOST_GRAPHS:
            replay = self.replays[kind] = self.capture(work)
            replay()
            return True
        self._seen.add(kind)
        work()
        return False


class CudaCapture:
    """Captures on a device; all graphs share one pool of memory, as they never run at once."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool: Any = None

    def __call__(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                work()
            self.pool = graph.pool()
        return graph.replay


def choose_capture(wish: str, device: torch.device, why_not: str | None) -> Capture | None:
    """How to capture by a wish of `GRAPH`; why_not: why this run cannot be captured, if it cannot.

    "auto" says in a warning why it declines; "on" raises InputError with the reason.
    """
    if wish == "off":
        return None
    reason = why_not if device.type == "cuda" else f"the device is {device.type}, not cuda"
    if reason is None:
        return CudaCapture(device)
    if wish == "on":
        raise InputError(f"graph is 'on', but the steps cannot be captured: {reason}")
    warnings.warn(f"steps are not captured in a CUDA graph: {reason}", InputWarning, stacklevel=4)
    return None
