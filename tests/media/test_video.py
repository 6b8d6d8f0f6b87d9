"""Video in and out: kinds of files, colours, limits, damage, and outputs that are whole or absent."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kvlock_fast import files, media
from kvlock_fast.errors import InputError, OutputError
from kvlock_fast.media import images, video_in, video_out
from tests.support.clipmaker import encode, encode_planes, noise, turn

KINDS = {
    "clip.mp4": ("libx264", "yuv420p", "rgb24"),
    "clip.mov": ("qtrle", "argb", "rgb24"),
    "clip.mkv": ("ffv1", "yuv420p10le", "rgb24"),
    "clip.webm": ("libvpx-vp9", "yuv420p", "rgb24"),
    "clip.avi": ("mpeg4", "yuv420p", "rgb24"),
    "clip.gif": ("gif", "rgb8", "rgb24"),
}


def make(folder, name, frames=20, height=48, width=64):
    codec, pix_fmt, _ = KINDS[name]
    pictures = noise(frames, height, width)
    if pix_fmt == "argb":
        pictures = np.concatenate([np.full_like(pictures[..., :1], 255), pictures], axis=-1)
        return encode(folder / name, codec, pix_fmt, list(pictures), source_format="argb")
    frames = [av.VideoFrame.from_ndarray(p, format="rgb24").reformat(format=pix_fmt).to_ndarray() for p in pictures]
    if pix_fmt == "rgb8":
        return encode(folder / name, codec, pix_fmt, frames, source_format=pix_fmt)
    return encode(folder / name, codec, pix_fmt, list(pictures))


def colour_bars(height=64, width=192, frames=3):
    """The eight bars, at full and at three quarters, and a grey ramp: uint8 `[F, H, W, 3]`."""
    bars = np.array([[r, g, b] for r in (0, 1) for g in (0, 1) for b in (0, 1)])
    top = np.stack([bars * 255, bars * 191, np.linspace(0, 255, 8).round().astype(int)[:, None].repeat(3, 1)])
    rows = np.arange(height) * 3 // height
    columns = np.arange(width) * 8 // width
    picture = top[rows][:, columns].astype(np.uint8)
    return np.repeat(picture[None], frames, axis=0)


def inside_bars(height=64, width=192, margin=7):
    """Pixels away from the edges between bars, where subsampled colour mixes by design."""
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * 8 // width

    def calm(index):
        padded = np.pad(index, margin, mode="edge")
        return np.all([padded[i : i + len(index)] == index for i in range(2 * margin + 1)], axis=0)

    return calm(rows)[:, None] & calm(columns)[None]


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_files(tmp_path, name):
    video = media.read_video(make(tmp_path, name))
    assert video.frames.shape == (20, 48, 64, 3)
    assert video.frames.dtype == np.uint8
    assert video.frames.flags.c_contiguous
    # A GIF counts hundredths of a second, so 16 per second is not quite to be had.
    assert float(video.fps) == pytest.approx(16, rel=0.01 if name.endswith("gif") else 0)


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), Fraction(15), Fraction(25, 2)], ids=str)
def test_the_rate_survives(tmp_path, fps):
    for name in ("clip.mp4", "clip.mkv"):
        media.write_video(tmp_path / name, noise(5, 16, 16), fps)
        assert float(media.read_video(tmp_path / name).fps) == pytest.approx(float(fps), rel=1e-3)
    assert media.read_video(tmp_path / "clip.mp4").fps == fps


def test_max_frames_reads_the_first(tmp_path):
    path = make(tmp_path, "clip.mp4")
    assert np.array_equal(media.read_video(path, max_frames=7).frames, media.read_video(path).frames[:7])
    with pytest.raises(InputError, match="at least 1, not 0"):
        media.read_video(path, max_frames=0)


@pytest.mark.parametrize("name", ["a:b.mp4", "100%d.mp4", "Ärger mit Namen.mp4"])
def test_names_that_are_not_patterns_or_protocols(tmp_path, name):
    make(tmp_path, "clip.mp4").rename(tmp_path / name)
    assert len(media.read_video(tmp_path / name).frames) == 20


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_honoured(tmp_path, degrees):
    path = make(tmp_path, "clip.mp4")
    stored = media.read_video(path).frames
    shown = media.read_video(turn(path, degrees)).frames
    # np.rot90 turns anticlockwise.
    assert np.array_equal(shown, np.rot90(stored, -degrees // 90, axes=(1, 2)))


def test_transparency_lies_over_black(tmp_path):
    picture = np.zeros((16, 16, 4), dtype=np.uint8)
    picture[..., 0] = 200
    picture[:8, :, 3] = 255
    picture[8:12, :, 3] = 128
    Image.fromarray(picture).save(tmp_path / "a.png")
    encode(tmp_path / "a.mov", "qtrle", "argb", [picture[..., [3, 0, 1, 2]]], source_format="argb")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "folder/a.png")
    for source in ("a.mov", "folder"):
        red = media.read_video(tmp_path / source).frames[0, :, :, 0]
        assert red[0, 0] == 200 and red[9, 0] == pytest.approx(100, abs=1) and red[15, 0] == 0


def test_transparent_gif(tmp_path):
    red, clear = (Image.new("RGBA", (20, 10), colour) for colour in ((255, 0, 0, 255), (0, 0, 0, 0)))
    red.paste(clear.crop((0, 0, 10, 10)), (0, 0))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[red.rotate(180)], duration=100, disposal=2)
    frames = media.read_video(tmp_path / "a.gif").frames
    assert frames.shape == (2, 10, 20, 3)
    assert frames[0, 5, 15].tolist() == [255, 0, 0] and frames[0, 5, 2].tolist() == [0, 0, 0]


def test_folder_of_images(tmp_path):
    pictures = noise(12, 9, 7)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"frame{i}.png")
    (tmp_path / ".hidden.png").write_bytes(b"not a picture")
    (tmp_path / "notes.txt").write_text("not a picture either")
    video = media.read_video(tmp_path)
    # 10 and 11 come after 9, not after 1.
    assert np.array_equal(video.frames, pictures)
    assert video.fps == 16


def test_images_are_shown_upright_and_in_eight_bits(tmp_path):
    picture = noise(1, 9, 7)[0]
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(media.read_video(tmp_path).frames[0], np.rot90(picture, -1))
    (tmp_path / "a.png").unlink()
    deep = np.array([[0, 257, 65535], [32768, 12850, 1]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "b.png")
    assert media.read_video(tmp_path).frames[0, :, :, 0].tolist() == [[0, 1, 255], [128, 50, 0]]


# --- colours -------------------------------------------------------------------------------------------------------

# Kr and Kb of ITU-R BT.601, BT.709 and BT.2020.
LUMA = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}
MATRICES = {"untagged": 2, "709": 1, "601": 6, "2020": 9}
COLOURS = [
    (81, 90, 240),
    (145, 54, 34),
    (41, 240, 110),
    (180, 128, 128),
    (16, 128, 128),
    (235, 128, 128),
    (120, 160, 90),
]


def to_rgb(y, u, v, matrix, full, depth):
    """RGB 0 to 255 of one colour, by the equations of the recommendations."""
    scale = 2 ** (depth - 8)
    y, u, v = y / scale, u / scale, v / scale
    y, u, v = (
        (y / 255, (u - 128) / 255, (v - 128) / 255) if full else ((y - 16) / 219, (u - 128) / 224, (v - 128) / 224)
    )
    kr, kb = LUMA[matrix]
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    return np.clip(np.array([red, green, blue]) * 255, 0, 255)


@pytest.mark.parametrize("depth", [8, 10])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize(("tag", "size", "matrix"), [
    ("601", (32, 48), "601"),
    ("709", (32, 48), "709"),
    ("2020", (32, 48), "2020"),
    ("untagged", (32, 48), "601"),
    ("untagged", (720, 16), "709"),
])  # fmt: skip
def test_matrix_and_range(tmp_path, tag, size, matrix, full, depth):
    scale = 2 ** (depth - 8)
    pix_fmt = "yuv420p" if depth == 8 else "yuv420p10le"
    for i, colour in enumerate(COLOURS):
        values = [value * scale for value in colour]
        path = encode_planes(
            tmp_path / f"{i}.mkv", pix_fmt, values, size, colorspace=MATRICES[tag], color_range=2 if full else 1
        )
        picture = media.read_video(path).frames[0]
        expected = to_rgb(*values, matrix, full, depth)
        assert np.abs(picture - expected).max() <= 1.5, (colour, picture[0, 0], expected)


@pytest.mark.parametrize(("height", "width"), [(64, 192), (63, 191)], ids=["even", "odd"])
def test_colour_bars_come_back(tmp_path, height, width):
    bars = colour_bars(height, width)
    # Without loss only rounding is left; with it, ringing at the edges too. A wrong matrix or range shifts whole bars.
    for quality, most, shift in ((0, 2, 0.5), (16, 12, 0.5)):
        media.write_video(tmp_path / "a.mp4", bars, 16, quality=quality)
        back = media.read_video(tmp_path / "a.mp4").frames
        assert back.shape == bars.shape
        error = (back.astype(int) - bars)[:, inside_bars(height, width)]
        assert np.abs(error).max() <= most
        assert np.abs(error.mean(axis=(0, 1))).max() < shift


def test_the_file_says_its_colours(tmp_path):
    media.write_video(tmp_path / "a.mp4", noise(2, 16, 16), 16)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range, context.color_primaries, context.color_trc) == (1, 1, 1, 1)
        assert context.pix_fmt == "yuv420p"


# --- writing -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_mkv_is_lossless_at_any_size(tmp_path_factory, frames, height, width, seed):
    pictures = noise(frames, height, width, seed)
    path = tmp_path_factory.mktemp("mkv") / "a.mkv"
    media.write_video(path, pictures, 16)
    assert np.array_equal(media.read_video(path).frames, pictures)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (17, 16), (16, 33), (37, 53)], ids=str)
def test_mp4_keeps_any_size(tmp_path, size):
    flat = np.full((3, *size, 3), (40, 120, 200), dtype=np.uint8)
    media.write_video(tmp_path / "a.mp4", flat, 16)
    back = media.read_video(tmp_path / "a.mp4").frames
    assert back.shape == flat.shape
    assert np.abs(back.astype(int) - flat).max() <= 3


def test_default_quality_is_near_transparent(clips, tmp_path):
    source = media.read_video(clips / "tennis.mp4", max_frames=9)
    media.write_video(tmp_path / "a.mp4", source.frames, source.fps)
    back = media.read_video(tmp_path / "a.mp4").frames
    error = np.square(back.astype(float) - source.frames).mean()
    assert 10 * np.log10(255**2 / error) > 40


def test_an_output_replaces_an_older_one_and_follows_the_umask(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    before = os.umask(0o027)
    try:
        media.write_video(path, noise(2, 16, 16), 16)
    finally:
        os.umask(before)
    assert len(media.read_video(path).frames) == 2
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("error", [RuntimeError("x"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, error):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    original = video_out.ENCODERS[".mp4"]

    def failing(*arguments):
        stream, convert = original(*arguments)
        calls = iter(range(100))

        def convert_some(picture):
            if next(calls) == 2:
                raise error
            return convert(picture)

        return stream, convert_some

    monkeypatch.setitem(video_out.ENCODERS, ".mp4", failing)
    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        media.write_video(path, noise(4, 16, 16), 16)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("place", ["missing/a.mp4", "file/a.mp4", "folder.mp4", "a.xyz", "file/a", "x" * 300 + ".mp4"])
def test_places_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.mp4").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError) as caught:
        media.write_video(tmp_path / place, noise(2, 16, 16), 16)
    assert place in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_write_refuses_what_is_no_video(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        media.write_video(tmp_path / "a.mp4", np.zeros((2, 8, 8, 3)), 16)
    for wrong in ({"quality": 52}, {"fps": 0}, {"fps": float("nan")}):
        with pytest.raises(InputError):
            media.write_video(tmp_path / "a.mp4", noise(2, 8, 8), **{"fps": 16, **wrong})
    assert not list(tmp_path.iterdir())


def test_output_folder_keeps_what_is_there(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/old").write_text("old")
    assert files.output_folder(tmp_path / "a") == tmp_path / "a"
    assert files.output_folder(tmp_path / "b/c").is_dir()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["old"]
    with pytest.raises(OutputError, match="old"):
        files.output_folder(tmp_path / "a/old")


# --- bad files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.9, 0.5, 0.05, 0.003])
@pytest.mark.parametrize("name", KINDS)
def test_truncated_files(tmp_path, name, share):
    path = make(tmp_path, name)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=name):
        media.read_video(path)


def test_a_damaged_file(tmp_path):
    path = make(tmp_path, "clip.mp4")
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 2000
    data[start : start + 3000] = bytes(3000)
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"clip\.mp4"):
        media.read_video(path)


def playlist(path):
    other = make(path.parent, "clip.mp4")
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{other}\n#EXT-X-ENDLIST\n")


def audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


BAD = {
    "missing.mp4": lambda path: None,
    "empty.mp4": lambda path: path.write_bytes(b""),
    "words.mp4": lambda path: path.write_text("these are words\n" * 100),
    "words.txt": lambda path: path.write_text("these are words\n" * 100),
    "zeros.mp4": lambda path: path.write_bytes(bytes(5000)),
    "list.m3u8": playlist,
    "list.ffconcat": lambda path: path.write_text("ffconcat version 1.0\nfile clip.mp4\n"),
    "sound.mp4": audio,
    "empty-folder": lambda path: path.mkdir(),
    "void": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_video(tmp_path, name):
    BAD[name](tmp_path / name)
    with pytest.raises(InputError) as caught:
        media.read_video(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_image_in_a_folder_is_named(tmp_path):
    Image.fromarray(noise(1, 8, 8)[0]).save(tmp_path / "a.png")
    Image.fromarray(noise(1, 8, 9)[0]).save(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"b\.png' is 8x9"):
        media.read_video(tmp_path)
    data = (tmp_path / "a.png").read_bytes()
    for damaged in (data[: len(data) // 2], b"", data[:30] + bytes(40) + data[70:]):
        (tmp_path / "b.png").write_bytes(damaged)
        with pytest.raises(InputError, match=r"b\.png"):
            media.read_video(tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_limits_are_by_picture_and_by_clip(tmp_path, name, monkeypatch):
    path = make(tmp_path, name)
    monkeypatch.setattr(video_in, "MAX_BYTES", 48 * 64 * 3 * 19)
    with pytest.raises(InputError, match=f"{name}.*limit"):
        media.read_video(path)
    assert len(media.read_video(path, max_frames=19).frames) == 19
    monkeypatch.setattr(video_in, "MAX_BYTES", 48 * 64 * 3 * 20)
    assert len(media.read_video(path).frames) == 20
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 64 - 1)
    with pytest.raises(InputError, match=name):
        media.read_video(path)
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 64)
    media.read_video(path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_bombs_take_no_memory(tmp_path):
    Image.new("1", (16384, 16384)).save(tmp_path / "bomb.png")
    # A GIF of a few bytes that states 65535 x 65535 pixels.
    head = b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff"
    frame = b"\x2c\0\0\0\0\xff\xff\xff\xff\0\x02\x02\x44\x01\0"
    (tmp_path / "bomb.gif").write_bytes(head + frame * 3 + b";")
    with (tmp_path / "bomb.npy").open("wb") as file:
        header = {"descr": "|b1", "fortran_order": False, "shape": (100_000, 100_000, 100)}
        np.lib.format.write_array_header_1_0(file, header)
    program = """
import sys
from kvlock_fast import media
from kvlock_fast.errors import InputError
import av, PIL.Image
for name in sys.argv[1:]:
    try:
        media.read_mask(name)
    except InputError as error:
        assert name in str(error), error
    else:
        raise AssertionError(name)
# Not ru_maxrss, which starts from that of the process that started this one.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    names = [str(tmp_path / f"bomb.{suffix}") for suffix in ("png", "gif", "npy")]
    result = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 400_000, "kB at the peak"
