"""The cache's files: what is written comes back bit for bit, every damage is found, nothing is left or lost."""

import errno
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from kvlock_fast.cache import entry as entry_module
from kvlock_fast.cache import leases, manifest
from kvlock_fast.cache.entry import Entry, EntryWriter
from kvlock_fast.cache.leases import owned_name, owner_lives
from kvlock_fast.cache.manifest import DTYPES, DamagedCache, MissingCache
from kvlock_fast.cache.root import CacheRoot
from kvlock_fast.cli import main
from kvlock_fast.errors import InputError, InputWarning, OutputError
from kvlock_fast.owner import FOREIGN_SECONDS

TORCH_DTYPES = [getattr(torch, name) for name, _ in DTYPES.values()]


@pytest.fixture
def times(request) -> int:
    """How many times the quick number of rounds."""
    return 10 if request.config.getoption("--all") else 1


def random_tensor(shape, dtype, seed=0) -> torch.Tensor:
    """Of random bits: NaNs, infinities and subnormal numbers too."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tensor.shape, bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


def small_shards(seed=0) -> dict[str, dict[str, torch.Tensor]]:
    """Two shards of the same names and shapes."""
    return {
        f"step-{step}": {
            f"{layer}.{kind}": random_tensor((1, 9, 2, 8), torch.float8_e4m3fn, 100 * seed + 10 * step + layer)
            for layer in range(2)
            for kind in "kv"
        }
        for step in range(2)
    }


def open_files() -> str:
    """The files that this process has mapped."""
    maps = Path("/proc/self/maps")
    return maps.read_text() if maps.exists() else pytest.skip("needs /proc")


def write(writer: EntryWriter, shards=None, meta=None) -> Path:
    with writer:
        for name, tensors in (small_shards() if shards is None else shards).items():
            writer.add_shard(name, tensors)
        writer.publish({"seed": 7} if meta is None else meta)
    return writer.folder


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, by its path."""
    items = folder.rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in items}


def rewrite(folder: Path, **changes) -> None:
    """Change the manifest as one who knows its checksum can."""
    content = json.loads((folder / "manifest.json").read_text()) | changes
    del content["checksum"]
    content["checksum"] = manifest.digest_of(manifest._canonical(content))
    (folder / "manifest.json").write_bytes(manifest._canonical(content))


def data_folder(folder: Path) -> Path:
    return folder / json.loads((folder / "manifest.json").read_text())["data"]


def refusal(folder: Path) -> str:
    """What `Entry.open` says of a damaged entry."""
    with pytest.raises(DamagedCache) as caught:
        Entry.open(folder).close()
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
    def test_every_dtype_comes_back_bit_for_bit(self, tmp_path, dtype):
        shapes = [(1, 129, 3, 7), (), (0,), (3, 0, 5), (1,), (513,)]
        tensors = {f"{i}.k": random_tensor(shape, dtype, i) for i, shape in enumerate(shapes)}
        tensors["strided"] = random_tensor((6, 5, 4), dtype).transpose(0, 2)[::2]
        folder = write(EntryWriter(tmp_path / "e"), {"s": tensors}, {})
        with Entry.open(folder) as entry:
            found = entry.tensors("s")
            assert {name: bits(t) for name, t in found.items()} == {name: bits(t) for name, t in tensors.items()}

    @given(
        shards=st.dictionaries(
            st.from_regex(manifest.SHARD_NAME, fullmatch=True),
            st.dictionaries(
                st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
                st.tuples(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(TORCH_DTYPES)),
                max_size=5,
            ),
            max_size=3,
        ),
        meta=st.dictionaries(
            st.text(max_size=5),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                max_leaves=5,
            ),
            max_size=4,
        ),
    )
    def test_whatever_is_put_in_comes_out(self, tmp_path_factory, shards, meta):
        shards = {
            shard: {name: random_tensor(*spec, seed) for seed, (name, spec) in enumerate(specs.items())}
            for shard, specs in shards.items()
        }
        folder = write(EntryWriter(tmp_path_factory.mktemp("x") / "e"), shards, meta)
        with Entry.open(folder) as entry:
            assert entry.meta == meta == Entry.read_meta(folder)
            assert entry.shards == tuple(sorted(shards))
            for shard, tensors in shards.items():
                found = entry.tensors(shard)
                assert {name: bits(t) for name, t in found.items()} == {name: bits(t) for name, t in tensors.items()}

    def test_the_files_are_safetensors_and_the_data_begin_on_a_page(self, tmp_path):
        shards = small_shards()
        folder = write(EntryWriter(tmp_path / "e"), shards)
        for shard, tensors in shards.items():
            path = data_folder(folder) / f"{shard}.safetensors"
            assert {n: bits(t) for n, t in load_file(path).items()} == {n: bits(t) for n, t in tensors.items()}
            assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 4096 == 0

    def test_tensors_are_views_of_the_file_and_change_nothing_in_it(self, tmp_path):
        folder = write(EntryWriter(tmp_path / "e"))
        before = contents(folder)
        with Entry.open(folder) as entry:
            one, two = entry.tensors("step-0"), entry.tensors("step-0")
            assert all(one[name].data_ptr() == two[name].data_ptr() for name in one)
            assert entry.nbytes == sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
            one["0.k"].view(torch.uint8).fill_(0)
            assert two["0.k"].view(torch.uint8).count_nonzero() == 0
        assert contents(folder) == before

    @pytest.mark.parametrize("how", ["removed", "replaced"])
    def test_what_is_open_stays_readable(self, tmp_path, how):
        folder = write(EntryWriter(tmp_path / "e"))
        entry = Entry.open(folder)
        early = entry.tensors("step-0")
        if how == "removed":
            shutil.rmtree(folder)
        else:
            write(EntryWriter(folder), small_shards(seed=1))
        late = entry.tensors("step-1")
        entry.close()
        del entry
        gc.collect()
        expected = small_shards()
        assert {n: bits(t) for n, t in early.items()} == {n: bits(t) for n, t in expected["step-0"].items()}
        assert {n: bits(t) for n, t in late.items()} == {n: bits(t) for n, t in expected["step-1"].items()}

    def test_what_is_closed_is_let_go(self, tmp_path):
        folder = write(EntryWriter(tmp_path / "e"))
        tensors = []
        for _ in range(3):
            with Entry.open(folder) as entry:
                assert leases.any_live(folder, "lease") and str(folder) in open_files()
                tensors.append(entry.tensors("step-0"))
        assert not leases.any_live(folder, "lease") and str(folder) in open_files()
        tensors.clear()
        assert str(folder) not in open_files()

    def test_an_entry_without_shards(self, tmp_path):
        with Entry.open(write(EntryWriter(tmp_path / "e"), {}, {"a": [1, None]})) as entry:
            assert entry.shards == () and entry.meta == {"a": [1, None]} and entry.nbytes == 0


