"""One encoder for each kind of video file: a stream, and what makes its frames of an RGB picture.

Each takes (container, (height, width), frames per second, quality as x264's constant rate factor) and returns the
stream and a function from a uint8 RGB `[H, W, 3]` to a frame. Colours are BT.709 in limited range, tagged so, or RGB.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from kvlock_fast.media.video_files import exact_conversion

Encoder = Callable[[Any, tuple[int, int], Fraction, int], tuple[Any, Callable[[np.ndarray], Any]]]


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
    return av.VideoFrame.from_ndarray((index.reshape(colours.shape).astype(np.uint8), palette), format="pal8")
