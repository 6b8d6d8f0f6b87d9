"""The tiers: where the arenas of the stored steps wait between the source's pass and the edits.

    resident   on the device, one arena a step
    host       in host memory (pinned where there is CUDA), two slots on the device
    disk       in memory-mapped safetensors, two slots on the device, read ahead by a thread

A store is written once, step by step, then read any number of times. With slots, the next step's bytes are on their
way while the current one is read: on CUDA by a stream of their own, so that neither the host nor the kernels wait for
a copy that came in time. Slots have fixed addresses.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kvlock_fast.cache.entry import Entry, EntryWriter
from kvlock_fast.cache.layout import Key, StepLayout
from kvlock_fast.kernels.quantize import QuantizedKV
from kvlock_fast.nvtx import span

Packed = dict[Key, QuantizedKV]


def page_lock(arena: Tensor) -> None:
    """Let the GPU copy to and from this host memory by itself.

    Not `pin_memory`: torch's allocator rounds pinned blocks up to a power of two. Raises
    OutOfMemoryError where the system refuses so much.
    """
    if not arena.numel():
        return
    try:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), arena.nbytes, 0))
    except RuntimeError as error:
        raise torch.OutOfMemoryError(f"{arena.nbytes} bytes cannot be page-locked: {error}") from error


def page_unlock(arena: Tensor) -> None:
    """The end of `page_lock`, before the memory is given back."""
    if arena.numel():
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(arena.data_ptr()))


def shard_name(step: int) -> str:
    """The shard of one stored step."""
    return f"step-{step:05d}"


class ResidentStore:
    """Everything on the device."""

    def __init__(self, layout: StepLayout, steps: tuple[int, ...], device: torch.device):
        """Takes the memory of all steps at once: if there is too little, that shows before any work is done."""
        self.layout, self.steps, self.device = layout, steps, device
        self._arenas = {step: layout.new_arena(device) for step in steps}
        self._slot: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the cache, wherever they are."""
        return sum(arena.nbytes for arena in self._arenas.values())

    @contextmanager
    def write(self, step: int) -> Iterator[Packed]:
        """Where to put the keys and values of a step."""
        yield self.layout.packed(self._arenas[step])

    def written(self) -> None:
        """All steps have been written."""

    def fixed_slots(self) -> list[Tensor]:
        """From now on every step is read at one address, for graphs: a copy on the device each."""
        if self._slot is None:
            self._slot = self.layout.new_arena(self.device)
        return [self._slot]

    def use_slots(self, slots: list[Tensor]) -> None:
        """Read at these addresses instead of those of `fixed_slots`, as many and as large."""
        (self._slot,) = slots

    @contextmanager
    def read(self, step: int) -> Iterator[Packed]:
        """The keys and values of a step, while the context is open."""
        if self._slot is None:
            yield self.layout.packed(self._arenas[step])
            return
        self._slot.copy_(self._arenas[step])
        yield self.layout.packed(self._slot)

    def close(self) -> None:
        self._arenas.clear()
        self._slot = None


class SlottedStore:
    """Two slots on the device that take turns; where the bytes wait is for `_save` and `_load` to know.

    Both run in one worker thread, in the order they were asked for, on the copies' stream where there is one.
    """

    def __init__(self, layout: StepLayout, steps: tuple[int, ...], device: torch.device):
        self.layout, self.steps, self.device = layout, steps, device
        cuda = device.type == "cuda"
        self._slots = [layout.new_arena(device) for _ in range(2)]
        self._views = [layout.packed(slot) for slot in self._slots]
        self._stream = torch.cuda.Stream(device) if cuda else None
        # A copy waits for the kernels that used its slot last; kernels wait for the copy that filled it.
        self._used = [torch.cuda.Event() if cuda else None for _ in range(2)]
        self._copied = [torch.cuda.Event() if cuda else None for _ in range(2)]
        self._pending: list[Future | None] = [None, None]
        self._holds: list[int | None] = [None, None]
        self._turn = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="kvlock-cache")
        for i in range(2):  # the slots' memory may be that of tensors whose kernels still run
            self._release(i)

    def _save(self, step: int, slot: Tensor) -> None:
        raise NotImplementedError

    def _load(self, step: int, slot: Tensor) -> None:
        raise NotImplementedError

    def fixed_slots(self) -> list[Tensor]:
        """Where steps are read, for graphs."""
        return list(self._slots)

    def use_slots(self, slots: list[Tensor]) -> None:
        """Read at these addresses instead of those of `fixed_slots`, as many and as large."""
        for i in range(2):
            self._wait(i)
        self._slots, self._views = list(slots), [self.layout.packed(slot) for slot in slots]
        self._holds = [None, None]
        for i in range(2):  # what used the slots before may still run
            self._release(i)

    @contextmanager
    def write(self, step: int) -> Iterator[Packed]:
        """Where to put the keys and values of a step; they are saved while the next step is made."""
        i, self._turn = self._turn, 1 - self._turn
        self._wait(i)
        yield self._views[i]
        self._release(i)
        self._holds[i] = None
        self._pending[i] = self._worker.submit(self._copy, self._save, step, i)

    def written(self) -> None:
        """All steps have been written; raises what went wrong on the way."""
        for i in range(2):
            self._wait(i)

    @contextmanager
    def read(self, step: int) -> Iterator[Packed]:
        """The keys and values of a step, while the context is open; the next stored step is read ahead."""
        i = self._holds.index(step) if step in self._holds else 1 - self._turn
        self._fetch(step, i)
        self._turn = i
        later = [s for s in self.steps if s > step]
        if later:
            self._fetch(later[0], 1 - i)
        self._wait(i)
        try:
            yield self._views[i]
        finally:
            self._release(i)

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)
        if self._stream is not None:
            self._stream.synchronize()
        self._slots, self._views, self._pending, self._holds = [], [], [None, None], [None, None]

    def _fetch(self, step: int, i: int) -> None:
        """Have `step` brought into slot i, unless it is there or on its way."""
        if self._holds[i] == step:
            return
        self._holds[i] = step
        self._pending[i] = self._worker.submit(self._copy, self._load, step, i)

    def _wait(self, i: int) -> None:
        """Until what was asked of slot i has been handed to the device; kernels launched from here on see it."""
        pending, self._pending[i] = self._pending[i], None
        if pending is None:
            return
        try:
            with span("transfer wait"):
                pending.result()
        except BaseException:
            self._holds[i] = None
            raise
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied[i])

    def _release(self, i: int) -> None:
        """The kernels launched so far are the last that use slot i as it is."""
        if self._stream is not None:
            self._used[i].record(torch.cuda.current_stream(self.device))

    def _copy(self, work: Any, step: int, i: int) -> None:
        on_stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with torch.inference_mode(), on_stream, span("transfers"):
            if self._stream is not None:
                self._stream.wait_event(self._used[i])
            work(step, self._slots[i])
            if self._stream is not None:
                self._copied[i].record(self._stream)


