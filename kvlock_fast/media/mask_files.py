"""Masks from files: video, image, folder of images, NumPy arrays; and boxes in words."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path

import numpy as np

from kvlock_fast.errors import InputError
from kvlock_fast.media import image_files
from kvlock_fast.media.video_files import MAX_BYTES, MAX_PIXELS, decode_video, read_images


def read_mask(path: str | os.PathLike, *, threshold: float = 0.5) -> np.ndarray:
    """Read a mask as bool `[F, H, W]`, True on the part to edit; one image gives F = 1.

    Pictures are set where their brightest channel lies above `threshold` of the full range, so lossy compression
    leaves no speckle and painted regions of any colour count. Arrays (.npy, .npz with one array or one named `mask`)
    are `[H, W]` or `[F, H, W]`, perhaps with a last dimension of 1: bool, integers 0..1, 0..255 or 0..65535, or
    floats 0..1. Nothing is unpickled.

    Raises:
        InputError: missing, unreadable, too large, or of another kind; it names the file. A `threshold` outside
            0 <= threshold < 1.
    """
    if not 0 <= threshold < 1:
        raise InputError(f"the mask threshold must be at least 0 and below 1, not {threshold}")
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        return _to_bool(read_images(path, None, MAX_PIXELS, MAX_BYTES), threshold)
    if suffix in image_files.SUFFIXES:
        return _to_bool(image_files.read_image(path, MAX_PIXELS)[None], threshold)
    if suffix in (".npy", ".npz"):
        return _from_array(_load_array(path), path, threshold)
    frames, _ = decode_video(path, None, MAX_PIXELS, MAX_BYTES)
    return _to_bool(frames, threshold)


def box_mask(spec: str, frames: int, height: int, width: int) -> np.ndarray:
    """The mask of `box:x,y,w,h` (pixels of the video, from the top left corner): bool `[frames, height, width]`.

    Raises InputError quoting `spec` if it is not four whole numbers or the box does not lie in the picture.
    """
    kind, _, numbers = spec.partition(":")
    try:
        x, y, w, h = (int(number) for number in numbers.split(","))
    except ValueError:
        kind = None
    if kind != "box":
        raise InputError(f"the mask '{spec}' is not of the form box:x,y,w,h with whole numbers")
    if x < 0 or y < 0 or w < 1 or h < 1 or x + w > width or y + h > height:
        raise InputError(f"the mask '{spec}' does not lie within the video of {width} columns and {height} rows")
    mask = np.zeros((frames, height, width), dtype=bool)
    mask[:, y : y + h, x : x + w] = True
    return mask


def _to_bool(frames: np.ndarray, threshold: float) -> np.ndarray:
    mask = np.empty(frames.shape[:3], dtype=bool)
    for i, frame in enumerate(frames):
        mask[i] = frame.max(axis=-1) > threshold * 255
    return mask


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
    except (OSError, ValueError, EOFError, SyntaxError, zipfile.BadZipFile) as error:
        raise InputError(f"the mask '{path}' cannot be read as an array: {error}") from error


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
