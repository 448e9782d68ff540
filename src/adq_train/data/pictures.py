"""Image files as 8-bit pixels: the one way for training, evaluation and images of one's own."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# By their names; what is inside is found out by Pillow, which tries no other format: some of those
# start programs (EPS: Ghostscript).
SUFFIXES = {
    ".bmp": "BMP",
    ".gif": "GIF",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".pbm": "PPM",
    ".pgm": "PPM",
    ".png": "PNG",
    ".pnm": "PPM",
    ".ppm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
FORMATS = tuple(sorted(set(SUFFIXES.values())))
MAX_PIXELS = 89_000_000  # of one image; Pillow itself warns from 89,478,485 on

# TIFF's tags, and the values that matter here.
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, SIGNED = 0, 2


class UnreadableError(Exception):
    """An image that cannot be read, or whose values have no known meaning; says why."""


def shown(path: str | os.PathLike[str]) -> str:
    """A path or file name as text that can be printed and kept; bytes beyond UTF-8 in digits."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def file_size(path: str) -> int:
    """The bytes of a regular file.

    Raises:
        UnreadableError: There is none (a link that leads nowhere), it is something else (a folder,
            a pipe, which would be waited for), or it is empty.
    """
    try:
        status = Path(path).stat()
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableError("not a regular file")
    if not status.st_size:
        raise UnreadableError("the file is empty")
    return status.st_size


def read_picture(path: str, mode: str, resize: int | None = None) -> Image.Image:
    """Reads an image file as a person sees it, in 8 bits.

    - 16-bit values give their high byte, floating-point ones must lie in 0 … 1.
    - What is transparent lies on white.
    - Orientation by EXIF is applied.
    - Of several frames the first one counts.

    Args:
        path: The file, in one of :data:`FORMATS`.
        mode: ``L`` or ``RGB``.
        resize: The shorter side that it will be brought to.

    Raises:
        UnreadableError: It cannot be decoded, is too large, or its values have no known range.
    """
    file_size(path)
    try:
        # Opened here: a file that Pillow opens itself may be mapped, which spoils turned TIFFs.
        with Path(path).open("rb") as content, Image.open(content, formats=FORMATS) as file:
            _check_size(file.width, file.height, resize)
            file.load()
            try:
                ImageOps.exif_transpose(file, in_place=True)
            except MemoryError:
                raise
            except Exception:  # whatever its tags are damaged like; the pixels are intact
                pass
            image = _eight_bits(file)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert(mode)
    except UnidentifiedImageError as error:
        raise UnreadableError("its format is not one that is read, or it is damaged") from error
    except Exception as error:  # each of Pillow's formats has errors of its own
        raise UnreadableError(" ".join(f"{error}".split()) or type(error).__name__) from error


def _check_size(width: int, height: int, resize: int | None) -> None:
    """Refuses what would take too much memory, as it is or resized.

    Raises:
        ValueError: Says what it would be.
    """
    scale = 1.0 if resize is None else max(1.0, resize / max(1, min(width, height)))
    for what, pixels in (("", width * height), (" once resized", scale**2 * width * height)):
        if pixels > MAX_PIXELS:
            raise ValueError(
                f"{width} × {height} pixels: {pixels:,.0f}{what} exceeds limit of {MAX_PIXELS:,}"
            )


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 8 bits per channel: another one where it has more.

    The high byte of 16 is what Pillow itself takes where there are several channels, and is right
    for files that were made with a factor of 257 and of 256.

    Raises:
        ValueError: Its values have no range that a file of its kind agrees on.
    """
    tags = getattr(image, "tag_v2", {})  # of TIFF
    if SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise ValueError("its numbers are signed; save it with 8 or 16 bits, without signs")
    if image.mode == "F":
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"its floating-point values reach from {low:g} to {high:g}, and only 0 … 1 is "
                "taken; divide them by the largest possible value, or save it with 8 bits"
            )
        return Image.fromarray((values * 255).round().astype(np.uint8))
    if not image.mode.startswith("I"):
        return image
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    if not 8 <= bits <= 16:
        raise ValueError(f"its whole numbers of {bits} bits have no known range; save 8 or 16 bits")
    values = np.asarray(image).astype(np.int32)
    grey = values >> (bits - 8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    if "transparency" in image.info:  # one value of PNG's is transparent
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))
