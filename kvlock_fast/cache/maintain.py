"""`kvlock-fast cache`: list, verify and prune. The folder is one entry, or a root of several."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from kvlock_fast.cache import litter, manifest
from kvlock_fast.cache.entry import DamagedCache, Entry, MissingCache
from kvlock_fast.cache.root import slot_of
from kvlock_fast.errors import InputError
from kvlock_fast.files import check_writable, write_text

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_PROMPT_LENGTH = 40


def list_entries(folder: Path, json_file: str | None) -> None:
    """`cache ls`: a line for each entry; what is damaged shows in its manifest only, shards are not read."""
    _check_json(json_file)
    rows = [_row(entry) for entry in find_entries(folder)]
    if json_file != "-":
        print(_table(rows))
    _write_json(json_file, {"entries": rows, "bytes": sum(row["bytes"] for row in rows)})


def verify_entries(folder: Path, json_file: str | None) -> int:
    """`cache verify`: read every byte; the exit status, 1 if an entry is damaged."""
    _check_json(json_file)
    problems = {str(entry): problem(entry) for entry in find_entries(folder)}
    for entry, what in problems.items() if json_file != "-" else ():
        print(f"{entry}: {what or 'ok'}")
    _write_json(json_file, {"entries": [{"entry": entry, "problem": what} for entry, what in problems.items()]})
    damaged = {entry: what for entry, what in problems.items() if what is not None}
    for entry, what in damaged.items():
        print(f"damaged: {entry}: {what}", file=sys.stderr)
    return 1 if damaged else 0


def prune_entries(folder: Path, quota: str | None, everything: bool, json_file: str | None) -> None:
    """`cache prune`: remove litter, then damaged entries, then the least recently used ones down to the quota."""
    limit = 0 if everything else parse_bytes(quota)
    _check_json(json_file)
    entries = find_entries(folder)
    before = sum(map(litter.disk_bytes, entries))
    for entry in entries:
        litter.sweep(entry)
    swept = before - sum(map(litter.disk_bytes, entries))
    removed = _remove(entries, limit, everything)
    freed = swept + sum(row["bytes"] or 0 for row in removed)
    if json_file != "-":
        for row in removed:
            gone = "in use, kept" if row["bytes"] is None else f"removed, {bytes_text(row['bytes'])}"
            print(f"{row['entry']}: {gone} ({row['reason']})")
        print(f"freed {bytes_text(freed)}, of which {bytes_text(swept)} were left by interrupted or replaced writes")
    _write_json(json_file, {"removed": removed, "swept_bytes": swept, "freed_bytes": freed})


def find_entries(folder: Path) -> list[Path]:
    """The folder itself, if it is an entry, or its sub-folders that are. Raises InputError if it is no cache."""
    if not folder.is_dir():
        raise InputError(f"'{folder}' is not a folder" if folder.exists() else f"there is no folder '{folder}'")
    try:
        if litter.is_entry(folder):
            return [folder]
        entries = [path for path in sorted(folder.iterdir()) if path.is_dir() and litter.is_entry(path)]
    except OSError as error:
        raise InputError(f"cannot read '{error.filename}': {error.strerror}") from error
    if not entries and not litter.is_root(folder):
        raise InputError(f"'{folder}' is not a cache: neither it nor a folder in it is an entry")
    return entries


def problem(entry: Path) -> str | None:
    """What is wrong with an entry; None if every byte of it is as it was written."""
    try:
        Entry.open(entry).close()
    except InputError as error:
        return str(error)
    return None


def parse_bytes(text: str | None) -> int | None:
    """A size like 10GB (10^9 bytes each) or 512MiB (2^20); a number alone is bytes."""
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise InputError(f"--quota must be a size like 10GB or 512MiB, got '{text[:80]}'")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))


def bytes_text(count: int) -> str:
    """Like 1.2 GB."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _row(entry: Path) -> dict[str, Any]:
    slot = slot_of(entry)
    row = {"entry": entry.name or str(entry), "path": str(entry), "bytes": slot.nbytes, "created": None}
    row |= {"used": slot.used or None, "in_use": slot.in_use, "problem": None, "meta": {}}
    try:
        content, _ = manifest.read(entry)
        # The data folder was last changed when the manifest had named it.
        return row | {"meta": content.meta, "created": (entry / content.data).stat().st_mtime,
                      "problem": litter.why_aside(entry)}  # fmt: skip
    except MissingCache:
        return row | {"problem": "being written, or left by an interrupted write"}
    except InputError as error:
        return row | {"problem": str(error)}
    except OSError:
        return row | {"problem": "its data are missing"}


def _remove(entries: list[Path], limit: int | None, everything: bool) -> list[dict[str, Any]]:
    """Damaged entries, then the least recently used ones until the rest takes `limit` bytes or less."""
    removed, intact = [], []
    for entry in entries:
        what = "--all" if everything else _damage(entry)
        if what is None:
            intact.append(slot_of(entry))
        else:
            removed.append({"entry": str(entry), "reason": what, "bytes": litter.remove_entry(entry)})
    excess = sum(slot.nbytes for slot in intact) - (limit if limit is not None else sys.maxsize)
    for slot in sorted(intact, key=lambda slot: slot.used):
        if excess > 0:
            freed = litter.remove_entry(slot.folder)
            removed.append({"entry": str(slot.folder), "reason": "least recently used", "bytes": freed})
            excess -= freed or 0
    return removed


def _damage(entry: Path) -> str | None:
    """What is damaged; None for an entry that is whole, is being written or cannot be read."""
    try:
        Entry.open(entry).close()
    except DamagedCache as error:
        return str(error)
    except InputError:
        return None
    return None


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [("entry", "size", "created", "used", "model", "steps", "format", "source prompt", "")]
    lines += [_line(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


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
    return _plain(row["entry"]), bytes_text(row["bytes"]), *times, *facts, state


def _plain(value: Any) -> str:
    """As text that leaves the terminal as it is."""
    return "-" if value is None else "".join(c if c.isprintable() else "?" for c in str(value))


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _check_json(target: str | None) -> None:
    if target is not None and target != "-":
        check_writable(target)


def _write_json(target: str | None, data: dict[str, Any]) -> None:
    if target == "-":
        print(json.dumps(data, indent=1))
    elif target is not None:
        write_text(target, json.dumps(data, indent=1))
