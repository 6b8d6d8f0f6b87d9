"""The source's sound in the output: copied where the container takes it, encoded anew elsewhere, or left out aloud."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from kvlock_fast.errors import warn

# What each container takes as it is (None: anything), and what other sound is turned into.
_KINDS = {
    ".mp4": (("aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"), "aac"),
    ".m4v": (("aac", "alac", "ac3"), "aac"),
    ".mov": (("aac", "mp3", "ac3", "eac3", "alac", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s32le"), "aac"),
    ".mkv": (None, "flac"),
    ".webm": (("opus", "vorbis"), "libopus"),
}

LEAST_GAP = 0.1
"""Seconds of missing sound that are kept as a pause; what is shorter is rounding."""

Mux = Callable[[float], None]


@dataclass(frozen=True)
class Audio:
    """Sound in a video file: its path, and the second of its clock at which the first picture is shown."""

    path: Path
    start: float

    @classmethod
    def of(cls, container: Any, stream: Any, path: Path) -> Audio | None:
        """The sound beside a video stream of an opened file; None where there is none."""
        if not container.streams.audio:
            return None
        return cls(path, float((stream.start_time or 0) * stream.time_base))


@contextmanager
def carried(container: Any, suffix: str, audio: Audio | None, seconds: float) -> Iterator[Mux]:
    """Add `audio`, cut to `seconds`, to an opened output; give a function that writes it up to a time.

    To be entered before the first packet is written. Warns (InputWarning) where the sound cannot be decoded or ends in
    damage: it then ends there, and the pictures are not harmed.
    """
    if audio is None:
        yield lambda until: None
        return
    import av

    copied, encoder = _KINDS[suffix]
    with av.open(f"file:{audio.path}", options={"protocol_whitelist": "file"}, metadata_errors="replace") as source:
        stream = source.streams.best("audio") or source.streams.audio[0]
        if copied is None or stream.codec_context.codec.canonical_name in copied:
            packets = _copied(source, stream, container.add_stream_from_template(stream), audio.start, seconds)
        else:
            packets = _encoded(source, stream, _encoder(container, encoder, stream), audio.start, seconds)
        waiting = _guarded(packets, audio.path)
        ahead: list[Any] = []

        def mux(until: float) -> None:
            while True:
                packet = ahead.pop() if ahead else next(waiting, None)
                if packet is None:
                    return
                if packet.pts is not None and packet.pts * packet.time_base > until:
                    ahead.append(packet)
                    return
                container.mux(packet)

        yield mux


def leave_out(audio: Audio | None, output: Path, reason: str) -> None:
    """Say that the output has no sound although the source has."""
    if audio is not None:
        warn(f"'{output}' is without the sound of '{audio.path}': {reason}")


def _guarded(packets: Iterator[Any], path: Path) -> Iterator[Any]:
    """The packets until one cannot be had."""
    from av.error import FFmpegError

    try:
        yield from packets
    except FFmpegError as error:
        warn(f"the sound of '{path}' is damaged and ends early: {error.strerror or error}")


def _copied(source: Any, stream: Any, target: Any, start: float, seconds: float) -> Iterator[Any]:
    for packet in source.demux(stream):
        if packet.pts is None:
            continue
        time = float(packet.pts * packet.time_base) - start
        if time >= seconds:
            return
        if time + float((packet.duration or 0) * packet.time_base) <= 0:
            continue
        shift = round(start / packet.time_base)
        packet.pts -= shift
        packet.dts = None if packet.dts is None else packet.dts - shift
        packet.stream = target
        yield packet


def _encoded(source: Any, stream: Any, target: Any, start: float, seconds: float) -> Iterator[Any]:
    from av import AudioResampler

    context = target.codec_context
    resampler = AudioResampler(context.format, context.layout, context.sample_rate, frame_size=context.frame_size)
    clock: _Clock | None = None
    for frame in source.decode(stream):
        if frame.pts is None:
            continue
        time = float(frame.pts * frame.time_base) - start
        if time >= seconds:
            break
        if time + frame.samples / frame.sample_rate <= 0:
            continue
        clock = clock or _Clock(time, context.sample_rate)
        clock.heard(time, frame.samples / frame.sample_rate)
        frame.pts = None
        for resampled in resampler.resample(frame):
            yield from target.encode(clock.stamped(resampled))
    if clock is not None:
        for resampled in resampler.resample(None):
            yield from target.encode(clock.stamped(resampled))
        yield from target.encode(None)


class _Clock:
    """Times of encoded samples: counted, because containers round theirs, but following where the source has a gap."""

    def __init__(self, begin: float, rate: int):
        self.rate, self.expected, self.next = rate, begin, round(begin * rate)

    def heard(self, time: float, duration: float) -> None:
        """A piece of the source at `time`, in seconds."""
        gap = time - self.expected
        if gap > LEAST_GAP:
            self.next += round(gap * self.rate)
            self.expected = time
        self.expected += duration

    def stamped(self, frame: Any) -> Any:
        """The next piece for the encoder, with its time."""
        frame.pts, frame.time_base = self.next, Fraction(1, self.rate)
        self.next += frame.samples
        return frame


def _encoder(container: Any, codec: str, stream: Any) -> Any:
    """A stream of the output in mono or stereo, at the source's rate where the codec has it."""
    import av

    known = av.Codec(codec, "w")
    rate = stream.codec_context.sample_rate
    if known.audio_rates and rate not in known.audio_rates:
        rate = max(known.audio_rates)
    target = container.add_stream(codec, rate=rate)
    target.codec_context.layout = "mono" if stream.codec_context.layout.nb_channels == 1 else "stereo"
    target.codec_context.format = next(iter(known.audio_formats or ()))
    return target