class TestWriting:
    def test_a_new_entry_takes_the_place_of_the_old_and_other_files_stay(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "data-2024").mkdir()
        (tmp_path / "lease-of-the-flat").write_text("signed")
        write(EntryWriter(tmp_path))
        old = data_folder(tmp_path)
        write(EntryWriter(tmp_path), small_shards(seed=1), {"seed": 8})
        assert Entry.read_meta(tmp_path) == {"seed": 8}
        expected = {"notes.txt", "data-2024", "lease-of-the-flat", "manifest.json", data_folder(tmp_path).name}
        assert {path.name for path in tmp_path.iterdir()} == expected and not old.exists()

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("there", [False, True], ids=["new folder", "old entry"])
    def test_a_block_that_raises_leaves_all_as_it_was(self, tmp_path, error, there):
        folder = tmp_path / "e"
        if there:
            write(EntryWriter(folder))
        before = contents(tmp_path)
        with pytest.raises(error), EntryWriter(folder) as writer:
            writer.add_shard("s", {"x": torch.ones(3)})
            raise error
        assert contents(tmp_path) == before

    def test_a_block_that_does_not_publish_leaves_all_as_it_was(self, tmp_path):
        tmp_path.joinpath("e").mkdir()
        with EntryWriter(tmp_path / "e") as writer:
            writer.add_shard("s", {"x": torch.ones(3)})
        assert contents(tmp_path) == {"e": None}

    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_an_interrupt_at_the_rename_leaves_the_old_or_the_new_entry(self, tmp_path, monkeypatch, moment):
        folder = write(EntryWriter(tmp_path / "e"), meta={"seed": 1})
        replace = Path.replace

        def interrupted(self, target):
            if moment == "after":
                replace(self, target)
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(EntryWriter(folder), small_shards(seed=1), {"seed": 2})
        monkeypatch.undo()
        with Entry.open(folder) as entry:
            assert entry.meta == {"seed": 1 if moment == "before" else 2}
        for _ in range(2):  # at the next start, and when it is superseded
            CacheRoot(tmp_path)
            assert {path.name for path in folder.iterdir()} == {"manifest.json", data_folder(folder).name}
            write(EntryWriter(folder))

    @pytest.mark.parametrize("name", ["", "../x", "a/b", "a.b", ".x", "-x", "x" * 65, "é", "a\n"])
    def test_names_that_could_leave_the_folder_are_refused(self, tmp_path, name):
        with EntryWriter(tmp_path / "e") as writer, pytest.raises(ValueError, match="a shard's name"):
            writer.add_shard(name, {})

    def test_what_cannot_be_stored_is_refused(self, tmp_path, monkeypatch):
        with EntryWriter(tmp_path / "e") as writer:
            with pytest.raises(ValueError, match="'x' has the dtype complex64"):
                writer.add_shard("s", {"x": torch.zeros(2, dtype=torch.complex64)})
            with pytest.raises(ValueError, match="__metadata__"):
                writer.add_shard("s", {"__metadata__": torch.zeros(2)})
            writer.add_shard("s", {"x": torch.zeros(2)})
            with pytest.raises(ValueError, match="a shard 's' already"):
                writer.add_shard("s", {"x": torch.zeros(2)})
            for meta in ({"x": float("nan")}, {"x": object()}):
                with pytest.raises((ValueError, TypeError)):
                    writer.publish(meta)
            with monkeypatch.context() as patch, pytest.raises(ValueError, match="more than 100"):
                patch.setattr(manifest, "MOST_BYTES", 100)
                writer.publish({})
            writer.publish({})
            with pytest.raises(ValueError, match="published already"):
                writer.publish({})
        assert Entry.read_meta(tmp_path / "e") == {}

    def test_another_programs_manifest_is_not_replaced(self, tmp_path):
        (tmp_path / "manifest.json").write_text('{"name": "my web page"}')
        with pytest.raises(OutputError, match=r"its manifest\.json is not a cache's"):
            write(EntryWriter(tmp_path))
        assert contents(tmp_path) == {"manifest.json": b'{"name": "my web page"}'}
        assert not leases.is_entry(tmp_path)

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
    @pytest.mark.parametrize("call", range(5))
    def test_an_error_of_the_disk_is_one_sentence_and_leaves_the_old_entry(self, tmp_path, monkeypatch, code, call):
        folder = write(EntryWriter(tmp_path / "e"))
        before, calls, fsync = contents(folder), iter(range(100)), os.fsync

        def full(descriptor):
            if next(calls) == call:
                raise OSError(code, os.strerror(code))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OutputError) as caught:
            write(EntryWriter(folder), small_shards(seed=1), {"seed": 8})
        assert str(caught.value) == f"cannot write the cache '{folder}': {os.strerror(code)}"
        if call < 4:
            assert contents(folder) == before
        else:  # the rename was done, only its durability is in doubt
            with Entry.open(folder) as entry:
                assert entry.meta == {"seed": 8}

    @pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
    def test_a_read_only_folder(self, tmp_path):
        folder = write(EntryWriter(tmp_path / "e"))
        folder.chmod(0o500)
        try:
            with pytest.raises(OutputError, match="Permission denied"):
                write(EntryWriter(folder))
            with CacheRoot(tmp_path).find("e") as entry:
                assert entry.meta == {"seed": 7}
        finally:
            folder.chmod(0o700)

    @pytest.mark.parametrize("place", ["file", "file/e"])
    def test_a_file_where_the_folder_should_be(self, tmp_path, place):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OutputError, match=f"cannot write the cache '{tmp_path / place}': "):
            write(EntryWriter(tmp_path / place))
        with pytest.raises(OutputError, match=f"cannot use the cache '{tmp_path / place}': "):
            CacheRoot(tmp_path / place)
        assert contents(tmp_path) == {"file": b"mine"}


