"""Processes that write and read a cache and are killed at it.

A program of its own, because it forks: the test suite's process has threads, which do not survive that. It reads
lines of JSON, [function, folder, arguments ...], and answers each with a line: what the function found.
"""

import errno
import json
import os
import random
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from kvlock_fast.cache import leases, manifest
from kvlock_fast.cache.entry import Entry, EntryWriter
from kvlock_fast.cache.leases import kind_of, owned_name
from kvlock_fast.cache.root import CacheRoot
from kvlock_fast.errors import InputWarning, OutputError
from tests.support.forks import die_at_operation, forked

SHARDS = 3


def write(writer: EntryWriter, value: int) -> None:
    """An entry that says `value` in its meta and in every element."""
    with writer:
        for shard in range(SHARDS):
            writer.add_shard(f"step-{shard}", {"k": torch.full((50, 7), value), "v": torch.full((3,), float(value))})
        writer.publish({"value": value})


def is_whole(entry: Entry) -> bool:
    """Whether an entry is one that `write` wrote, and no mixture of two."""
    tensors = [tensor for shard in entry.shards for tensor in entry.tensors(shard).values()]
    return len(tensors) == 2 * SHARDS and all((tensor == entry.meta["value"]).all() for tensor in tensors)


def litter_in(folder: Path) -> list[str]:
    """What lies in an entry's folder and is not the entry's."""
    content, _ = manifest.read(folder)
    expected = {folder / manifest.NAME, folder / content.data, folder / content.data / leases.PUBLISHED}
    expected |= {folder / content.data / f"{shard}.safetensors" for shard in content.shards}
    return [str(path) for path in folder.rglob("*") if path not in expected]


def after_a_crash(path: Path, old: int | None, new: int) -> dict[str, int]:
    """What is wrong after the next start."""
    root = CacheRoot(path)
    folder = path / "key"
    entry = root.find("key")
    if entry is None:
        # The old one was there, so it must be there still.
        return {"torn": int(old is not None), "litter": int(folder.exists()), "new": 0}
    with entry:
        torn = not is_whole(entry) or entry.meta["value"] not in (old, new)
        is_new = entry.meta["value"] == new
    return {"torn": int(torn), "litter": len(litter_in(folder)), "new": int(is_new)}


def killed_at_every_operation(path: Path, stride: int) -> dict:
    """Kill a first write, and one that replaces, before each `stride`-th operation, until one gets to its end."""
    found = []
    for replacing in (False, True):
        for number in range(1 + replacing, 1000, stride):
            root = CacheRoot(path)
            leases.remove_entry(path / "key")
            if replacing:
                write(root.writer("key"), 1)

            def work(number=number, root=root):
                die_at_operation(number)
                write(root.writer("key"), 2)

            status = os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])
            found.append(after_a_crash(path, 1 if replacing else None, 2))
            if status != -signal.SIGKILL:
                break
    return totals(found)


def killed_at_any_time(path: Path, kills: int) -> dict:
    """Kill a process that writes one entry after the other; more often, if it never got to the end of one."""
    found, value = [], 0
    root = CacheRoot(path)
    chance = random.Random(0)
    while len(found) < kills or (len(found) < 20 * kills and not any(one["new"] for one in found)):
        begin = value

        def work(begin=begin):
            for i in range(1, 10**6):
                write(root.writer("key"), begin + i)

        pid = forked(work)
        time.sleep(chance.uniform(0.002, 0.08))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        CacheRoot(path)
        entry = root.find("key")
        if entry is None:
            found.append({"torn": int(begin > 0), "litter": int((path / "key").exists()), "new": 0})
            continue
        with entry:
            value = entry.meta["value"]
            torn = not is_whole(entry) or value < begin
        found.append({"torn": int(torn), "litter": len(litter_in(path / "key")), "new": int(value > begin)})
    return totals(found)


def mixed(path: Path, processes: int, rounds: int) -> dict:
    """Processes that write, read and evict one key, and say what they read."""
    root = CacheRoot(path)
    write(root.writer("key"), 0)
    pids = [
        forked(lambda number=number: mix(path, number, rounds, path.parent / f"{number}.json"))
        for number in range(processes)
    ]
    failed = sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
    found = [json.loads(file.read_text()) for file in path.parent.glob("*.json")]
    CacheRoot(path)
    left = litter_in(path / "key") if (path / "key" / manifest.NAME).exists() else list(path.glob("key/*"))
    return {**totals(found), "failed": failed, "litter": len(left)}


def mix(path: Path, number: int, rounds: int, report: Path) -> None:
    chance = random.Random(number)
    found = dict(corrupt=0, reads=0, misses=0, writes=0, evictions=0)
    root = CacheRoot(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)  # nothing is damaged here, so nobody may say so
        for i in range(rounds):
            what = chance.random()
            if what < 0.4:
                write(root.writer("key"), 1000 * number + i)
                found["writes"] += 1
            elif what < 0.5:
                found["evictions"] += leases.remove_entry(path / "key") is not None
            elif (entry := root.find("key")) is None:
                found["misses"] += 1
            else:
                with entry:
                    time.sleep(chance.uniform(0, 0.01))  # meanwhile it is replaced
                    found["corrupt"] += not is_whole(entry) or not (path / "key" / manifest.NAME).exists()
                found["reads"] += 1
    report.write_text(json.dumps(found))


def evicted_while_read(path: Path, reads: int) -> dict:
    """One process evicts and writes again as fast as it can; this one reads, and looks if what it leased stays."""
    root = CacheRoot(path)
    write(root.writer("key"), 1)

    def work():
        while True:
            if leases.remove_entry(path / "key") is not None:
                write(root.writer("key"), 1)

    pid = forked(work)
    found, end = [], time.monotonic() + 100
    while len(found) < reads and time.monotonic() < end:
        if (entry := root.find("key")) is not None:
            with entry:
                time.sleep(0.002)
                found.append({"evicted": int(not (path / "key" / manifest.NAME).exists())})
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return totals(found)


def limited(path: Path) -> dict:
    """Write where no file may grow beyond 20,000 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    try:
        with EntryWriter(path) as writer:
            writer.add_shard("small", {"x": torch.zeros(100)})
            writer.add_shard("large", {"x": torch.zeros(10000)})
    except OutputError as error:
        return {"message": str(error), "expected": os.strerror(errno.EFBIG), "exists": path.exists()}
    return {}


def leave(path: Path, *kinds: str) -> list[str]:
    """Leave what a process that dies leaves of each kind."""
    paths = [path / owned_name(kind) for kind in kinds]
    for item in paths:
        item.mkdir(parents=True) if kind_of(item.name) in ("data", "trash") else item.touch()
    return [item.name for item in paths]


def totals(found: list[dict[str, int]]) -> dict[str, int]:
    return {"rounds": len(found), **{key: sum(one[key] for one in found) for key in (found[0] if found else ())}}


def answer(name: str, folder: str, *arguments: object) -> str:
    """What a function found, as JSON; "null" if it failed. It ran in a process that has ended."""
    reader, writer = os.pipe()

    def work():
        os.write(writer, json.dumps(globals()[name](Path(folder), *arguments)).encode())

    failed = os.waitpid(forked(work), 0)[1] != 0
    os.close(writer)
    with os.fdopen(reader) as file:
        return "null" if failed else file.read()


if __name__ == "__main__":
    for line in sys.stdin:
        print(answer(*json.loads(line)), flush=True)
