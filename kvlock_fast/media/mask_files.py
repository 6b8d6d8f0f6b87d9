"""Masks from files: video, image, folder of images, NumPy arrays."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path

import numpy as np

from kvlock_fast.errors import InputError
from kvlock_fast.media import image_files
from kvlock_fast.media.video_files import MAX_BYTES, MAX_PIXELS, decode_video, read_images


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
    if not 0 <= threshold < 1:
        raise InputError(f"the mask threshold must be at least 0 and below 1, not {threshold}")
    path = Path(path)
    suffix = path.suffix.lower()

    def marked(picture: np.ndarray) -> np.ndarray:
        return picture.max(axis=-1) > threshold * 255

    if path.is_dir():
        return read_images(path, max_frames, MAX_PIXELS, MAX_BYTES, marked)
    if suffix in image_files.SUFFIXES:
        return marked(image_files.read_image(path, MAX_PIXELS))[None]
    if suffix in (".npy", ".npz"):
        return _from_array(_load_array(path), path, threshold)[:max_frames]
    return decode_video(path, max_frames, MAX_PIXELS, MAX_BYTES, marked).frames


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
