"""Each kind of output brings pictures, colours and rate back; odd inputs; limits and kills in real processes."""

import io
import os
import signal
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

from kvlock_fast import media
from kvlock_fast.errors import InputError, InputWarning, OutputError
from tests.media.test_video import colour_bars, inside_bars
from tests.support.clipmaker import encode, noise

ROOT = Path(__file__).resolve().parents[2]
LOSSY, LOSSLESS = ("o.mp4", "o.m4v", "o.mov", "o.webm"), ("o.mkv", "o.gif", "frames")

# --- each kind of output -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 192), (63, 191)], ids=["even", "odd"])
@pytest.mark.parametrize("name", [*LOSSY, *LOSSLESS])
def test_colour_bars_come_back_from_each_kind(tmp_path, name, height, width):
    bars = colour_bars(height, width)
    media.write_video(tmp_path / name, bars, 12)
    back = media.read_video(tmp_path / name)
    assert back.frames.shape == bars.shape and back.fps == (16 if name == "frames" else 12)
    if name in LOSSLESS:  # the bars have fewer colours than a GIF
        assert np.array_equal(back.frames, bars)
    else:
        error = (back.frames.astype(int) - bars)[:, inside_bars(height, width)]
        assert np.abs(error).max() <= 12 and np.abs(error.mean(axis=(0, 1))).max() < 0.5


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_images_are_lossless_at_any_size(tmp_path_factory, frames, height, width, seed):
    pictures = noise(frames, height, width, seed)
    folder = tmp_path_factory.mktemp("images") / "new"
    media.write_video(folder, pictures, 16)
    assert np.array_equal(media.read_video(folder).frames, pictures)


@pytest.mark.parametrize("name", ["o.webm", "o.gif"])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (17, 16), (37, 53)], ids=str)
def test_any_size_is_kept(tmp_path, name, size):
    flat = np.full((3, *size, 3), (40, 120, 200), dtype=np.uint8)
    media.write_video(tmp_path / name, flat, 16)
    back = media.read_video(tmp_path / name).frames
    assert back.shape == flat.shape and np.abs(back.astype(int) - flat).max() <= 3