WRONG = {
    "schema": (dict(schema=2), "it is not of schema 1"),
    "no schema": (dict(schema=None), "it is not of schema 1"),
    "data outside": (dict(data="../other"), "data: "),
    "data up": (dict(data=".."), "data: "),
    "shard outside": (dict(shards={"../s": {}}), r"shards.\.\./s"),
    "shard absolute": (dict(shards={"/etc/passwd": {}}), "shards"),
    "negative shape": (
        dict(shards={"s": {"x": dict(dtype="F32", shape=[-1], xxh3_128="0" * 32)}}),
        "shards.s.x.shape",
    ),
    "dtype": (dict(shards={"s": {"x": dict(dtype="F33", shape=[1], xxh3_128="0" * 32)}}), "shards.s.x.dtype"),
    "digest": (dict(shards={"s": {"x": dict(dtype="F32", shape=[1], xxh3_128="0")}}), "shards.s.x.xxh3_128"),
    "absurd size": (dict(shards={"step-0": {"x": dict(dtype="F32", shape=[2**62], xxh3_128="0" * 32)}}), "bytes"),
    "no shards": (dict(shards=[]), "shards: "),
    "meta": (dict(meta=3), "meta: "),
    "something more": (dict(more=1), "more: "),
}


class TestDamage:
    @pytest.fixture
    def entry(self, tmp_path) -> Path:
        return write(EntryWriter(tmp_path / "entry"), meta={"prompt": "café", "steps": 50, "tau": 1e-7})

    def test_a_flipped_bit_anywhere(self, entry, times):
        chance = random.Random(0)
        files = [path for path in entry.rglob("*") if path.is_file() and path.stat().st_size]
        assert len(files) == 3
        for i in range(100 * times):
            path = files[i % len(files)]
            data = path.read_bytes()
            bit = chance.randrange(8 * len(data))
            path.write_bytes(flipped(data, bit))
            assert str(path) in refusal(entry)
            path.write_bytes(data)
        Entry.open(entry).close()

    def test_every_bit_of_the_manifest(self, entry, times):
        path = entry / "manifest.json"
        data = path.read_bytes()
        for bit in range(0, 8 * len(data), 10 // times):
            path.write_bytes(flipped(data, bit))
            with pytest.raises(DamagedCache):
                manifest.read(entry)

    def test_a_file_cut_short_or_grown_or_gone(self, entry, times):
        chance = random.Random(0)
        files = [path for path in entry.rglob("*") if path.is_file() and path.stat().st_size]
        for i in range(20 * times):
            path = files[i % len(files)]
            data = path.read_bytes()
            path.write_bytes(data[: chance.randrange(len(data))])
            assert str(path) in refusal(entry)
            path.write_bytes(data + bytes(chance.randrange(1, 9)))
            assert str(path) in refusal(entry)
            path.unlink()
            with pytest.raises((DamagedCache, MissingCache), match=r"is missing|it has no manifest\.json"):
                Entry.open(entry)
            path.write_bytes(data)
        shutil.rmtree(data_folder(entry))
        assert "is missing" in refusal(entry)

    def test_shards_in_each_others_place(self, entry, tmp_path, times):
        chance = random.Random(0)
        other = write(EntryWriter(tmp_path / "other"), small_shards(seed=1))
        shards = sorted([*entry.rglob("*.safetensors"), *other.rglob("*.safetensors")])
        assert len({path.read_bytes() for path in shards}) == 4 and len({path.stat().st_size for path in shards}) == 1
        for _ in range(5 * times):
            here = chance.choice([path for path in shards if path.is_relative_to(entry)])
            there = chance.choice([path for path in shards if path != here])
            swap(here, there)
            assert str(here) in refusal(entry) or str(there) in refusal(entry)
            swap(here, there)
        Entry.open(entry).close()

    def test_a_manifest_of_another_entry(self, entry, tmp_path, times):
        mine = (entry / "manifest.json").read_bytes()
        for seed in range(1, 5 * times + 1):
            other = write(EntryWriter(tmp_path / "other"), small_shards(seed), {"seed": seed})
            shutil.copy(other / "manifest.json", entry / "manifest.json")
            assert "is missing" in refusal(entry)  # its data folder is not here
            rewrite(entry, data=json.loads(mine)["data"])
            assert "is not what was written" in refusal(entry)  # nor are its tensors
            content = json.loads((other / "manifest.json").read_bytes())
            (entry / "manifest.json").write_bytes(mine)
            rewrite(entry, meta=content["meta"])
            with Entry.open(entry) as opened:  # whoever knows the checksum can lie here: so meta is to be compared
                assert opened.meta == {"seed": seed} != json.loads(mine)["meta"]
            shutil.rmtree(other)

    @pytest.mark.parametrize("changes, what", WRONG.values(), ids=WRONG)
    def test_a_manifest_that_is_not_one_though_its_checksum_fits(self, entry, changes, what):
        rewrite(entry, **changes)
        with pytest.raises(DamagedCache, match=f"is damaged: .*{what}"):
            Entry.open(entry)

    @pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"3", b"[" * 100000, b"9" * 10000, b"\xff\xfe", b'{"a":NaN}'])
    def test_a_manifest_that_is_anything(self, entry, text):
        (entry / "manifest.json").write_bytes(text)
        assert "its checksum does not fit" in refusal(entry)

    @pytest.mark.parametrize(
        "old, new", [(rb"\u00e9", rb"\u00E9"), (b":", b": "), (b"1e-07", b"1E-07"), (b"}", b'},"schema":1')]
    )
    def test_a_manifest_that_says_the_same_in_other_bytes(self, entry, old, new):
        data = (entry / "manifest.json").read_bytes()
        assert old in data
        (entry / "manifest.json").write_bytes(new.join(data.rsplit(old, 1)))
        assert "its checksum does not fit" in refusal(entry)

    def test_an_absurdly_long_manifest_is_not_read_to_its_end(self, entry):
        os.truncate(entry / "manifest.json", 10**12)
        begin = time.monotonic()
        assert "longer than 67108864 bytes" in refusal(entry)
        assert time.monotonic() - begin < 5

    def test_the_error_is_the_users_and_says_which_manifest(self, entry):
        digest = manifest.read(entry)[1]
        shard = next(entry.rglob("*.safetensors"))
        shard.write_bytes(flipped(shard.read_bytes(), 8 * 4200))
        with pytest.raises(InputError) as caught:
            Entry.open(entry)
        assert str(caught.value) == f"cache file '{shard}' is damaged: tensor '0.k' is not what was written"
        assert caught.value.manifest == digest

    def test_a_folder_that_holds_none(self, tmp_path):
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(MissingCache, match=r"it has no manifest\.json"):
                Entry.open(folder)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def swap(one: Path, two: Path) -> None:
    one.rename(one.with_suffix(".swap"))
    two.rename(one)
    one.with_suffix(".swap").rename(two)


