"""Still images and folders of them, by Pillow."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from kvlock_fast.errors import InputError
from kvlock_fast.files import refuse_special

MAX_PIXELS = 4096 * 4096
"""The largest picture that is read, in pixels."""
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})


def images_in(folder: Path) -> list[Path]:
    """The images in `folder`, in the order people mean (frame2 before frame10).

    Raises InputError naming the folder if there are none.
    """
    found = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    if not found:
        raise InputError(f"the folder '{folder}' holds no images ({', '.join(sorted(SUFFIXES))})")
    return sorted(found, key=_natural)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) as shown, EXIF orientation applied, read from the header alone.

    Raises InputError naming the file if it is no image or has more than MAX_PIXELS pixels.
    """
    with _opened(path) as image:
        # EXIF tag 274 is the orientation; 5 to 8 turn the picture on its side.
        turned = image.getexif().get(274, 1) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def is_still(path: Path) -> bool:
    """Whether the file is anything but an image that moves (APNG, WebP)."""
    from PIL import Image

    refuse_special(path)
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) == 1
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return True


def read_image(path: Path) -> np.ndarray:
    """The image as uint8 RGB `[H, W, 3]`: EXIF orientation applied, transparency over black, 16 bit scaled to 8.

    Raises InputError naming the file if it cannot be read or has more than MAX_PIXELS pixels.
    """
    from PIL import ImageOps

    with _opened(path) as image:
        try:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                grey = np.clip(np.asarray(image, dtype=np.float64) / 257, 0, 255)
                return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=-1)
            if image.has_transparency_data:
                return over_black(np.asarray(image.convert("RGBA")))
            return np.asarray(image.convert("RGB"))
        # Pillow reports a damaged PNG as a SyntaxError.
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"the image '{path}' cannot be decoded: {error}") from error


def over_black(rgba: np.ndarray) -> np.ndarray:
    """uint8 RGBA `[H, W, 4]` laid over black: uint8 RGB `[H, W, 3]`."""
    weighted = rgba[..., :3].astype(np.uint16) * rgba[..., 3:]
    return ((weighted + 127) // 255).astype(np.uint8)


def _opened(path: Path):
    refuse_special(path)
    from PIL import Image

    try:
        image = Image.open(path)
    except FileNotFoundError as error:
        raise InputError(f"the image '{path}' does not exist") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"the image '{path}' is larger than the limit of {MAX_PIXELS} pixels") from error
    except Exception as error:  # UnidentifiedImageError, and whatever else a stranger's bytes cause
        raise InputError(f"'{path}' is not an image that can be read") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise InputError(
            f"the image '{path}' is {image.height}x{image.width}, more than the limit of {MAX_PIXELS} pixels"
        )
    return image


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", path.name)]