def test_a_gif_keeps_still_frames_its_length_and_most_of_the_colours(tmp_path):
    video = np.concatenate([np.full((5, 24, 32, 3), 90, np.uint8), noise(12, 24, 32)])
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    smooth = np.stack([ramp, ramp.T // 2, 255 - ramp], axis=-1)[None].repeat(3, 0)
    media.write_video(tmp_path / "o.gif", video, Fraction(30000, 1001))
    back = media.read_video(tmp_path / "o.gif")
    assert back.frames.shape == video.shape and (back.frames[:5] == 90).all()
    assert float(back.fps) == pytest.approx(29.97, rel=0.02)
    media.write_video(tmp_path / "p.gif", smooth, 10)
    error = media.read_video(tmp_path / "p.gif").frames.astype(int) - smooth
    assert np.abs(error).mean() < 4 and np.abs(error.mean((0, 1, 2))).max() < 1
    with pytest.warns(InputWarning, match=r"q\.gif' plays at 50 frames per second, the most of a GIF, not at 60"):
        media.write_video(tmp_path / "q.gif", video, 60)
    assert media.read_video(tmp_path / "q.gif").fps == 50


def test_a_webm_says_its_colours(tmp_path):
    media.write_video(tmp_path / "o.webm", noise(2, 16, 16), 16)
    with av.open(str(tmp_path / "o.webm")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range, context.pix_fmt) == (1, 1, "yuv420p")


# --- folders of images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"mine", "a picture", "ours, opened and saved"], ids=str)
def test_a_users_own_frame_is_never_replaced(tmp_path, content):
    folder = tmp_path / "frames"
    media.write_video(folder, noise(3, 8, 8), 16)
    frame = folder / "frame-00001.png"
    if isinstance(content, bytes):
        frame.write_bytes(content)
    else:
        again = Image.open(frame)
        again.load()
        (again if content.startswith("ours") else again.resize((8, 8))).save(frame)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for write in (lambda: media.check_video_output(folder), lambda: media.write_video(folder, noise(2, 8, 8), 16)):
        with pytest.raises(OutputError, match=r"its 'frame-00001\.png' was not made by this program"):
            write()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_keeps_what_else_is_in_it(tmp_path):
    folder = tmp_path / "frames"
    media.write_video(folder, noise(7, 8, 8), 16)
    for name in ("notes.txt", "frame-a.png", "frame-000001.png"):
        (folder / name).write_text("mine")
    shorter = noise(3, 8, 8, seed=1)
    media.write_video(folder, shorter, 16)
    mine = {"notes.txt", "frame-a.png", "frame-000001.png"}
    assert {p.name for p in folder.iterdir()} == {*(f"frame-{i:05d}.png" for i in range(3)), *mine}
    for name in mine:
        assert (folder / name).read_text() == "mine"
        (folder / name).unlink()
    assert np.array_equal(media.read_video(folder).frames, shorter)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"mine")
    for place in ("file", "missing/frames", "x" * 300):
        for call in (media.check_video_output, lambda path: media.write_video(path, noise(2, 8, 8), 16)):
            with pytest.raises(OutputError, match=place):
                call(tmp_path / place)
    media.write_video(tmp_path / "frames", noise(2, 8, 8), 16)
    before = {p.name: p.read_bytes() for p in (tmp_path / "frames").iterdir()}
    calls = iter(range(9))
    save = Image.Image.save

    def failing(self, *arguments, **more):
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        return save(self, *arguments, **more)

    monkeypatch.setattr(Image.Image, "save", failing)
    for folder in ("frames", "new"):
        calls = iter(range(9))
        with pytest.raises(OutputError, match=f"{folder}': No space left"):
            media.write_video(tmp_path / folder, noise(2, 8, 8, seed=1), 16)
    assert {p.name: p.read_bytes() for p in (tmp_path / "frames").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "frames"]


# --- inputs of other kinds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mkv", "mp4"])
def test_a_variable_rate_keeps_its_frames_and_its_length(tmp_path, kind):
    pictures, shown = noise(6, 32, 32), [0, 1, 2, 10, 30, 31]
    with av.open(str(tmp_path / f"a.{kind}"), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "0"})
        stream.height = stream.width = 32
        stream.pix_fmt, stream.codec_context.time_base = "yuv444p", Fraction(1, 30)
        for picture, pts in zip(pictures, shown, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = media.read_video(tmp_path / f"a.{kind}")
    assert np.abs(video.frames.astype(int) - pictures).max() <= 3
    # Six frames in about 32 thirtieths of a second; how long the last one lasts, the file need not say.
    assert 5 <= float(video.fps) <= 30


@pytest.mark.parametrize(("codec", "pix_fmt"), [
    ("libx264", "yuv420p10le"), ("libx264", "yuv422p10le"), ("libsvtav1", "yuv420p10le"), ("ffv1", "gbrp10le"),
    ("ffv1", "yuv444p16le"), ("ffv1", "gray"), ("ffv1", "gray10le"), ("ffv1", "bgra"), ("mjpeg", "yuvj420p"),
])  # fmt: skip
def test_depths_and_layouts_of_pixels(tmp_path, codec, pix_fmt):
    """A grey ramp is grey in all of them, and keeps its levels."""
    ramp = np.linspace(16, 235, 64).astype(np.uint8)
    picture = np.broadcast_to(ramp[None, :, None], (32, 64, 3)).copy()
    encode(tmp_path / "a.mkv", codec, pix_fmt, [picture] * 3)
    frames = media.read_video(tmp_path / "a.mkv").frames
    assert frames.shape == (3, 32, 64, 3) and np.abs(frames.astype(int) - picture).max() <= 8


@pytest.mark.parametrize("last", [1, 2, 9])
@pytest.mark.parametrize(("codec", "pix_fmt"), [("libx264", "yuv420p"), ("png", "rgb24")])
def test_damage_in_the_last_frames_is_seen(tmp_path, codec, pix_fmt, last):
    path = encode(tmp_path / "a.mov", codec, pix_fmt, list(noise(10, 48, 64)), max_b_frames=0)
    with av.open(str(path)) as container:
        where = [packet.pos for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    start = sorted(where)[-last] + 40
    data[start : start + 600] = bytes(600)
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"a\.mov"):
        media.read_video(path)


# --- limits --------------------------------------------------------------------------------------------------------

MEASURED = """
import sys
from kvlock_fast.cli import main
status = main(sys.argv[1:])
# Not ru_maxrss, which starts from that of the process that started this one.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("PEAK", status, peak)
"""


def refused(folder, *arguments):
    """The last line of stderr and the peak in kB of an `edit` in a process of its own, which must exit with 2."""
    command = [sys.executable, "-c", MEASURED, "edit", "--source-prompt", "a", "--prompt", "b", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "--output", "o.mp4"], cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )
    _, status, peak = result.stdout.split()[-3:]
    assert status == "2" and "Traceback" not in result.stderr and not (folder / "o.mp4").exists(), result.stderr
    return result.stderr.splitlines()[-1], int(peak)