class HostStore(SlottedStore):
    """One arena a step in host memory."""

    def __init__(self, layout: StepLayout, steps: tuple[int, ...], device: torch.device):
        super().__init__(layout, steps, device)
        self._arenas: dict[int, Tensor] = {}
        try:
            for step in steps:
                arena = layout.new_arena("cpu")
                if self._stream is not None:
                    page_lock(arena)
                self._arenas[step] = arena
        except BaseException as error:
            self.close()
            if type(error) is RuntimeError:  # torch's, where the host has no memory left
                raise torch.OutOfMemoryError(str(error)) from error
            raise

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the cache, wherever they are."""
        return sum(arena.nbytes for arena in (*self._arenas.values(), *self._slots))

    def _save(self, step: int, slot: Tensor) -> None:
        self._arenas[step].copy_(slot, non_blocking=True)

    def _load(self, step: int, slot: Tensor) -> None:
        slot.copy_(self._arenas[step], non_blocking=True)

    def close(self) -> None:
        super().close()
        if self._stream is not None:
            for arena in self._arenas.values():
                page_unlock(arena)
        self._arenas.clear()


class DiskStore(SlottedStore):
    """One safetensors shard a step: written by an `EntryWriter`, read from an `Entry` once `opened` has given it."""

    def __init__(
        self, layout: StepLayout, steps: tuple[int, ...], device: torch.device, writer: EntryWriter | None = None
    ):
        super().__init__(layout, steps, device)
        self.writer = writer
        self.entry: Entry | None = None
        # Page-locked memory between file and device; without a device of its own a slot is as good.
        self._staging = self._unloaded = None
        if self._stream is not None:
            self._staging, self._unloaded = layout.new_arena("cpu"), torch.cuda.Event()
            page_lock(self._staging)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the cache, on disk and in memory."""
        memory = [*self._slots, *([] if self._staging is None else [self._staging])]
        return sum(arena.nbytes for arena in memory) + (0 if self.entry is None else self.entry.nbytes)

    def opened(self, entry: Entry, owned: bool) -> "DiskStore":
        """Read from this entry from now on; owned: close it with the store."""
        self.entry, self._owned = entry, owned
        return self

    def _save(self, step: int, slot: Tensor) -> None:
        if self._staging is not None:
            self._staging.copy_(slot, non_blocking=True)
            self._stream.synchronize()
            slot = self._staging
        self.writer.add_shard(shard_name(step), self.layout.tensors(slot))

    def _load(self, step: int, slot: Tensor) -> None:
        target = slot
        if self._staging is not None:
            self._unloaded.synchronize()  # the copy out of it that came before
            target = self._staging
        held = self.entry.tensors(shard_name(step))
        for part in self.layout.parts:
            part.view(target).copy_(held[part.name])
        if self._staging is not None:
            slot.copy_(target, non_blocking=True)
            self._unloaded.record(self._stream)

    def close(self) -> None:
        super().close()
        if self._staging is not None:
            page_unlock(self._staging)
            self._staging = None
        if self.entry is not None and self._owned:
            self.entry.close()


KVStore = ResidentStore | HostStore | DiskStore
