"""`kvlock-fast cache`: list, verify and prune. The folder is one entry, or a root of several."""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from kvlock_fast.cache import leases, manifest
from kvlock_fast.cache.entry import Entry
from kvlock_fast.cache.manifest import DamagedCache, MissingCache
from kvlock_fast.cache.root import Slot, slot_of
from kvlock_fast.errors import InputError
from kvlock_fast.files import check_json, write_json
from kvlock_fast.units import parse_bytes, text_bytes, text_table

_HEAD = ("entry", "size", "created", "used", "model", "steps", "format", "source prompt", "")
_PROMPT_LENGTH = 40


def list_entries(folder: Path, json_file: str | None) -> None:
    """`cache ls`: a line for each entry; what is damaged shows in its manifest only, shards are not read."""
    check_json(json_file)
    rows = [_row(slot) for slot in _slots(find_entries(folder))]
    if json_file != "-":
        print(text_table([_HEAD, *map(_line, rows)]))
    write_json(json_file, {"entries": rows, "bytes": sum(row["bytes"] for row in rows)})


def verify_entries(folder: Path, json_file: str | None) -> int:
    """`cache verify`: read every byte; the exit status, 1 if an entry is damaged."""
    check_json(json_file)
    problems = {str(entry): problem(entry) for entry in find_entries(folder)}
    if json_file != "-":
        print("\n".join(f"{entry}: {what or 'ok'}" for entry, what in problems.items()))
    write_json(json_file, {"entries": [{"entry": entry, "problem": what} for entry, what in problems.items()]})
    damaged = {entry: what for entry, what in problems.items() if what is not None}
    for entry, what in damaged.items():
        print(f"{entry}: {what}", file=sys.stderr)
    return 1 if damaged else 0


def prune_entries(folder: Path, quota: str | None, everything: bool, json_file: str | None) -> None:
    """`cache prune`: remove litter, then damaged entries, then the least recently used ones down to the quota.

    Args:
        folder: an entry, or a root of several.
        quota: an amount of memory that is left, as text; None for no limit.
        everything: remove every entry that is not in use.
        json_file: a file for the figures, "-" for stdout, or None.
    """
    limit = None if quota is None else parse_bytes(quota, "--quota")
    check_json(json_file)
    entries = find_entries(folder)
    others = 0 if entries == [folder] else len(set(folder.iterdir()) - {*entries, folder / leases.TAG})
    swept = sum(map(_sweep, entries))
    removed = _remove(entries, limit, everything)
    freed = swept + sum(row["bytes"] or 0 for row in removed)
    if json_file != "-":
        for row in removed:
            gone = "in use, kept" if row["bytes"] is None else f"removed, {text_bytes(row['bytes'])}"
            print(f"{row['entry']}: {gone} ({row['reason']})")
        if others:
            print(f"left {others} other item{'s' if others > 1 else ''} in '{folder}' untouched")
        print(f"freed {text_bytes(freed)}, of which {text_bytes(swept)} were left by interrupted or replaced writes")
    write_json(json_file, {"removed": removed, "swept_bytes": swept, "freed_bytes": freed, "left_alone": others})


def find_entries(folder: Path) -> list[Path]:
    """The folder itself, if it is an entry, or its sub-folders that are. Raises InputError if it is no cache."""
    if not folder.is_dir():
        raise InputError(f"'{folder}' is not a folder" if folder.exists() else f"there is no folder '{folder}'")
    try:
        if leases.is_entry(folder):
            return [folder]
        entries = [path for path in sorted(folder.iterdir()) if path.is_dir() and leases.is_entry(path)]
    except OSError as error:
        raise InputError(f"cannot read '{error.filename}': {error.strerror}") from error
    if not entries and not leases.is_root(folder):
        raise InputError(f"'{folder}' is not a cache: neither it nor a folder in it is an entry")
    return entries


def problem(entry: Path) -> str | None:
    """Describe the damage of an entry; None if every byte is as it was written, or it is still being written."""
    fault = _fault(entry)
    return None if fault is None or (isinstance(fault, MissingCache) and _in_use(entry)) else str(fault)


def _fault(entry: Path) -> InputError | None:
    try:
        Entry.open(entry).close()
    except InputError as error:
        return error
    return None


def _in_use(entry: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return leases.any_live(entry, "lease")
    return True  # evicted meanwhile


def _slots(entries: list[Path]) -> list[Slot]:
    """Slots of the entries that were not evicted meanwhile."""
    slots = []
    for entry in entries:
        with contextlib.suppress(FileNotFoundError):
            slots.append(slot_of(entry))
    return slots


def _sweep(entry: Path) -> int:
    """Remove litter; the bytes freed."""
    freed = 0
    with contextlib.suppress(FileNotFoundError):
        freed = leases.disk_bytes(entry)
        leases.sweep(entry)
        freed = max(0, freed - leases.disk_bytes(entry))
    with contextlib.suppress(OSError):
        entry.rmdir()
    return freed


def _row(slot: Slot) -> dict[str, Any]:
    entry = slot.folder
    row = dict(entry=entry.name or str(entry), path=str(entry), bytes=slot.nbytes, used=slot.used or None)
    row |= dict(in_use=slot.in_use, created=None, problem=None, meta={})
    try:
        content, _ = manifest.read(entry)
        # The data folder was last changed when the manifest had named it.
        created = (entry / content.data).stat().st_mtime
    except MissingCache:
        return row | dict(problem="being written, or left by an interrupted write")
    except InputError as error:
        return row | dict(problem=str(error))
    except OSError:
        return row | dict(problem="its data are missing")
    return row | dict(created=created, problem=leases.why_aside(entry), meta=content.meta)


def _remove(entries: list[Path], limit: int | None, everything: bool) -> list[dict[str, Any]]:
    """Damaged entries, then the least recently used ones until the rest takes `limit` bytes or less."""
    removed, intact = [], []
    for slot in _slots(entries):
        fault = None if everything else _fault(slot.folder)
        if everything or isinstance(fault, DamagedCache):
            what = "--all" if everything else str(fault)
            removed.append({"entry": str(slot.folder), "reason": what, "bytes": leases.remove_entry(slot.folder)})
        else:  # whole, being written, or unreadable
            intact.append(slot)
    excess = sum(slot.nbytes for slot in intact) - (limit if limit is not None else sys.maxsize)
    for slot in sorted(intact, key=lambda slot: slot.used):
        if excess > 0:
            freed = leases.remove_entry(slot.folder)
            removed.append({"entry": str(slot.folder), "reason": "least recently used", "bytes": freed})
            excess -= freed or 0
    return removed


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    meta = row["meta"]
    model = meta.get("model")
    model = model.get("family") if isinstance(model, dict) else model
    steps = meta.get("num_inference_steps", meta.get("steps"))
    steps = len(steps) if isinstance(steps, list) else steps
    prompt = _plain(meta.get("source_prompt"))
    prompt = prompt if len(prompt) <= _PROMPT_LENGTH else f"{prompt[: _PROMPT_LENGTH - 3]}..."
    times = (_time(row["created"]), _time(row["used"]))
    state = row["problem"] or ("in use" if row["in_use"] else "")
    facts = (_plain(model), _plain(steps), _plain(meta.get("format")), prompt)
    return _plain(row["entry"]), text_bytes(row["bytes"]), *times, *facts, state


def _plain(value: object) -> str:
    """The value as text that leaves the terminal as it is."""
    return "-" if value is None else "".join(c if c.isprintable() else "?" for c in str(value))


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