def long_video(path, hours=10, rate=1, size=16, **options):
    """Hours of the same small picture: a few kB a minute."""
    picture = np.full((size, size, 3), 90, np.uint8)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "g": "9999"})
        stream.height = stream.width = size
        stream.pix_fmt = "yuv420p"
        still = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        for i in range(hours * 3600 * rate):
            still.pts, still.time_base = i, Fraction(1, rate)
            container.mux(stream.encode(still))
        container.mux(stream.encode())
    return path


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")


@needs_proc
def test_ten_hours_are_refused_at_once_but_their_beginning_is_read(tmp_path):
    long_video(tmp_path / "long.mp4")
    error, peak = refused(tmp_path, "--source", "long.mp4", "--mask", "box:0,0,8,8")
    assert error == f"error: 'long.mp4' has 36000 frames, more than the limit of {media.MAX_FRAMES}" and peak < 1e6
    assert media.read_video(tmp_path / "long.mp4", max_frames=5).frames.shape == (5, 16, 16, 3)
    media.write_video(tmp_path / "s.mkv", noise(5, 16, 16), 16)
    error, peak = refused(tmp_path, "--source", "s.mkv", "--mask", "long.mp4")
    assert "'long.mp4' has 36000 frames" in error and peak < 1e6


def hidden_bomb(path):
    """A container that says 16x16 around a picture that says 16384x16384."""
    large = io.BytesIO()
    Image.new("1", (16384, 16384)).save(large, "PNG")
    encode(path.with_name("small.mov"), "png", "rgb24", list(noise(2, 16, 16)))
    with av.open(str(path.with_name("small.mov"))) as small, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(small.streams.video[0])
        for packet in small.demux(video=0):
            if packet.size:
                packet = packet if packet.pts == 0 else _with_bytes(packet, large.getvalue())
                packet.stream = stream
                container.mux(packet)


def _with_bytes(packet, data):
    other = av.Packet(data)
    other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
    return other


@needs_proc
def test_a_video_of_16k_is_refused_before_memory_is_taken(tmp_path):
    hidden_bomb(tmp_path / "bomb.mov")
    error, peak = refused(tmp_path, "--source", "bomb.mov", "--mask", "box:0,0,8,8")
    assert "bomb.mov" in error and peak < 1e6


@needs_proc
def test_an_image_of_16k_is_refused_before_memory_is_taken(tmp_path):
    media.write_video(tmp_path / "s.mkv", noise(5, 16, 16), 16)
    Image.new("1", (16384, 16384)).save(tmp_path / "bomb.png")
    error, peak = refused(tmp_path, "--source", "s.mkv", "--mask", "bomb.png")
    assert "bomb.png" in error and peak < 1e6


@needs_proc
@pytest.mark.large
def test_a_stream_that_hides_its_length_stops_at_the_limit(tmp_path):
    """No duration, no count of frames: found out by decoding, within the memory that one clip may take."""
    long_video(tmp_path / "live.mkv", hours=1, rate=2, size=256, live="1")
    error, peak = refused(tmp_path, "--source", "live.mkv", "--mask", "box:0,0,8,8")
    assert "live.mkv' has more than 5461 frames of 256x256" in error and peak < 2e6


# --- outputs are whole or absent -----------------------------------------------------------------------------------

WRITER = """
import sys
import numpy as np
from kvlock_fast.media import write_video
frames = np.zeros((400, 64, 64, 3), np.uint8)
class Slow:
    ndim, shape, dtype, size = 4, frames.shape, frames.dtype, frames.size
    def __len__(self):
        return len(frames)
    def __iter__(self):
        for i, frame in enumerate(frames):
            if i == 200:
                print("half", flush=True)
                sys.stdin.read()
            yield frame
write_video(sys.argv[1], Slow(), 16)
"""


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("name", ["o.mp4", "o.webm", "o.mkv", "o.gif", "frames"])
def test_a_killed_writer_leaves_no_half_output(tmp_path, name, old):
    target = tmp_path / name
    before = noise(2, 16, 16)
    if old:
        media.write_video(target, before, 16)
        before = media.read_video(target).frames
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout.readline() == b"half\n"
    finally:
        writer.kill()
        writer.wait()
        writer.stdin.close()
        writer.stdout.close()
    assert writer.returncode == -signal.SIGKILL
    if old:
        assert np.array_equal(media.read_video(target).frames, before)
    else:
        assert not target.exists()