class TestLitter:
    FOREIGN = "01234567.89.ab"

    def test_who_lives(self, tmp_path):
        mine = tmp_path / owned_name("data")
        machine, pid, start = mine.name.split("-")[1].split(".")
        assert owner_lives(mine)
        later = tmp_path / f"data-{machine}.{pid}.{int(start, 16) + 1:x}-{'0' * 16}"
        assert owner_lives(later) is not Path("/proc/self/stat").exists()
        assert not owner_lives(tmp_path / f"data-{machine}.ffffffff.1-{'0' * 16}")
        assert not owner_lives(tmp_path / f"data-{machine}.3fffff.1-{'0' * 16}")
        assert not owner_lives(tmp_path / f"data-{self.FOREIGN}-{'0' * 16}"), "it is not there"

    @pytest.mark.parametrize("kind", ["data", "lease", "evict", "manifest"])
    def test_another_machines_are_left_for_a_day(self, tmp_path, kind):
        root = CacheRoot(tmp_path)
        folder = write(root.writer("key"))
        path = folder / f"{kind}-{self.FOREIGN}-{'0' * 16}"
        path.mkdir() if kind == "data" else path.touch()
        for age, there in ((0, True), (FOREIGN_SECONDS - 60, True), (FOREIGN_SECONDS + 60, False)):
            if path.exists():
                os.utime(path, (0, time.time() - age))
            root.sweep()
            assert path.exists() is there, age

    def test_a_damaged_manifest_keeps_all_data_until_a_new_one_comes(self, tmp_path):
        folder = write(CacheRoot(tmp_path).writer("key"))
        data, path = data_folder(folder), folder / "manifest.json"
        intact = path.read_bytes()
        path.write_bytes(intact.replace(data.name.encode(), data.name.replace("data", "dat!").encode()))
        refusal(folder)
        CacheRoot(tmp_path)
        path.write_bytes(intact)
        Entry.open(folder).close()
        path.write_bytes(b"")
        write(EntryWriter(folder))
        assert not data.exists()

    def test_what_a_dead_process_left_goes_when_the_entry_is_read(self, tmp_path):
        folder = write(EntryWriter(tmp_path / "e"))
        mine = owned_name("data")
        left = folder / mine.replace(mine.split("-")[1].split(".")[1], "3ffffff")
        left.mkdir()
        Entry.open(folder).close()
        assert not left.exists()

    def test_what_a_dead_process_left_goes_before_an_entry_is_written(self, tmp_path):
        mine = owned_name("data")
        left = tmp_path / mine.replace(mine.split("-")[1].split(".")[1], "3ffffff")
        left.mkdir()
        with EntryWriter(tmp_path):
            assert not left.exists()

    @pytest.mark.parametrize("moment", ["leased", "looked for"])
    def test_an_entry_that_is_replaced_as_it_is_leased_is_not_read_without_a_lease(self, tmp_path, monkeypatch, moment):
        folder = write(EntryWriter(tmp_path / "e"))
        if moment == "looked for":
            (folder / "manifest.json").unlink()

        def gone(where):
            raise FileNotFoundError

        monkeypatch.setattr(entry_module, "Lease", gone)
        monkeypatch.setattr(entry_module, "_map", pytest.fail)
        with pytest.raises(MissingCache):
            Entry.open(folder)

    def test_what_a_living_process_writes_is_never_touched(self, tmp_path):
        root = CacheRoot(tmp_path)
        write(root.writer("key"), meta={"seed": 1})
        with root.writer("key") as slow:
            slow.add_shard("s", {"x": torch.arange(5)})
            for seed in (2, 3):
                write(root.writer("key"), meta={"seed": seed})
            CacheRoot(tmp_path)
            assert leases.remove_entry(tmp_path / "key") is None
            slow.publish({"seed": 4})
        with root.find("key") as entry:
            assert entry.meta == {"seed": 4} and entry.tensors("s")["x"].tolist() == [0, 1, 2, 3, 4]
        assert {path.name for path in (tmp_path / "key").iterdir()} == {
            "manifest.json", data_folder(tmp_path / "key").name
        }  # fmt: skip

    def test_a_manifest_that_is_published_while_it_is_swept_keeps_its_data(self, tmp_path, monkeypatch):
        """The manifest is read after the folders are listed and their owners looked at."""
        folder = write(EntryWriter(tmp_path / "e"), meta={"seed": 1})
        list_owned = leases.owned

        def then_publish(where, *kinds):
            found = list_owned(where, *kinds)
            monkeypatch.setattr(leases, "owned", list_owned)
            write(EntryWriter(folder), meta={"seed": 2})
            return [*found, *list_owned(where, "data")]

        monkeypatch.setattr(leases, "owned", then_publish)
        leases.sweep(folder)
        with Entry.open(folder) as entry:
            assert entry.meta == {"seed": 2}

    def test_data_that_vanish_because_a_new_entry_came_are_no_damage(self, tmp_path, monkeypatch):
        folder = write(EntryWriter(tmp_path / "e"), meta={"seed": 1})
        mapped = entry_module.MappedShard

        def replace_first(*arguments):
            monkeypatch.setattr(entry_module, "MappedShard", mapped)
            write(EntryWriter(folder), meta={"seed": 2})
            return mapped(*arguments)

        monkeypatch.setattr(entry_module, "MappedShard", replace_first)
        with Entry.open(folder) as entry:
            assert entry.meta == {"seed": 2}


