"""Data-parallel training on the cores of one machine: a process per core, gradients averaged once per step.

Two processes of one thread beat one process of two threads on small networks, and other work on the machine then costs
its share only, where a thread pool would wait at each operation for its slowest member.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Workers:
    """This process among its equals."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this one writes files and logs."""
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by the mean over the workers."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        parts = flat.div_(self.count).split([g.numel() for g in gradients])
        for g, part in zip(gradients, parts, strict=True):
            g.copy_(part.view_as(g))

    def agree(self, value: float) -> float:
        """The leader's value, on every worker."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, 0)
        return float(shared)


def _enter(rank: int, count: int, store: str, job: Callable[[Workers], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    job(Workers(rank, count))
    dist.destroy_process_group()


def run_workers(count: int, job: Callable[[Workers], None]) -> None:
    """Run `job` (picklable) in `count` processes of one thread; with one, here and with torch's own threads."""
    if count == 1:
        job(Workers())
        return
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        torch.multiprocessing.spawn(_enter, (count, store, job), nprocs=count)
