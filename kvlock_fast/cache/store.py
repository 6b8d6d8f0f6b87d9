"""The cache's tiers, places where the arenas of the stored steps wait between the source's pass and the edits.

    resident   on the device, one arena a step
    host       in host memory (pinned where there is CUDA), two slots on the device
    disk       in memory-mapped safetensors, two slots on the device, read ahead by a thread

A store is written once, step by step, then read any number of times. With slots, the next step's bytes are on their
way while the current one is read: on CUDA by a stream of their own, so that neither the host nor the kernels wait for
a copy that came in time. Slots have fixed addresses.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from kvlock_fast.cache.entry import Entry, EntryWriter
from kvlock_fast.cache.layout import Key, StepLayout, shard_name
from kvlock_fast.kernels.quantize import QuantizedKV
from kvlock_fast.nvtx import span

Packed = dict[Key, QuantizedKV]


def page_lock(arena: Tensor) -> None:
    """Let the GPU copy to and from this host memory by itself.

    Not `pin_memory`: torch's allocator rounds pinned blocks up to a power of two. Raises OutOfMemoryError where the
    system refuses so much.
    """
    if not arena.numel():
        return
    try:
        cudart = torch.cuda.cudart()
        assert cudart is not None
        torch.cuda.check_error(cudart.cudaHostRegister(arena.data_ptr(), arena.nbytes, 0))
    except RuntimeError as error:
        raise torch.OutOfMemoryError(f"{arena.nbytes} bytes cannot be page-locked: {error}") from error


def page_unlock(arena: Tensor) -> None:
    """Undo `page_lock`, before the memory is given back."""
    cudart = torch.cuda.cudart()
    if arena.numel() and cudart is not None:
        torch.cuda.check_error(cudart.cudaHostUnregister(arena.data_ptr()))


class ResidentStore:
    """A store that is wholly on the device."""

    def __init__(self, layout: StepLayout, steps: tuple[int, ...], device: torch.device):
        """Take the memory of all steps at once: if there is too little, that shows before any work is done."""
        self.layout, self.steps, self.device = layout, steps, device
        self._arenas = {step: layout.new_arena(device) for step in steps}
        self._views = {step: layout.packed(arena) for step, arena in self._arenas.items()}
        self._slot: Tensor | None = None
        self._slot_view: Packed = {}

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the cache, wherever they are."""
        return sum(arena.nbytes for arena in self._arenas.values())

    @contextmanager
    def write(self, step: int) -> Iterator[Packed]:
        """Give the place for the keys and values of a step."""
        yield self._views[step]

    def written(self) -> None:
        """Say that all steps have been written."""

    def fixed_slots(self) -> list[Tensor]:
        """Read every step at one address from now on, for graphs: a copy on the device each."""
        if self._slot is None:
            self.use_slots([self.layout.new_arena(self.device)])
        assert self._slot is not None
        return [self._slot]

    def use_slots(self, slots: list[Tensor]) -> None:
        """Read at these addresses instead of those of `fixed_slots`, as many and as large."""
        (self._slot,) = slots
        self._slot_view = self.layout.packed(self._slot)

    @contextmanager
    def read(self, step: int) -> Iterator[Packed]:
        """Give the keys and values of a step, while the context is open."""
        if self._slot is None:
            yield self._views[step]
            return
        self._slot.copy_(self._arenas[step])
        yield self._slot_view

    def close(self) -> None:
        self._arenas.clear()
        self._views.clear()
        self._slot, self._slot_view = None, {}


class _Slot:
    """An arena on the device, with the work on it.

    holds: the step whose bytes it has or gets; pending: a copy that was asked for. A copy waits for the kernels that
    used the slot last; kernels wait for the copy that filled it.
    """

    def __init__(self, layout: StepLayout, arena: Tensor, on: ModuleType):
        self.arena, self.view = arena, layout.packed(arena)
        self.used, self.copied = on.Event(), on.Event()
        self.pending: Future[None] | None = None
        self.holds: int | None = None
        self.used.record(on.current_stream(arena.device))  # its memory may be that of tensors whose kernels still run


