"""Video files out, by PyAV: H.264 for looking at, FFV1 where every bit counts."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from kvlock_fast.errors import InputError, OutputError
from kvlock_fast.files import atomic_path, check_writable
from kvlock_fast.media.video_files import exact_conversion


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: Fraction | float, *, quality: int = 16) -> None:
    """Write uint8 RGB `[F, H, W, 3]` as a video, all or nothing.

    `.mp4`, `.m4v` and `.mov` are H.264 (BT.709, limited range, tagged so; 4:2:0, or 4:4:4 where a side is odd, so
    that nothing is cropped). `.mkv` is FFV1: lossless, RGB.

    Args:
        quality: x264's constant rate factor, 0 (lossless but for the colour conversion) to 51; 16 is near transparent.

    Raises:
        OutputError: the path cannot be written, or its suffix is another one.
        InputError: `quality` or `fps` out of range.
        ValueError: `frames` of another shape or dtype.
    """
    import av

    path = Path(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or frames.size == 0:
        raise ValueError(f"frames must be uint8 [F, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    if not 0 <= quality <= 51:
        raise InputError(f"the quality must be from 0 to 51, not {quality}")
    if not 0 < fps < 1001:
        raise InputError(f"the frame rate must be above 0 and at most 1000 per second, not {fps}")
    encode = _encoder(path)
    rate = Fraction(fps).limit_denominator(30_000)
    with atomic_path(path) as temporary:
        try:
            # The index in front, so that a browser can start before it has the whole file.
            options = {} if encode is _ffv1 else {"movflags": "+faststart"}
            with av.open(f"file:{temporary}", "w", options=options) as container:
                stream, convert = encode(container, frames.shape[1:3], rate, quality)
                for i, picture in enumerate(frames):
                    frame = convert(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"))
                    frame.pts, frame.time_base = i, 1 / rate
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
        except av.error.FFmpegError as error:
            raise OutputError(f"cannot write '{path}': {error.strerror or error}") from error


def check_video_output(path: str | os.PathLike) -> None:
    """Raise OutputError unless a video can be written to `path`: a known suffix, and a place that takes files."""
    _encoder(Path(path))
    check_writable(path)


def _encoder(path: Path):
    encode = {".mp4": _h264, ".m4v": _h264, ".mov": _h264, ".mkv": _ffv1}.get(path.suffix.lower())
    if encode is None:
        raise OutputError(f"cannot write '{path}': a video is written as .mp4, .m4v, .mov or .mkv (lossless)")
    return encode


def _h264(container, size: tuple[int, int], fps: Fraction, quality: int):
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter

    stream = container.add_stream("libx264", rate=fps, options={"crf": str(quality), "preset": "medium"})
    stream.height, stream.width = size
    stream.pix_fmt = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"
    context = stream.codec_context
    context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    reformatter = VideoReformatter()

    def convert(frame):
        return reformatter.reformat(
            frame,
            format=stream.pix_fmt,
            src_colorspace=Colorspace.ITU709,
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=exact_conversion(),
        )

    return stream, convert


def _ffv1(container, size: tuple[int, int], fps: Fraction, quality: int):
    # By default FFV1 cuts the picture into at least four, which the smallest ones do not allow.
    stream = container.add_stream("ffv1", rate=fps, options={"slices": "1"} if min(size) < 16 else {})
    stream.height, stream.width = size
    stream.pix_fmt = "bgr0"
    return stream, lambda frame: frame.reformat(format="bgr0")