class TestRoot:
    def test_find_what_was_written(self, tmp_path):
        root = CacheRoot(tmp_path / "a" / "root")
        assert root.find("key") is None and not (root.path / "key").exists()
        write(root.writer("key"))
        with root.find("key") as entry:
            assert entry.meta == {"seed": 7}
            assert [slot.in_use for slot in root.slots()] == [True]
        assert [slot.in_use for slot in root.slots()] == [False]

    def test_an_entry_that_is_forgotten_is_not_leased_for_ever(self, tmp_path):
        root = CacheRoot(tmp_path)
        write(root.writer("key"))
        root.find("key")
        gc.collect()
        assert not root.slots()[0].in_use

    @pytest.mark.parametrize("key", ["", "..", "a/b", "A", "-a", "a.b", "k" * 129, "a\n"])
    def test_keys_that_are_none(self, tmp_path, key):
        root = CacheRoot(tmp_path)
        for use in (root.find, root.writer):
            with pytest.raises(ValueError, match="a cache key has"):
                use(key)

    def test_a_damaged_entry_is_set_aside_with_a_warning_until_a_new_one_comes(self, tmp_path, recwarn):
        root = CacheRoot(tmp_path)
        folder = write(root.writer("key"))
        shard = sorted(folder.rglob("*.safetensors"))[0]
        shard.write_bytes(flipped(shard.read_bytes(), 8 * 4200))
        with pytest.warns(InputWarning, match=f"cache file '{shard}' is damaged: .*; it is set aside"):
            assert root.find("key") is None
        for again in (root, CacheRoot(tmp_path)):
            assert again.find("key") is None and again.slots()[0].aside
        assert not recwarn and shard.exists() and not root.slots()[0].in_use
        write(root.writer("key"), meta={"seed": 8})
        with root.find("key") as entry:
            assert entry.meta == {"seed": 8}
        assert {path.name for path in folder.iterdir()} == {"manifest.json", data_folder(folder).name}

    def test_an_entry_that_the_caller_cannot_use_is_set_aside_by_it(self, tmp_path):
        root = CacheRoot(tmp_path)
        write(root.writer("key"), meta={"seed": 3})
        with root.find("key") as entry, pytest.warns(InputWarning, match=f"'{entry.folder}' is set aside: of seed 3"):
            root.set_aside(entry, "of seed 3")
        assert root.find("key") is None
        write(root.writer("key"))
        root.find("key").close()

    def test_only_the_manifest_that_was_read_is_set_aside(self, tmp_path):
        """One process finds damage, another has replaced the entry before the first can say so."""
        root = CacheRoot(tmp_path)
        folder = write(root.writer("key"))
        digest = manifest.read(folder)[1]
        write(root.writer("key"), meta={"seed": 8})
        leases.set_aside(folder, digest, "late")
        with root.find("key") as entry:
            assert entry.meta == {"seed": 8}
        root.sweep()
        assert not list(folder.glob("damaged-*"))

    def test_the_least_recently_used_goes_first_and_what_is_set_aside_before(self, tmp_path):
        root = CacheRoot(tmp_path)
        for i, key in enumerate(("a", "b", "c", "d")):
            write(root.writer(key))
            os.utime(root.path / key / "manifest.json", (i, i))
        root.find("a").close()  # now b, c and d were used before
        shard = next((root.path / "d").rglob("*.safetensors"))
        shard.write_bytes(b"")
        with pytest.warns(InputWarning):
            root.find("d")
        size = root.slots()[0].nbytes
        root.quota_bytes = 4 * size
        order = []
        for _ in range(4):
            before = {slot.folder.name for slot in root.slots()}
            root.make_room(4 * size - (len(before) - 1) * size)
            order += before - {slot.folder.name for slot in root.slots()}
        assert order == ["d", "b", "c", "a"] and not list(root.path.glob("*/"))

    def test_the_quota_never_evicts_what_is_in_use(self, tmp_path):
        root = CacheRoot(tmp_path)
        for key in ("a", "b", "c"):
            write(root.writer(key))
        size = root.slots()[0].nbytes
        root.quota_bytes = 3 * size
        with root.find("a"), root.find("b"):
            with pytest.raises(OutputError, match=f"has no room for {2 * size} bytes: its quota is {3 * size} bytes"):
                root.make_room(2 * size)
            assert len(root.slots()) == 3
            root.make_room(size)
            assert [slot.folder.name for slot in root.slots()] == ["a", "b"]
        root.make_room(3 * size)
        assert root.slots() == []
        root.make_room(3 * size)
        with pytest.raises(OutputError):
            root.make_room(3 * size + 1)
        CacheRoot(tmp_path).make_room(10**15)  # no quota

    def test_who_comes_during_an_eviction_waits_for_its_end(self, tmp_path):
        root = CacheRoot(tmp_path)
        folder = write(root.writer("key"))
        intent = folder / owned_name("evict")
        intent.touch()
        found = []
        reader = threading.Thread(target=lambda: found.append(root.find("key")))
        reader.start()
        reader.join(0.3)
        assert reader.is_alive() and not found
        intent.unlink()
        reader.join(10)
        assert found[0].meta == {"seed": 7}
        found[0].close()

    def test_a_lease_that_comes_during_an_eviction_stays(self, tmp_path, monkeypatch):
        """Or who took it would go on without one when the eviction is over."""
        folder = write(EntryWriter(tmp_path / "e"))
        late, marks = folder / owned_name("lease"), leases._marks
        monkeypatch.setattr(leases, "_marks", lambda where: late.touch() or marks(where))
        assert leases.remove_entry(folder) > 0
        assert [path.name for path in folder.iterdir()] == [late.name]

    def test_removing_leaves_other_files(self, tmp_path):
        folder = write(EntryWriter(tmp_path / "e"))
        (folder / "notes.txt").write_text("mine")
        freed = leases.disk_bytes(folder)
        assert leases.remove_entry(folder) == freed > 8192
        assert contents(folder) == {"notes.txt": b"mine"}
        assert leases.remove_entry(tmp_path / "nowhere") == 0