class SlottedStore:
    """A store with two slots on the device that take turns; a subclass's `_save` and `_load` know where the bytes wait.

    Both run in one worker thread, in the order they were asked for, on a stream of their own. On other devices than
    CUDA's, streams and events are the CPU's, which do nothing.
    """

    def __init__(self, layout: StepLayout, steps: tuple[int, ...], device: torch.device):
        self.layout, self.steps, self.device = layout, steps, device
        self._on = torch.get_device_module(device if device.type == "cuda" else "cpu")
        self._stream = self._on.Stream(device)
        self._slots = [_Slot(layout, layout.new_arena(device), self._on) for _ in range(2)]
        self._turn = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="kvlock-cache")

    def _save(self, step: int, slot: Tensor) -> None:
        raise NotImplementedError

    def _load(self, step: int, slot: Tensor) -> None:
        raise NotImplementedError

    def fixed_slots(self) -> list[Tensor]:
        """Addresses where steps are read, for graphs."""
        return [slot.arena for slot in self._slots]

    def use_slots(self, slots: list[Tensor]) -> None:
        """Read at these addresses instead of those of `fixed_slots`, as many and as large."""
        self.written()
        self._slots = [_Slot(self.layout, arena, self._on) for arena in slots]

    @contextmanager
    def write(self, step: int) -> Iterator[Packed]:
        """Give the place for the keys and values of a step; they are saved while the next step is made."""
        slot, self._turn = self._slots[self._turn], 1 - self._turn
        self._wait(slot)
        yield slot.view
        self._release(slot)
        slot.holds = None
        slot.pending = self._worker.submit(self._copy, self._save, step, slot)

    def written(self) -> None:
        """Say that all steps have been written; raises what went wrong on the way."""
        for slot in self._slots:
            self._wait(slot)

    @contextmanager
    def read(self, step: int) -> Iterator[Packed]:
        """Give the keys and values of a step, while the context is open; the next stored step is read ahead."""
        self._turn = next((i for i, slot in enumerate(self._slots) if slot.holds == step), 1 - self._turn)
        slot, other = self._slots[self._turn], self._slots[1 - self._turn]
        self._fetch(step, slot)
        later = next((number for number in self.steps if number > step), None)
        if later is not None:
            self._fetch(later, other)
        self._wait(slot)
        try:
            yield slot.view
        finally:
            self._release(slot)

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)
        if self.device.type == "cuda":
            self._stream.synchronize()
        self._slots = []

    def _fetch(self, step: int, slot: _Slot) -> None:
        """Have `step` brought into a slot, unless it is there or on its way."""
        if slot.holds != step:
            slot.holds = step
            slot.pending = self._worker.submit(self._copy, self._load, step, slot)

    def _wait(self, slot: _Slot) -> None:
        """Wait until a slot's copy has been handed to the device; kernels launched from here on see it."""
        pending, slot.pending = slot.pending, None
        if pending is None:
            return
        try:
            with span("transfer wait"):
                pending.result()
        except BaseException:
            slot.holds = None
            raise
        self._on.current_stream(self.device).wait_event(slot.copied)

    def _release(self, slot: _Slot) -> None:
        """Mark the kernels launched so far as the last that use the slot as it is."""
        slot.used.record(self._on.current_stream(self.device))

    def _copy(self, work: Callable[[int, Tensor], None], step: int, slot: _Slot) -> None:
        with torch.inference_mode(), self._on.stream(self._stream), span("transfers"):
            self._stream.wait_event(slot.used)
            work(step, slot.arena)
            slot.copied.record(self._stream)


class HostStore(SlottedStore):
    """A store with one arena a step in host memory."""

    def __init__(self, layout: StepLayout, steps: tuple[int, ...], device: torch.device):
        super().__init__(layout, steps, device)
        self._arenas: dict[int, Tensor] = {}
        try:
            for step in steps:
                arena = layout.new_arena("cpu")
                if device.type == "cuda":
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
        return sum(arena.nbytes for arena in (*self._arenas.values(), *self.fixed_slots()))

    def _save(self, step: int, slot: Tensor) -> None:
        self._arenas[step].copy_(slot, non_blocking=True)

    def _load(self, step: int, slot: Tensor) -> None:
        slot.copy_(self._arenas[step], non_blocking=True)

    def close(self) -> None:
        super().close()
        if self.device.type == "cuda":
            for arena in self._arenas.values():
                page_unlock(arena)
        self._arenas.clear()


class DiskStore(SlottedStore):
    """A store with one safetensors shard a step, written by an `EntryWriter`, read from the `Entry` of `opened`."""

    def __init__(
        self, layout: StepLayout, steps: tuple[int, ...], device: torch.device, writer: EntryWriter | None = None
    ):
        super().__init__(layout, steps, device)
        self.writer = writer
        self.entry: Entry | None = None
        # Page-locked memory between file and device; without a device of its own a slot is as good.
        self._staging: Tensor | None = None
        self._unloaded = self._on.Event()
        if device.type == "cuda":
            self._staging = layout.new_arena("cpu")
            page_lock(self._staging)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the cache, on disk and in memory."""
        memory = [*self.fixed_slots(), *([] if self._staging is None else [self._staging])]
        return sum(arena.nbytes for arena in memory) + (0 if self.entry is None else self.entry.nbytes)

    def opened(self, entry: Entry, owned: bool) -> "DiskStore":
        """Read from this entry from now on; owned: close it with the store."""
        self.entry, self._owned = entry, owned
        return self

    def _save(self, step: int, slot: Tensor) -> None:
        assert self.writer is not None
        if self._staging is not None:
            self._staging.copy_(slot, non_blocking=True)
            self._stream.synchronize()
            slot = self._staging
        self.writer.add_shard(shard_name(step), self.layout.tensors(slot))

    def _load(self, step: int, slot: Tensor) -> None:
        assert self.entry is not None
        target = slot if self._staging is None else self._staging
        self._unloaded.synchronize()  # the copy out of the staging memory that came before
        held = self.entry.tensors(shard_name(step))
        for part in self.layout.parts:
            part.view(target).copy_(held[part.name])
        if target is not slot:
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
