"""Small files of many kinds, made on the spot by PyAV itself and not by the code under test."""

from fractions import Fraction

import av
import numpy as np


def noise(frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def encode(path, codec, pix_fmt, pictures, *, source_format="rgb24", fps=16, **context):
    """Write arrays `[H, W, C]` of `source_format`; `context` sets attributes of the codec context."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format=source_format)))
        container.mux(stream.encode())
    return path


def encode_with_tone(
    path, codec, audio, *, seconds=2.0, fps=16, rate=44100, frequency=1000.0, begin=0.0, tracks=1, layout="stereo"
):
    """Grey pictures that change and a sine beside them, in every channel, which begins at `begin` seconds."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=Fraction(fps))
        video.height, video.width, video.pix_fmt = 32, 48, "yuv420p"
        streams = [container.add_stream(audio, rate=rate) for _ in range(tracks)]
        for stream in streams:
            stream.codec_context.layout = layout
        for i in range(round(seconds * fps)):
            picture = np.full((32, 48, 3), 40 + 4 * i % 200, dtype=np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        for stream in streams:
            for packet in _tone(stream, seconds - begin, rate, frequency, begin):
                container.mux(packet)
    return path


def _tone(stream, seconds, rate, frequency, begin):
    wave = np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)
    context = stream.codec_context
    samples = np.repeat((wave * 20000).astype(np.int16), context.layout.nb_channels)[None]
    frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=context.layout.name)
    frame.sample_rate, frame.pts, frame.time_base = rate, round(begin * rate), Fraction(1, rate)
    resampler = av.AudioResampler(context.format, context.layout, rate, frame_size=context.frame_size or 1024)
    for part in [*resampler.resample(frame), *resampler.resample(None)]:
        yield from stream.encode(part)
    yield from stream.encode(None)


def encode_planes(path, pix_fmt, values, size, *, colorspace, color_range, codec="ffv1"):
    """One frame whose planes are constant: the exact numbers of a file, by no conversion at all."""
    height, width = size
    frame = av.VideoFrame(width, height, pix_fmt)
    for plane, value in zip(frame.planes, values, strict=True):
        wide = 2 if frame.format.components[0].bits > 8 else 1
        data = np.full(plane.buffer_size // wide, value, dtype=np.uint16 if wide == 2 else np.uint8)
        plane.update(data.tobytes())
    frame.colorspace, frame.color_range = colorspace, color_range
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, color_range
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn(path, degrees):
    """Patch the display matrix in an mp4's track header: shown turned clockwise by 90, 180 or 270 degrees."""
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    data = bytearray(path.read_bytes())
    # Version 0 of tkhd: its 9 matrix entries (16.16 fixed point) lie 40 bytes into the payload.
    start = data.index(b"tkhd") + 4 + 40
    entries = np.frombuffer(bytes(data[start : start + 36]), dtype=">i4").copy()
    entries[[0, 1, 3, 4]] = np.array(matrix) * 65536
    data[start : start + 36] = entries.tobytes()
    path.write_bytes(bytes(data))
    return path
