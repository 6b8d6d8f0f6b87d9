"""Video files out, by PyAV, and images and folders of them, by Pillow."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from kvlock_fast.errors import InputError, OutputError, OutputLost, warn
from kvlock_fast.files import (
    LOST,
    atomic_path,
    check_replaced,
    check_writable,
    check_writable_folder,
    new_folder_content,
    refuse_special,
)
from kvlock_fast.media.audio import Audio, carried, leave_out
from kvlock_fast.media.video_in import exact_conversion

Encoder = Callable[[Any, tuple[int, int], Fraction, int], tuple[Any, Callable[[np.ndarray], Any]]]
"""One for each kind of video file, which makes frames of RGB pictures.

It takes (container, (height, width), frames per second, quality as x264's constant rate factor), and returns the stream
and a function from a uint8 RGB [H, W, 3] to a frame. Colours are BT.709 in limited range, tagged so, or RGB.
"""


def h264(container: Any, size: tuple[int, int], fps: Fraction, quality: int):
    """H.264: 4:2:0, or 4:4:4 where a side is odd, so that nothing is cropped."""
    stream = container.add_stream("libx264", rate=fps, options={"crf": str(quality), "preset": "medium"})
    return stream, _in_bt709(stream, size)


def vp9(container: Any, size: tuple[int, int], fps: Fraction, quality: int):
    """VP9: 4:2:0, or 4:4:4 where a side is odd."""
    # Its rate factor counts to 63 where x264's counts to 51; a bit rate of 0 makes it the only bound.
    options = {"crf": str(round(quality * 63 / 51)), "b": "0", "deadline": "good", "cpu-used": "3", "row-mt": "1"}
    stream = container.add_stream("libvpx-vp9", rate=fps, options=options)
    stream.codec_context.bit_rate = 0
    return stream, _in_bt709(stream, size)


def ffv1(container: Any, size: tuple[int, int], fps: Fraction, quality: int):
    """FFV1 in RGB: lossless."""
    # By default it cuts the picture into at least four, which the smallest ones do not allow.
    stream = container.add_stream("ffv1", rate=fps, options={"slices": "1"} if min(size) < 16 else {})
    stream.height, stream.width = size
    stream.pix_fmt = "bgr0"
    return stream, lambda picture: _frame(picture).reformat(format="bgr0")


def gif(container: Any, size: tuple[int, int], fps: Fraction, quality: int):
    """GIF: each frame with the 256 colours that serve it best, all of its own where it has no more."""
    stream = container.add_stream("gif", rate=fps)
    stream.height, stream.width = size
    stream.pix_fmt = "pal8"
    return stream, _with_palette


def _frame(picture: np.ndarray) -> Any:
    import av

    return av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")


def _in_bt709(stream: Any, size: tuple[int, int]) -> Callable[[np.ndarray], Any]:
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter

    stream.height, stream.width = size
    stream.pix_fmt = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"
    context = stream.codec_context
    context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    reformatter = VideoReformatter()

    def convert(picture: np.ndarray) -> Any:
        return reformatter.reformat(
            _frame(picture),
            format=stream.pix_fmt,
            src_colorspace=Colorspace.ITU709,
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=exact_conversion(),
        )

    return convert


def _with_palette(picture: np.ndarray) -> Any:
    import av
    from PIL import Image

    colours = picture.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    own, index = np.unique(colours, return_inverse=True)
    if len(own) <= 256:
        table = np.stack([own >> 16, own >> 8 & 255, own & 255], axis=1)
    else:
        quantised = Image.fromarray(picture).quantize(256)
        index, table = np.asarray(quantised), np.array(quantised.getpalette()).reshape(-1, 3)
    # Packed as alpha, red, green, blue in the machine's 32-bit words; little-endian bytes are B, G, R, A.
    palette = np.zeros((256, 4), dtype=np.uint8)
    palette[:, 0] = 255
    palette[: len(table), 1:] = table
    pictured = index.reshape(colours.shape).astype(np.uint8), palette
    return av.VideoFrame.from_ndarray(pictured, format="pal8")  # pyright: ignore[reportArgumentType]


ENCODERS = {
    ".mp4": h264,
    ".m4v": h264,
    ".mov": h264,
    ".webm": vp9,
    ".mkv": ffv1,
    ".gif": gif,
}
STILLS: dict[str, dict[str, Any]] = {".png": {"compress_level": 3}, ".jpg": {"quality": 95, "subsampling": 0}}
STILLS[".jpeg"] = STILLS[".jpg"]
"""How Pillow saves a video of one frame."""
KINDS = (
    ".mp4, .m4v, .mov, .webm, .gif, .mkv (lossless) or a folder without a suffix (PNG images, lossless), "
    "one frame also as .png (lossless), .jpg or .jpeg"
)
FRAMES = "frame-[0-9][0-9][0-9][0-9][0-9].png"
"""The names of a folder's images."""
SOFTWARE = "kvlock-fast"
"""Written into a folder's images as "Software", which tells them from a user's own."""
FASTEST_GIF = 50
"""Frames per second; players slow down what claims more."""


def write_video(
    path: str | os.PathLike,
    frames: np.ndarray,
    fps: Fraction | float,
    *,
    quality: int = 16,
    audio: Audio | None = None,
    called: str | None = None,
) -> None:
    """Write uint8 RGB `[F, H, W, 3]` as a video, all or nothing.

    `.mp4`, `.m4v` and `.mov` are H.264, `.webm` is VP9 (BT.709, limited range, tagged so; 4:2:0, or 4:4:4 where a side
    is odd, so that nothing is cropped). `.mkv` is FFV1: lossless, RGB. `.gif` has 256 colours a frame. A name without a
    suffix is a folder of PNG images, frame-00000.png and so on, which states no rate; other files in it stay. One frame
    can be an image, `.png`, `.jpg` or `.jpeg`.

    Args:
        quality: x264's constant rate factor, 0 (lossless but for the colour conversion) to 51; 16 is near transparent.
        audio: the sound of a file that was read, cut to the video's length; a warning says where it cannot be kept.
        called: the name for warnings, where `path` is a temporary one.

    Raises:
        OutputError: the path cannot be written, or its suffix is another one, or that of an image and there are more.
        InputError: `quality` or `fps` out of range.
        ValueError: `frames` of another shape or dtype.
    """
    path = Path(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or frames.size == 0:
        raise ValueError(f"frames must be uint8 [F, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    if not 0 <= quality <= 51:
        raise InputError(f"the quality must be from 0 to 51, not {quality}")
    if not 0 < fps < 1001:
        raise InputError(f"the frame rate must be above 0 and at most 1000 per second, not {fps}")
    named = Path(called or path)
    if path.suffix.lower() in STILLS:
        check_video_output(path, len(frames))
        leave_out(audio, named, "an image holds none")
        _write_image(path, frames[0])
        return
    encode, rate = _encoder(path), Fraction(fps).limit_denominator(30_000)
    if encode is None:
        leave_out(audio, named, "a folder of images holds none")
        _write_images(path, frames)
        return
    if encode is gif:
        leave_out(audio, named, "a GIF holds none")
        audio, rate = None, _gif_rate(named, rate)
    _write_file(path, frames, rate, quality, audio, named)


def check_video_output(path: str | os.PathLike, frames: int | None = None) -> None:
    """Raise OutputError unless a video can be written to `path`: a known suffix, and a place that takes files.

    frames: how many it has, where that is known.
    """
    if Path(path).suffix.lower() in STILLS:
        if frames not in (None, 1):
            raise OutputError(f"cannot write '{path}': an image holds one frame, and the video has {frames}")
        check_writable(path)
    elif _encoder(Path(path)) is None:
        check_writable_folder(path)
        check_replaced(path, FRAMES, is_our_frame)
    else:
        check_writable(path)


def _encoder(path: Path) -> Encoder | None:
    """None: a folder of images."""
    if not path.suffix:
        return None
    encode = ENCODERS.get(path.suffix.lower())
    if encode is None:
        raise OutputError(f"cannot write '{path}': a video is written as {KINDS}")
    return encode


def _write_file(path: Path, frames: np.ndarray, rate: Fraction, quality: int, audio: Audio | None, named: Path) -> None:
    from av.error import FFmpegError

    with atomic_path(path) as temporary:
        try:
            try:
                _encode(temporary, frames, rate, quality, audio)
            except FFmpegError as error:
                if audio is None or error.errno in LOST:
                    raise
                # Whether a container takes a sound after all shows when its header is written.
                _encode(temporary, frames, rate, quality, None)
                leave_out(audio, named, f"it cannot be written there ({error.strerror or error})")
        except FFmpegError as error:
            kind = OutputLost if error.errno in LOST else OutputError
            raise kind(f"cannot write '{path}': {error.strerror or error}") from error


def _encode(file: Path, frames: np.ndarray, rate: Fraction, quality: int, audio: Audio | None) -> None:
    import av

    suffix = file.suffix.lower()
    # The index in front, so that a browser can start before it has the whole file.
    options = {"movflags": "+faststart"} if ENCODERS[suffix] is h264 else {}
    with av.open(f"file:{file}", "w", options=options) as container:
        stream, convert = ENCODERS[suffix](container, frames.shape[1:3], rate, quality)
        with carried(container, suffix, audio, float(len(frames) / rate)) as mux_audio:
            for i, picture in enumerate(frames):
                frame = convert(picture)
                frame.pts, frame.time_base = i, 1 / rate
                container.mux(stream.encode(frame))
                mux_audio(float((i + 1) / rate))
            container.mux(stream.encode())
            mux_audio(float("inf"))


def _gif_rate(path: Path, rate: Fraction) -> Fraction:
    if rate <= FASTEST_GIF:
        return rate
    warn(f"'{path}' plays at {FASTEST_GIF} frames per second, the most of a GIF, not at {float(rate):g}")
    return Fraction(FASTEST_GIF)


def _write_image(path: Path, picture: np.ndarray) -> None:
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(np.ascontiguousarray(picture)).save(temporary, **STILLS[path.suffix.lower()])


def is_our_frame(path: Path) -> bool:
    """Whether `write_video` made this image of a folder."""
    from PIL import Image

    try:
        refuse_special(path)
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _write_images(folder: Path, frames: np.ndarray) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    about.add_text("Software", SOFTWARE)
    with new_folder_content(folder, FRAMES, is_our_frame) as place:
        for i, picture in enumerate(frames):
            image = Image.fromarray(np.ascontiguousarray(picture))
            image.save(place / f"frame-{i:05d}.png", compress_level=3, pnginfo=about)
