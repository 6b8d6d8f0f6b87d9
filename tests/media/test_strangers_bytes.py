"""Whatever bytes a file holds, a reader says one sentence about it or reads it: never another kind of error."""

import io
import random
import struct
import zipfile
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlock_fast.cli import main
from kvlock_fast.errors import InputError
from kvlock_fast.media import read_mask, read_video, write_video

LATIN = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".avi": "mpeg4", ".flv": "flv1"}


def tagged(path, codec):
    """A valid clip whose title is Latin-1, as old programs write it."""
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "caf#"
        stream = container.add_stream({"flv1": "flv"}.get(codec, codec), rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(5):
            picture = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 40 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    data = path.read_bytes()
    assert data.count(b"caf#") >= 1
    path.write_bytes(data.replace(b"caf#", b"caf\xe9"))
    return path


@pytest.mark.parametrize(("suffix", "codec"), LATIN.items(), ids=LATIN)
def test_a_tag_of_another_encoding_is_no_reason_to_refuse(tmp_path, suffix, codec):
    frames = read_video(tagged(tmp_path / f"a{suffix}", codec)).frames
    assert frames.shape == (5, 32, 48, 3) and abs(int(frames[4].mean()) - 160) < 8


def test_one_bad_file_does_not_end_a_check(tmp_path, capsys):
    tagged(tmp_path / "a.mp4", "libx264")
    (tmp_path / "b.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42" + random.Random(0).randbytes(500))
    lines = [f'{{"id": "{i}", "source": "{name}", "mask": "box:0,0,8,8", "source_prompt": "a", "prompt": "b"}}'
             for i, name in enumerate(("a.mp4", "b.mp4", "a.mp4"))]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    assert main(["batch", str(tmp_path / "m.jsonl"), "--output", str(tmp_path / "out"), "--check"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("line ")]
    assert len(said) == 1 and said[0].startswith("line 2: source: ")


def npy(shape, descr="|b1", data=b"\x01" * 64):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def npz(method, data, encrypted=False):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("mask.npy", data)
    packed = bytearray(out.getvalue())
    if encrypted:  # the flag alone: the reader asks for a password
        packed[packed.index(b"PK\x03\x04") + 6] |= 1
        packed[packed.index(b"PK\x01\x02") + 8] |= 1
    return bytes(packed)


GOOD = npy("(8, 8)")
ARRAYS = {
    "2**70 rows": npy("(1180591620717411303424, 8)"),
    "negative sizes": npy("(-8, 8)"),
    "two negative sizes": npy("(-8, -8)"),
    "no sizes": npy("()"),
    "a size that is a word": npy("('a', 8)"),
    "too short": npy("(8, 9)"),
    "dates": npy("(8, 1)", "<M8[ns]"),
    "records": npy("(8,)", "[('a', '<i8')]"),
    "no dtype": npy("(8, 8)", "nothing"),
    "nested brackets": npy("(" * 3000 + ")" * 3000),
    "a later version": b"\x93NUMPY\x09\x00" + GOOD[8:],
    "cut": GOOD[:40],
    "nothing": b"",
}


@pytest.mark.parametrize("data", ARRAYS.values(), ids=ARRAYS)
def test_an_array_is_refused_in_one_sentence(tmp_path, data):
    for name, content in (("a.npy", data), ("a.npz", npz(zipfile.ZIP_DEFLATED, data))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name) as caught:
            read_mask(tmp_path / name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("method", [0, 8, 12, 14], ids=["stored", "deflate", "bzip2", "lzma"])
@pytest.mark.parametrize("encrypted", [False, True], ids=["open", "encrypted"])
def test_every_way_of_packing(tmp_path, method, encrypted):
    (tmp_path / "a.npz").write_bytes(npz(method, GOOD, encrypted))
    if encrypted:
        with pytest.raises(InputError, match=r"a\.npz"):
            read_mask(tmp_path / "a.npz")
    else:
        assert read_mask(tmp_path / "a.npz").shape == (1, 8, 8)


def test_an_unknown_packing(tmp_path):
    packed = bytearray(npz(8, GOOD))
    for mark, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        packed[packed.index(mark) + at] = 99
    (tmp_path / "a.npz").write_bytes(bytes(packed))
    with pytest.raises(InputError, match=r"a\.npz"):
        read_mask(tmp_path / "a.npz")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A small file of each kind that is read."""
    folder = tmp_path_factory.mktemp("originals")
    video = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    for name in ("a.mkv", "a.mp4", "a.gif", "a.webm"):
        write_video(folder / name, video, Fraction(8))
    for name in ("a.png", "a.jpg"):
        write_video(folder / name, video[:1], Fraction(8))
    (folder / "a.npy").write_bytes(GOOD)
    (folder / "a.npz").write_bytes(npz(8, GOOD))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(st.data())
def test_flipped_and_cut_files_are_read_or_refused(originals, tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(originals)))
    content = bytearray(originals[name])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[place] ^= data.draw(st.integers(1, 255))
    end = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = tmp_path_factory.mktemp("flipped") / name
    path.write_bytes(bytes(content[:end]))
    for read in (read_mask, read_video) if not name.startswith("a.np") else (read_mask,):
        try:
            found = read(path)
        except InputError as error:
            assert name in str(error)
        else:
            assert (found if isinstance(found, np.ndarray) else found.frames).size > 0