class TestCommands:
    @pytest.fixture
    def root(self, tmp_path) -> CacheRoot:
        root = CacheRoot(tmp_path / "root")
        meta = dict(model=dict(family="wan"), source_prompt="a cat\x1b[2J", num_inference_steps=50, format="int8")
        for i, key in enumerate(("a", "b", "c")):
            write(root.writer(key), meta=meta)
            os.utime(root.path / key / "manifest.json", (1000 + i, 1000 + i))
        return root

    @staticmethod
    def damage(root: CacheRoot, key: str) -> Path:
        shard = sorted((root.path / key).rglob("*.safetensors"))[0]
        shard.write_bytes(flipped(shard.read_bytes(), 8 * 4200))
        return shard

    def test_ls(self, root, capsys):
        with root.find("b"):
            assert main(["cache", "ls", str(root.path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["entry", "size", "created", "used", "model", "steps", "format", "source", "prompt"]
        assert [line.split()[0] for line in lines[1:]] == ["a", "b", "c"]
        assert all("wan" in line and "int8" in line and "a cat?[2J" in line for line in lines[1:])
        assert lines[2].endswith("in use") and "kB" in lines[1]

    def test_ls_of_one_as_json(self, root, capsys, tmp_path):
        assert main(["cache", "ls", str(root.path / "a"), "--json", "-"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["bytes"] == root.slots()[0].nbytes
        (row,) = data["entries"]
        assert row["meta"]["num_inference_steps"] == 50 and row["used"] == 1000 and row["problem"] is None
        assert abs(row["created"] - time.time()) < 300
        assert main(["cache", "ls", str(root.path), "--json", str(tmp_path / "o.json")]) == 0
        assert len(json.loads((tmp_path / "o.json").read_text())["entries"]) == 3

    def test_verify(self, root, capsys):
        assert main(["cache", "verify", str(root.path)]) == 0
        assert capsys.readouterr().out.count(": ok\n") == 3
        shard = self.damage(root, "b")
        assert main(["cache", "verify", str(root.path)]) == 1
        captured = capsys.readouterr()
        assert captured.out.count(": ok\n") == 2
        expected = f"{root.path / 'b'}: cache file '{shard}' is damaged: tensor '0.k' is not what was written"
        assert captured.err.splitlines()[-1] == expected
        assert main(["cache", "verify", str(root.path / "a")]) == 0
        assert main(["cache", "verify", str(root.path / "b"), "--json", "-"]) == 1
        data = json.loads(capsys.readouterr().out.partition("\n")[2] or "null")
        assert str(shard) in data["entries"][0]["problem"]

    def test_verify_needs_no_torch(self, root):
        code = f"import sys; from kvlock_fast.cli import main; status = main(['cache', 'verify', {str(root.path)!r}])"
        code += "; sys.exit(status or 'torch' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])

    def test_verify_a_damaged_manifest_and_missing_data(self, root, capsys):
        path = root.path / "a" / "manifest.json"
        path.write_bytes(flipped(path.read_bytes(), 99))
        shutil.rmtree(data_folder(root.path / "b"))
        # Nothing of ours is left in it, so it may be anybody's.
        (root.path / "c" / "manifest.json").write_bytes(b"")
        shutil.rmtree(next((root.path / "c").glob("data-*")))
        assert main(["cache", "verify", str(root.path)]) == 1
        assert [line.split(": ")[0] for line in capsys.readouterr().err.splitlines()] == [
            str(root.path / key) for key in "ab"
        ]
        assert main(["cache", "ls", str(root.path)]) == 0
        assert "is damaged" in capsys.readouterr().out

    def test_what_is_being_written_is_no_damage_but_a_lost_manifest_is(self, root, capsys):
        with root.writer("d"):
            assert main(["cache", "verify", str(root.path)]) == 0
            assert main(["cache", "prune", str(root.path)]) == 0
            assert main(["cache", "ls", str(root.path)]) == 0
            assert "being written" in capsys.readouterr().out
        (root.path / "a" / "manifest.json").unlink()
        assert main(["cache", "verify", str(root.path)]) == 1
        assert f"no cache in '{root.path / 'a'}'" in capsys.readouterr().err
        assert main(["cache", "prune", str(root.path)]) == 0
        assert "freed 9" in capsys.readouterr().out and not (root.path / "a").exists()

    def test_prune_removes_litter_and_damage_and_says_what_it_freed(self, root, capsys):
        self.damage(root, "b")
        left = root.path / "a" / f"data-{owned_name('x').split('-')[1].rpartition('.')[0]}.0-{'0' * 16}"
        left.mkdir()
        (left / "s.safetensors").write_bytes(bytes(5000))
        (root.path / "other").mkdir()
        (root.path / "other" / "notes.txt").write_text("mine")
        assert main(["cache", "prune", str(root.path)]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[0].startswith(f"{root.path / 'b'}: removed, ") and "is damaged" in out[0]
        assert "5.00 kB were left" in out[-1] and not left.exists()
        assert [path.name for path in sorted(root.path.glob("*/"))] == ["a", "c", "other"]

    def test_prune_to_a_quota_and_all(self, root, capsys):
        size = root.slots()[0].nbytes
        with root.find("a"):
            assert main(["cache", "prune", str(root.path), "--quota", str(2 * size), "--json", "-"]) == 0
            data = json.loads(capsys.readouterr().out)
            assert [row["entry"] for row in data["removed"]] == [str(root.path / "b")] and data["freed_bytes"] == size
            assert main(["cache", "prune", str(root.path), "--all"]) == 0
            assert "in use, kept" in capsys.readouterr().out
            assert [slot.folder.name for slot in root.slots()] == ["a"]
        assert main(["cache", "prune", str(root.path / "a"), "--all"]) == 0
        assert root.slots() == [] and main(["cache", "ls", str(root.path)]) == 0

    @pytest.mark.parametrize("command", ["ls", "verify", "prune"])
    def test_what_is_no_cache(self, tmp_path, capsys, command):
        (tmp_path / "page").mkdir()
        (tmp_path / "page" / "manifest.json").write_text("{}")
        (tmp_path / "file").write_text("mine")
        before = contents(tmp_path)
        for place in (tmp_path, tmp_path / "page", tmp_path / "file", tmp_path / "nowhere"):
            assert main(["cache", command, str(place)]) == 2
            captured = capsys.readouterr()
            assert captured.out == "" and len(captured.err.splitlines()) == 1 and str(place) in captured.err
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "10XB", "ten", "1" * 40])
    def test_a_quota_that_is_none(self, root, capsys, text):
        assert main(["cache", "prune", str(root.path), f"--quota={text}"]) == 2
        assert "--quota must be" in capsys.readouterr().err.splitlines()[-1]
        assert len(root.slots()) == 3
