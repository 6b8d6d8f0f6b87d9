"""Named ranges around the parts of an edit, for Nsight Systems, Nsight Compute and torch.profiler.

    encode, text, denoise, decode, composite, write     what an edit goes through; "denoise" holds the rest
    source path, source pass                            where the source is at each step; its own forwards, stored
    step K                                              one denoising step, K = 0, 1, ...
    forward edit, forward source, forward all           a transformer's forward, and who is in its batch
    layers A-B, attention, prologue, lock, capture      inside a forward (loop/ranges.py); "prologue": the QK-norms,
                                                        "lock": the blend of K or V, "capture": keeping them
    epilogue                                            what follows a step's forwards: guidance, solver, variance
    transfers, transfer wait                            copies of a stored source, by their own thread; waiting for one

Off, which is the default, `span` returns one shared object that does nothing: no allocation, less than a microsecond a
range. On (`enable`, `kvlock-fast profile`, or KVLOCK_FAST_NVTX=1 in the environment) a range goes to NVTX's domain
`kvlock_fast`, and by the same name to torch.profiler while one runs. No range changes what is computed.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

DOMAIN = "kvlock_fast"
COLOURS = {
    "step": 0x4C72B0, "forward": 0x55A868, "layers": 0x937860, "layer": 0x937860, "attention": 0xDD8452,
    "prologue": 0xDA8BC3, "lock": 0xC44E52, "capture": 0x8C2D35, "epilogue": 0x8172B3, "transfers": 0x64B5CD,
    "transfer": 0xA8D8E6, "encode": 0xCCB974, "decode": 0xB59A3C, "text": 0xE0D5A4, "source": 0x2E7D5B,
    "denoise": 0xB8C4D8, "composite": 0xA0A0A0, "write": 0x707070,
}  # fmt: skip
"""0xRRGGBB by a name's first word."""

_OFF = nullcontext()
_on = os.environ.get("KVLOCK_FAST_NVTX") == "1"


def span(name: str, number: int | None = None) -> AbstractContextManager[Any]:
    """A range of this name, or "name number", while the context is open; it ends however the body ends."""
    if not _on:
        return _OFF
    import torch

    if torch.compiler.is_compiling():  # what is traced here would run, or break the graph, in every forward
        return _OFF
    return _range(name if number is None else f"{name} {number}")


def enable(on: bool = True) -> None:
    """Switch ranges on or off, for all threads. Ranges that are open stay balanced."""
    global _on
    _on = on


def enabled() -> bool:
    """Say whether ranges are on."""
    return _on


@contextmanager
def switched_on() -> Iterator[None]:
    """Switch ranges on while the context is open."""
    before = _on
    enable()
    try:
        yield
    finally:
        enable(before)


def colour(name: str) -> int:
    """0xRRGGBB of a range."""
    return COLOURS.get(name.partition(" ")[0], 0x999999)


@contextmanager
def _range(name: str) -> Iterator[None]:
    profiler, domain = _libraries()
    with profiler.record_function(name) if profiler._is_profiler_enabled else _OFF:
        domain.push_range(_attributes(name))
        try:
            yield
        finally:
            domain.pop_range()


@lru_cache(maxsize=1)
def _libraries() -> tuple[Any, Any]:
    """torch's profiler and our NVTX domain, loaded when the first range begins."""
    import nvtx
    from torch.autograd import profiler

    return profiler, nvtx.get_domain(DOMAIN)


@lru_cache(maxsize=4096)
def _attributes(name: str) -> Any:
    return _libraries()[1].get_event_attributes(name, 0xFF000000 | colour(name))
