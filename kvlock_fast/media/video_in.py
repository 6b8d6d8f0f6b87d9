"""Video files in, by PyAV."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from kvlock_fast.errors import InputError, one_line
from kvlock_fast.media import images
from kvlock_fast.media.audio import Audio

MAX_BYTES = 1 << 30
"""The most memory one clip may take, in bytes of uint8 RGB."""

MAX_FRAMES = 20_000
"""The most frames one clip may have: far beyond any model, and hours of decoding are refused at once."""

FOLDER_FPS = Fraction(16)
"""A folder of images states no rate; this is the rate of the Wan models."""

# Demuxers that hold pictures in one file. Not here: playlists, which name other files, and ANSI art from .txt.
_FORMATS = "mov,matroska,avi,gif,apng,mpeg,mpegts,ogg,flv,asf,nut,ivf,yuv4mpegpipe"


@dataclass(frozen=True)
class Video:
    """A clip in memory: `frames` uint8 RGB `[F, H, W, 3]`, its rate in frames per second, and its sound, if any."""

    frames: np.ndarray
    fps: Fraction
    audio: Audio | None = None


Convert = Callable[[np.ndarray], np.ndarray]
"""Conversion of each picture, uint8 RGB `[H, W, 3]`, as soon as it is read."""


def read_video(path: str | os.PathLike, *, max_frames: int | None = None) -> Video:
    """Read a video file (mp4, mov, mkv, webm, avi, gif, ...), a folder of images, or an image: a video of one frame.

    Frames come as shown: rotation applied, colours by the file's own matrix and range (untagged: BT.601 up to 576
    rows, BT.709 above), transparency over black. A variable rate keeps its frames and gives the average rate. Only the
    first `max_frames` are read. The limits, images.MAX_PIXELS, MAX_BYTES and MAX_FRAMES, are checked before memory is
    taken.

    Raises:
        InputError: missing, empty, truncated, undecodable, no video, or over a limit; it names the file.
    """
    path = Path(path)
    if path.is_dir():
        return Video(read_images(path, max_frames), FOLDER_FPS)
    if path.suffix.lower() in images.SUFFIXES and images.is_still(path):
        return Video(images.read_image(path)[None], FOLDER_FPS)
    return decode_video(path, max_frames)


def read_images(folder: Path, max_frames: int | None, convert: Convert = np.asarray) -> np.ndarray:
    """The images of a folder, all of one size, each converted and stacked. Raises InputError naming the offender."""
    paths = images.images_in(folder)[:max_frames]
    height, width = images.image_size(paths[0])
    _check_memory(folder, len(paths), height, width)

    def pictures() -> Iterator[np.ndarray]:
        for path in paths:
            image = images.read_image(path)
            if image.shape[:2] != (height, width):
                size = f"{height}x{width}"
                raise InputError(f"the image '{path}' is {_size(image)}, but the first of its folder is {size}")
            yield convert(image)

    return _collect(pictures(), folder, len(paths), None)


def decode_video(path: Path, max_frames: int | None, convert: Convert = np.asarray) -> Video:
    """A video file, each frame converted. Limits and errors as `read_video`."""
    import av
    from av.error import ArgumentError, FFmpegError

    if max_frames is not None and max_frames < 1:
        raise InputError(f"the number of frames to read must be at least 1, not {max_frames}")
    if not path.is_file():
        raise InputError(f"'{path}' is not a file" if path.exists() else f"the video '{path}' does not exist")
    if path.stat().st_size == 0:
        raise InputError(f"the video '{path}' is empty")
    # "file:" keeps a name with a colon from being taken for a protocol; its max_pixels stops a bomb while probing.
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file", "max_pixels": str(images.MAX_PIXELS)}
    try:
        # Tags are text of any encoding; none of them is used.
        with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise InputError(f"'{path}' has no video stream")
            stream = container.streams.video[0]
            most = _frames_allowed(container, path, max_frames)
            frames = _collect(map(convert, _pictures(container, stream, path)), path, most, max_frames)
            return Video(frames, _rate(stream), Audio.of(container, stream, path))
    except ArgumentError as error:
        # What the white list answers.
        raise InputError(f"'{path}' is not a video file of a kind that can be read") from error
    except FFmpegError as error:
        raise InputError(f"the video '{path}' cannot be decoded: {error.strerror or error}") from error
    except (InputError, MemoryError):
        raise
    except Exception as error:  # whatever a stranger's bytes cause in a decoder
        raise InputError(f"the video '{path}' cannot be decoded: {one_line(error)}") from error


def _rate(stream) -> Fraction:
    # A GIF's delays are whole hundredths that alternate (0.06, 0.06, 0.07), so its average has to be taken over all.
    if stream.codec_context.name == "gif" and stream.frames and stream.duration:
        return Fraction(stream.frames) / (stream.duration * stream.time_base)
    return Fraction(stream.average_rate or stream.guessed_rate or FOLDER_FPS)


def _frames_allowed(container, path: Path, max_frames: int | None) -> int:
    """How many frames fit into MAX_BYTES; refuses by what the container states, before anything is decoded."""
    stream = container.streams.video[0]
    height, width = stream.codec_context.height, stream.codec_context.width
    if height * width == 0:
        raise InputError(f"the video '{path}' cannot be decoded: it states no picture size")
    if height * width > images.MAX_PIXELS:
        raise InputError(f"the video '{path}' is {height}x{width}, more than the limit of {images.MAX_PIXELS} pixels")
    stated = stream.frames or int((container.duration or 0) / 1e6 * _rate(stream))
    return _check_memory(path, min(stated, max_frames or stated), height, width)


def _check_memory(path: Path, count: int, height: int, width: int) -> int:
    """The most frames of this size that MAX_BYTES holds. Raises InputError if `count` is more."""
    if count > MAX_FRAMES:
        raise InputError(f"'{path}' has {count} frames, more than the limit of {MAX_FRAMES}")
    most = min(MAX_BYTES // (height * width * 3), MAX_FRAMES)
    if count > most:
        raise InputError(
            f"'{path}' has {count} frames of {height}x{width}, but only {most} fit into the limit of {MAX_BYTES} bytes"
        )
    return most


def _collect(pictures: Iterator[np.ndarray], path: Path, most: int, max_frames: int | None) -> np.ndarray:
    """Stack pictures of one size and dtype, at most `max_frames`. More than `most` of them is an InputError."""
    first = next(pictures)
    # Room for the most there may be: pages that are never touched cost nothing, and a list would need them twice.
    frames = np.empty((min(most, max_frames or most), *first.shape), dtype=first.dtype)
    count = 0
    for picture in itertools.chain([first], pictures):
        if picture.shape != first.shape:
            raise InputError(
                f"the video '{path}' changes its size at frame {count}: {_size(first)} to {_size(picture)}"
            )
        if count == most:
            raise InputError(f"the video '{path}' has more than {most} frames of {_size(first)}, which is the limit")
        frames[count] = picture
        count += 1
        if count == max_frames:
            break
    frames.resize((count, *first.shape), refcheck=False)
    return frames


def _pictures(container, stream, path: Path) -> Iterator[np.ndarray]:
    """Decode to uint8 RGB `[H, W, 3]`, as shown. Raises InputError where the file turns out not to be whole."""
    from av.video.reformatter import VideoReformatter

    reformatter, packets, count, end = VideoReformatter(), 0, 0, 0.0
    # Threads that take a frame each would swallow what is wrong with the last ones.
    stream.thread_type = "SLICE"
    # All streams, not the video's alone: the stated duration is that of the longest.
    for packet in container.demux():
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.is_corrupt:
            raise InputError(f"the video '{path}' is truncated: its data ends after frame {count}")
        if packet.stream.index != stream.index:
            continue
        packets += packet.size > 0 or packet.pts is not None
        for frame in packet.decode():
            if frame.is_corrupt:
                raise InputError(f"the video '{path}' is damaged at frame {count}")
            count += 1
            yield _shown(frame, reformatter)
    if count == 0:
        raise InputError(f"the video '{path}' holds no frame that can be decoded")
    if _ends_early(container, stream, path, packets, end):
        raise InputError(f"the video '{path}' is truncated: its data ends after frame {count}")


def _ends_early(container, stream, path: Path, packets: int, end: float) -> bool:
    """Whether a file that was read without complaint still holds less than it states."""
    if container.format.name == "gif":
        with path.open("rb") as file:
            file.seek(-min(64, path.stat().st_size), os.SEEK_END)
            return not file.read().rstrip(b"\0").endswith(b";")
    if stream.frames:
        # An AVI counts frames that were skipped when it was made, for which it holds nothing.
        skipped = 1 + stream.frames // 100 if container.format.name == "avi" else 0
        return packets < stream.frames - skipped
    if not container.duration:
        return False
    missing = container.duration / 1e6 - (end - (container.start_time or 0) / 1e6)
    # Containers round, and state durations of streams that have no packets near the end.
    return missing > max(1.5 / _rate(stream), 0.01 * container.duration / 1e6)


def _shown(frame, reformatter) -> np.ndarray:
    """A decoded frame as uint8 RGB `[H, W, 3]`: its matrix and range, transparency over black, rotation."""
    from av.video.reformatter import ColorRange

    transparent = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    full_range = frame.format.is_rgb or frame.format.name.startswith("yuvj") or frame.color_range == ColorRange.JPEG
    matrix = _matrix(frame)
    converted = reformatter.reformat(
        frame,
        format="rgba" if transparent else "rgb24",
        src_colorspace=matrix,
        dst_colorspace=matrix,
        src_color_range=ColorRange.JPEG if full_range else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=exact_conversion(),
    ).to_ndarray()
    picture = images.over_black(converted) if transparent else converted
    return np.rot90(picture, round(frame.rotation / 90)) if frame.rotation else picture


def _matrix(frame):
    """The matrix of a frame's colours; where the file states none, by the convention that players follow."""
    from av.video.reformatter import Colorspace

    stated = {
        1: Colorspace.ITU709,
        4: Colorspace.FCC,
        5: Colorspace.ITU601,
        6: Colorspace.ITU601,
        7: Colorspace.SMPTE240M,
        9: Colorspace.BT2020,
        10: Colorspace.BT2020,
    }
    untagged = Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601
    return stated.get(frame.colorspace, untagged)


def exact_conversion():
    """Flags for a conversion that rounds correctly: without them flat colours shift by up to 4 levels."""
    from av.video.reformatter import Interpolation

    return (
        Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
    )


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[0]}x{picture.shape[1]}"
