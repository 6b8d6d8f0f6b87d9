"""Sound from source to output: which container takes what, its length, its time, its pitch."""

import warnings
from fractions import Fraction

import av
import numpy as np
import pytest

from kvlock_fast import media
from kvlock_fast.cli import main
from kvlock_fast.errors import InputWarning
from tests.support.clipmaker import encode, encode_with_tone, noise

# Sources: file, codec of the pictures, codec of the sound.
SOURCES = {
    "aac.mp4": ("libx264", "aac"),
    "mp3.mkv": ("libx264", "libmp3lame"),
    "opus.webm": ("libvpx-vp9", "libopus"),
    "pcm.mov": ("libx264", "pcm_s16le"),
    "flac.mkv": ("ffv1", "flac"),
    "aac.ts": ("libx264", "aac"),
    "mp3.avi": ("mpeg4", "libmp3lame"),
}
# What becomes of the sound: copied where the container takes it.
BECOMES = {
    "mp4": {"aac": "aac", "mp3": "mp3", "opus": "opus", "pcm": "aac", "flac": "flac"},
    "m4v": {"aac": "aac", "mp3": "aac", "opus": "aac", "pcm": "aac", "flac": "aac"},
    "mov": {"aac": "aac", "mp3": "mp3", "opus": "aac", "pcm": "pcm_s16le", "flac": "aac"},
    "mkv": {"aac": "aac", "mp3": "mp3", "opus": "opus", "pcm": "pcm_s16le", "flac": "flac"},
    "webm": {"aac": "opus", "mp3": "opus", "opus": "opus", "pcm": "opus", "flac": "opus"},
}


def make(folder, name, **more):
    codec, audio = SOURCES[name]
    rate = 48000 if audio == "libopus" else 44100
    return encode_with_tone(folder / name, codec, audio, rate=rate, **more)


