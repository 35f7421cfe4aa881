"""Read image files: whatever Pillow opens becomes an upright RGB image."""
import os
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from engine.errors import UserError
from engine.notices import notice_once

# of files that count as images where a folder is read
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS   # larger images are refused by Pillow
ORIENTATION = 0x0112                      # the EXIF tag
SWAPS_SIDES = (5, 6, 7, 8)                # EXIF orientations that exchange width and height


class UnreadableImage(UserError):
    """An image file that is missing, damaged, or of a kind that cannot become RGB."""


class Header(NamedTuple):
    """What the first bytes of an image file say."""
    size: tuple[int, int]      # (width, height) as stored, before EXIF rotation
    orientation: int           # EXIF orientation, 1 = upright
    mode: str                  # Pillow's mode, such as RGB, L, I;16
    several_pages: bool        # the file holds more than one picture


def read_header(path: str | Path) -> Header:
    """Read an image's header without decoding its pixels. Raises UnreadableImage."""
    return open_and(_header, path)


def read_image(path: str | Path, listed: tuple[int, int] | None = None) -> Image.Image:
    """Read an image file as RGB, rotated as its EXIF tag says.

    listed: (width, height) in the json. If only the unrotated pixels have this size, the boxes were
    drawn on those, and the tag is ignored.

    Gray, palette and CMYK images become RGB, and transparency is dropped. Gray values of 16 bits
    are scaled from the image's own range, RGB values of 16 bits lose their lower 8 bits, and of
    several pages the first is read: a notice says so once for all images. Raises UnreadableImage.
    """
    return open_and(lambda image: _upright_rgb(image, path, listed), path)


def open_and(function, path: str | Path):
    """Return function(opened image). Whatever goes wrong becomes UnreadableImage."""
    try:
        # A pipe or a device would block for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("expected a regular file")
        with Image.open(path) as image:
            return function(image)
    except Exception as error:   # damaged files make Pillow's decoders raise nearly every type
        text = str(error).replace(f" {str(path)!r}", "").replace(str(path), "the file")
        reason = getattr(error, "strerror", "") or text or type(error).__name__
        raise UnreadableImage(f"{path}: expected a readable image, got: {reason}") from error


def upright_size(header: Header, listed: tuple[int, int] | None) -> tuple[tuple[int, int], bool]:
    """Return ((width, height), rotate): the size that read_image gives, and if it rotates."""
    size = header.size
    rotated_size = size[::-1] if header.orientation in SWAPS_SIDES else size
    boxes_fit_unrotated = listed == size and listed != rotated_size
    rotate = header.orientation != 1 and not boxes_fit_unrotated
    return (rotated_size if rotate else size), rotate


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a Pillow image of any mode but floating point to 8-bit RGB."""
    if image.mode == "F":
        raise ValueError("expected 8 or 16 bits a channel, got floating point; convert the image")
    if image.mode.startswith("I"):
        image = scale_to_8_bits(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16- or 32-bit gray values: the lowest becomes black, the highest white."""
    notice_once("16-bit", "16-bit images are scaled to 8 bits from each image's own range: "
                          "the lowest value becomes black, the highest white")
    values = np.asarray(image).astype(np.float32)
    values -= values.min()
    values *= 255 / max(values.max(), 1)
    return Image.fromarray(values.round().astype(np.uint8))


def _header(image):
    # The further pictures in a camera's multi-picture JPEG (MPO) are previews.
    several_pages = getattr(image, "is_animated", False) and image.format != "MPO"
    return Header(image.size, image.getexif().get(ORIENTATION, 1), image.mode, several_pages)


def _upright_rgb(image, path, listed):
    header = _header(image)
    if header.several_pages:
        notice_once("pages", f"{path}: of a file with several pages only the first is read")
    # Pillow's mode does not tell 16-bit color; the format of the stored pixels, as RGB;16B, does.
    if image.mode == "RGB" and ";16" in str(image.tile):
        notice_once("16-bit color", f"{path}: 16-bit color images keep the upper 8 bits")
    image.load()
    _, rotate = upright_size(header, listed)
    if rotate:
        image = ImageOps.exif_transpose(image)
    return to_rgb(image)
