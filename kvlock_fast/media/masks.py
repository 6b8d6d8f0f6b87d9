"""Masks: boxes in words, files, and their shape (grown, shrunk, inverted, with a soft edge).

Words give a box, or boxes at keyframes with straight motion between them. A file is a video, an image, a folder of
images or a NumPy array.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from pathlib import Path

import numpy as np

from kvlock_fast.errors import InputError, one_line
from kvlock_fast.media import images
from kvlock_fast.media.fitting import by_distance
from kvlock_fast.media.video_in import MAX_BYTES, decode_video, read_images
from kvlock_fast.settings import MaskShape

FORMS = "box:x,y,w,h or box:FRAME=x,y,w,h;FRAME=x,y,w,h;... with whole numbers"

_BOX = re.compile(r"\s*(?:(\d{1,9})\s*=)?\s*(-?\d{1,9})\s*,\s*(-?\d{1,9})\s*,\s*(-?\d{1,9})\s*,\s*(-?\d{1,9})\s*")


def is_box(spec: str) -> bool:
    """Whether a mask is given in words, and not as a file."""
    return spec.startswith("box:")


def check_box(spec: str) -> None:
    """Raise InputError quoting `spec` if it has another form or names a frame twice, whatever the video is."""
    _keyframes(spec)


def box_mask(spec: str, frames: int, height: int, width: int) -> np.ndarray:
    """The mask of `box:x,y,w,h` (pixels of the video, from the top left corner): bool `[frames, height, width]`.

    `box:0=10,20,64,48;24=40,20,64,48` gives the box at some frames, counted from 0. Between two of them its four edges
    move in straight lines and are rounded to whole pixels; before the first and after the last it stands still.
    Keyframes may lie beyond the last frame, in any order.

    Raises InputError quoting `spec` if it has another form, names a frame twice, or a box does not lie in the picture.
    """
    keys = _keyframes(spec)
    for x, y, w, h in keys.values():
        if x < 0 or y < 0 or w < 1 or h < 1 or x + w > width or y + h > height:
            raise InputError(f"the mask '{spec}' does not lie within the video of {width} columns and {height} rows")
    times = sorted(keys)
    # Edges, not corner and size: each then stays within the picture after rounding.
    edges = np.array([(x, y, x + w, y + h) for x, y, w, h in (keys[time] for time in times)], dtype=np.float64)
    # Halves go up, also those that interpolation misses by a rounding.
    at = [np.floor(np.interp(np.arange(frames), times, column) + (0.5 + 1e-9)).astype(int) for column in edges.T]
    mask = np.zeros((frames, height, width), dtype=bool)
    for frame, (left, top, right, bottom) in enumerate(zip(*at, strict=True)):
        mask[frame, top:bottom, left:right] = True
    return mask


def _keyframes(spec: str) -> dict[int, tuple[int, int, int, int]]:
    """The boxes (x, y, w, h) by frame; a box without a frame is that of frame 0."""
    boxes = spec.removeprefix("box:").split(";") if is_box(spec) else []
    found = [match for match in map(_BOX.fullmatch, boxes) if match and (len(boxes) == 1 or match[1] is not None)]
    if not found or len(found) < len(boxes):
        raise InputError(f"the mask '{spec}' is not of the form {FORMS}")
    keys: dict[int, tuple[int, int, int, int]] = {}
    for match in found:
        frame, x, y, w, h = (int(number or 0) for number in match.groups())
        if frame in keys:
            raise InputError(f"the mask '{spec}' gives the box at frame {frame} twice")
        keys[frame] = x, y, w, h
    return keys


def grow_mask(mask: np.ndarray, radius: int) -> np.ndarray:
    """bool `[F, H, W]` with every pixel set that lies within `radius` pixels of a set one, in its own frame.

    By Euclidean distance between centres: dilation by a disc. A negative radius is the same done to the rest (erosion
    by the disc); what lies beyond the picture's edge counts for neither.
    """
    if radius < 0:
        return ~grow_mask(~mask, -radius)
    return mask if radius == 0 else by_distance(mask, lambda distance: distance <= radius)


def read_mask(path: str | os.PathLike, *, threshold: float = 0.5, max_frames: int | None = None) -> np.ndarray:
    """Read a mask as bool `[F, H, W]`, True on the part to edit; one image gives F = 1.

    Pictures are set where their brightest channel lies above `threshold` of the full range, so lossy compression
    leaves no speckle and painted regions of any colour count. Arrays (.npy, .npz with one array or one named `mask`)
    are `[H, W]` or `[F, H, W]`, perhaps with a last dimension of 1: bool, integers 0..1, 0..255 or 0..65535, or
    floats 0..1. Nothing is unpickled. Only the first `max_frames` are kept.

    Raises:
        InputError: missing, unreadable, too large, or of another kind; it names the file. A `threshold` outside
            0 <= threshold < 1.
    """
    MaskShape(threshold)  # checks it
    path = Path(path)
    suffix = path.suffix.lower()

    def marked(picture: np.ndarray) -> np.ndarray:
        return picture.max(axis=-1) > threshold * 255

    if path.is_dir():
        return read_images(path, max_frames, marked)
    if suffix in images.SUFFIXES:
        return marked(images.read_image(path))[None]
    if suffix in (".npy", ".npz"):
        return _from_array(_load_array(path), path, threshold)[:max_frames]
    return decode_video(path, max_frames, marked).frames


def _load_array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"the mask '{path}' does not exist")
    try:
        if path.suffix.lower() == ".npy":
            with path.open("rb") as file:
                _check_header(file, path)
            return np.load(path, allow_pickle=False)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            name = "mask.npy" if "mask.npy" in names else names[0] if len(names) == 1 else None
            if name is None:
                raise InputError(f"the mask '{path}' holds {len(names)} arrays and none is named mask")
            with archive.open(name) as file:
                _check_header(file, path)
            with archive.open(name) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
    except InputError:
        raise
    except Exception as error:  # whatever a stranger's bytes cause: packed otherwise, encrypted, with absurd sizes
        raise InputError(f"the mask '{path}' cannot be read as an array: {one_line(error)}") from error


def _check_header(file, path: Path) -> None:
    """Refuse by the header alone what would not fit, or would have to be unpickled."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise InputError(f"the mask '{path}' holds Python objects, which are never unpickled")
    if math.prod(shape) * dtype.itemsize > MAX_BYTES:
        raise InputError(f"the mask '{path}' has the shape {shape}, more than the limit of {MAX_BYTES} bytes")


def _from_array(array: np.ndarray, path: Path, threshold: float) -> np.ndarray:
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.size == 0:
        raise InputError(f"the mask '{path}' has the shape {array.shape}, not [H, W] or [F, H, W]")
    if array.dtype == bool:
        return array
    if array.dtype.kind not in "iuf":
        raise InputError(f"the mask '{path}' has values of type {array.dtype}, not bool or plain numbers")
    low, high = array.min(), array.max()
    # NaN fails every comparison.
    ranges = (1,) if array.dtype.kind == "f" else (1, 255, 65535)
    full = next((full for full in ranges if low >= 0 and high <= full), None)
    if full is None:
        raise InputError(f"the mask '{path}' has values of type {array.dtype} from {low} to {high}, not 0..1 or 0..255")
    return array > threshold * full