def sound(path):
    """Codec, samples of the first channel -1 to 1 with their rate, and the second at which they begin."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        frames = list(container.decode(stream))
        video = container.streams.video[0]
        begin = float(frames[0].pts * frames[0].time_base) - float((video.start_time or 0) * video.time_base)
        wide = [frame.to_ndarray() for frame in frames]
        packed = not frames[0].format.is_planar
        first = np.concatenate([part[0, ::2] if packed else part[0] for part in wide]).astype(np.float64)
        return stream.codec_context.codec.canonical_name, first / max(1.0, np.abs(first).max()), stream.rate, begin


def pitch(samples, rate):
    """The loudest frequency."""
    return np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * rate / len(samples)


@pytest.mark.parametrize("kind", BECOMES)
@pytest.mark.parametrize("name", SOURCES)
def test_sound_is_carried_over(tmp_path, name, kind):
    video = media.read_video(make(tmp_path, name))
    output = tmp_path / f"out.{kind}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        media.write_video(output, video.frames, video.fps, audio=video.audio)
    codec, samples, rate, begin = sound(output)
    assert codec == BECOMES[kind][name.partition(".")[0]]
    assert len(samples) / rate == pytest.approx(2, abs=0.1) and begin == pytest.approx(0, abs=0.06)
    assert pitch(samples, rate) == pytest.approx(1000, abs=2)
    back = media.read_video(output)
    assert back.frames.shape == video.frames.shape and float(back.fps) == pytest.approx(16)


@pytest.mark.parametrize("kind", ["mp4", "webm", "mkv"])
def test_sound_ends_with_the_pictures(tmp_path, kind):
    video = media.read_video(make(tmp_path, "aac.mp4"), max_frames=9)
    media.write_video(tmp_path / f"o.{kind}", video.frames, video.fps, audio=video.audio)
    _, samples, rate, _ = sound(tmp_path / f"o.{kind}")
    # Whole packets of 1024 samples, and up to two that the codec needs to begin.
    assert 9 / 16 - 0.05 <= len(samples) / rate <= 9 / 16 + 0.075
    with av.open(str(tmp_path / f"o.{kind}")) as container:
        assert container.duration / 1e6 == pytest.approx(9 / 16, abs=0.08)


@pytest.mark.parametrize("kind", ["mp4", "webm", "mkv"])
def test_sound_keeps_its_time(tmp_path, kind):
    """A tone that begins after half a second still does."""
    video = media.read_video(make(tmp_path, "aac.mp4", begin=0.5))
    media.write_video(tmp_path / f"o.{kind}", video.frames, video.fps, audio=video.audio)
    _, samples, rate, begin = sound(tmp_path / f"o.{kind}")
    loud = np.flatnonzero(np.abs(samples) > 0.3)[0] / rate
    assert begin + loud == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("kind", ["mkv", "webm", "mp4"])
def test_a_pause_stays_a_pause(tmp_path, kind):
    """Sound that is missing for a second in the file is missing in the output, copied or encoded anew."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        video, audio = container.add_stream("ffv1", rate=16), container.add_stream("pcm_s16le", rate=48000)
        video.height, video.width, video.pix_fmt, audio.codec_context.layout = 32, 48, "bgr0", "mono"
        for picture in noise(32, 32, 48):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="bgr0")))
        tone = (np.sin(np.arange(24000) / 8) * 20000).astype(np.int16)[None]
        for begin in (0, 72000):
            for i in range(0, 24000, 960):
                frame = av.AudioFrame.from_ndarray(tone[:, i : i + 960], format="s16", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 48000, begin + i, Fraction(1, 48000)
                container.mux(audio.encode(frame))
    video = media.read_video(tmp_path / "a.mkv")
    media.write_video(tmp_path / f"o.{kind}", video.frames, video.fps, audio=video.audio)
    with av.open(str(tmp_path / f"o.{kind}")) as container:
        loud = [float(f.pts * f.time_base) for f in container.decode(audio=0) if np.abs(f.to_ndarray()).mean() > 0.1]
    assert max(t for t in loud if t < 1) == pytest.approx(0.48, abs=0.06)
    assert min(t for t in loud if t > 1) == pytest.approx(1.5, abs=0.06)


def test_the_first_of_several_tracks(tmp_path):
    video = media.read_video(make(tmp_path, "mp3.mkv", tracks=2))
    media.write_video(tmp_path / "o.mp4", video.frames, video.fps, audio=video.audio)
    with av.open(str(tmp_path / "o.mp4")) as container:
        assert len(container.streams.audio) == 1


def test_what_holds_no_sound_is_said(tmp_path):
    video = media.read_video(make(tmp_path, "aac.mp4"))
    for name, reason in (("o.gif", "a GIF holds none"), ("frames", "a folder of images holds none")):
        with pytest.warns(InputWarning, match=f"{name}' is without the sound of '.*aac.mp4': {reason}"):
            media.write_video(tmp_path / name, video.frames, video.fps, audio=video.audio)
        assert len(media.read_video(tmp_path / name).frames) == 32
    assert media.read_video(tmp_path / "o.gif").audio is None and media.read_video(tmp_path / "frames").audio is None


def test_a_silent_source_has_none(tmp_path):
    encode(tmp_path / "a.mp4", "libx264", "yuv420p", list(noise(4, 16, 16)))
    assert media.read_video(tmp_path / "a.mp4").audio is None


def test_a_source_that_is_gone_or_broken_by_then_costs_the_sound_alone(tmp_path):
    video = media.read_video(make(tmp_path, "aac.mp4"))
    path = tmp_path / "aac.mp4"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.warns(InputWarning, match="without the sound"):
        media.write_video(tmp_path / "o.mp4", video.frames, video.fps, audio=video.audio)
    assert sound(tmp_path / "o.mp4") is None and len(media.read_video(tmp_path / "o.mp4").frames) == 32
    path.unlink()
    with pytest.warns(InputWarning, match="without the sound"):
        media.write_video(tmp_path / "p.mp4", video.frames, video.fps, audio=video.audio)


@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
def test_layouts_and_rates_become_what_the_codec_has(tmp_path, layout):
    source = encode_with_tone(
        tmp_path / "a.mkv", "ffv1", "pcm_s16le", rate=22050, fps=Fraction(30000, 1001), layout=layout
    )
    video = media.read_video(source)
    media.write_video(tmp_path / "o.webm", video.frames, video.fps, audio=video.audio)
    _, samples, rate, _ = sound(tmp_path / "o.webm")
    assert rate == 48000 and pitch(samples, rate) == pytest.approx(1000, abs=2)
    with av.open(str(tmp_path / "o.webm")) as container:
        assert container.streams.audio[0].layout.name == ("mono" if layout == "mono" else "stereo")


def test_an_edit_keeps_the_sound_unless_told_otherwise(tmp_path, capsys):
    make(tmp_path, "aac.mp4")
    arguments = ["edit", "--source", str(tmp_path / "aac.mp4"), "--mask", "box:8,8,16,16", "--source-prompt", "a"]
    arguments += ["--prompt", "b", "--steps", "1", "--max-frames", "9", "--size", "16x24", "-q"]
    for name, flags, kept in (("o.mp4", [], True), ("p.mp4", ["--no-audio"], False), ("q.gif", [], False)):
        assert main([*arguments, *flags, "--output", str(tmp_path / name)]) == 0
        found = sound(tmp_path / name)
        assert (found is not None) == kept
        said = "q.gif' is without the sound of" in capsys.readouterr().err
        assert said == (name == "q.gif")
        if kept:
            assert len(found[1]) / found[2] == pytest.approx(9 / 16, abs=0.08)
