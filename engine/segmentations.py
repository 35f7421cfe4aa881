"""Segmentations of a COCO json: decode them, and check every number before pycocotools sees it."""
import numpy as np
from pycocotools import mask as coco_mask

from engine.errors import UserError
from engine.images import MAX_PIXELS
from engine.notices import one_line

MAX_COORDINATE = 1e5    # px
MAX_OUTLINE = 1e6       # px; pycocotools' memory grows with the length of a polygon's outline


def decode_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Decode polygons, compressed or uncompressed RLE to a mask (height, width) uint8.

    Raises UserError if the segmentation was made for another image size.
    """
    if isinstance(segmentation, list):
        polygons = coco_mask.frPyObjects(segmentation, height, width)
        segmentation = coco_mask.merge(polygons)
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, *segmentation["size"])
    mask = coco_mask.decode(segmentation)
    if mask.shape != (height, width):
        raise UserError(
            f"segmentation: expected a mask of (h, w) = {height, width} px, got {mask.shape}; "
            "run python -m tools.check_data DIR")
    return mask


def segmentation_fault(segmentation, size: tuple[int, int]) -> str | None:
    """Say what is wrong with a segmentation, or return None. Nothing at all is not a fault.

    size: (width, height) of the image, 0 = unknown.
    """
    if segmentation is None or segmentation == [] or segmentation == {}:
        return None
    if size[0] * size[1] > MAX_PIXELS:
        return f"expected an image of at most {MAX_PIXELS} pixels, got {size[0]} x {size[1]}"
    if isinstance(segmentation, list):
        return polygons_fault(segmentation)
    if isinstance(segmentation, dict) and {"counts", "size"} <= segmentation.keys():
        return rle_fault(segmentation, size)
    return f"expected polygons or RLE {{size, counts}}, got {one_line(segmentation, 60)}"


def polygons_fault(polygons: list) -> str | None:
    """Say what is wrong with [[x, y, x, y, ...], ...], or return None."""
    for points in polygons:
        if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
            return "expected polygons [x, y, x, y, x, y, ...] of at least three points"
        for value in points:
            if type(value) not in (int, float) or not abs(value) <= MAX_COORDINATE:
                return f"expected finite coordinates in px, got {one_line(value, 40)}"
        # An upper bound first: hardly any polygon needs the exact length.
        if len(points) * max(map(abs, points)) > MAX_OUTLINE:
            corners = np.array(points, np.float64).reshape(-1, 2)                       # (n, 2)
            outline = np.abs(corners - np.roll(corners, 1, 0)).max(1).sum()
            if outline > MAX_OUTLINE:
                return f"expected an outline of at most {MAX_OUTLINE:.0f} px, got {outline:.0f}"
    return None


def rle_fault(rle: dict, size: tuple[int, int]) -> str | None:
    """Say what is wrong with {"size": [height, width], "counts": text or list}, or return None."""
    sides = rle["size"]
    if not isinstance(sides, list) or len(sides) != 2:
        return f"expected RLE size [height, width], got {one_line(sides, 60)}"
    if not all(type(side) is int and 0 < side <= MAX_PIXELS for side in sides):
        return f"expected RLE size of two positive integers, got {one_line(sides, 60)}"
    if 0 not in size and sides != [size[1], size[0]]:
        return f"expected RLE size [height, width] = {[size[1], size[0]]}, got {sides}"
    pixels = sides[0] * sides[1]
    if pixels > MAX_PIXELS:
        return f"expected at most {MAX_PIXELS} pixels, got {sides}"

    counts = rle["counts"]
    if isinstance(counts, str):
        counts = decode_counts(counts)
        if counts is None:
            return f"expected compressed RLE counts, got {one_line(rle['counts'], 40)}"
    elif not isinstance(counts, list):
        return f"expected RLE counts as text or a list, got {one_line(counts, 40)}"
    elif not all(type(count) is int and 0 <= count <= pixels for count in counts):
        return "expected RLE counts of at least 0 that are integers"
    if len(counts) and min(counts) < 0:
        return f"expected RLE counts of at least 0, got {min(counts)}"
    if sum(counts) != pixels:
        return f"RLE counts sum to {sum(counts)}, expected {pixels}"
    return None


def decode_counts(text: str) -> list[int] | None:
    """Decode COCO's compressed RLE counts; None if the text is none or is cut short.

    Each count is a number of 5-bit groups, lowest first, one character (48 + group) each: bit 32
    says that another group follows, bit 16 of the last group is the sign. From the fourth count on,
    the difference to the count before the last is stored.
    """
    counts = []
    value = 0
    shift = 0
    for letter in text:
        group = ord(letter) - 48
        if not 0 <= group < 64 or shift > 30:
            return None
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value = 0
        shift = 0
    return None if shift else counts
