"""Segmentations of a COCO json: decode them, and check every number before pycocotools sees it."""
import numpy as np
from pycocotools import mask as coco_mask

from engine.errors import UserError
from engine.images import MAX_PIXELS
from engine.notices import quoted

MAX_POLYGON_COORDINATE = 1e5   # px
MAX_OUTLINE = 1e6              # px; memory of pycocotools grows with the length of an outline


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
    """Return what is wrong with a segmentation, or None. A missing or empty one is not a fault.

    size: (width, height) of the image in px, 0 = unknown
    """
    if segmentation is None or segmentation == [] or segmentation == {}:
        return None
    if size[0] * size[1] > MAX_PIXELS:
        return f"expected an image of at most {MAX_PIXELS} pixels, got {size[0]} x {size[1]}"
    if isinstance(segmentation, list):
        return polygons_fault(segmentation)
    if isinstance(segmentation, dict) and {"counts", "size"} <= segmentation.keys():
        return rle_fault(segmentation, size)
    return f"expected polygons or RLE {{size, counts}}, got {quoted(segmentation)}"


def polygons_fault(polygons: list) -> str | None:
    """Return what is wrong with [[x, y, x, y, ...], ...], or None."""
    for points in polygons:
        if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
            return "expected polygons [x, y, x, y, x, y, ...] of at least three points"
        for value in points:
            if type(value) not in (int, float) or not abs(value) <= MAX_POLYGON_COORDINATE:
                return f"expected finite coordinates in px, got {quoted(value, 40)}"
        # The length is needed only where this upper bound is too large, in hardly any polygon.
        if len(points) * max(map(abs, points)) > MAX_OUTLINE:
            corners = np.array(points, np.float64).reshape(-1, 2)                       # (n, 2)
            outline = np.abs(corners - np.roll(corners, 1, 0)).max(1).sum()
            if outline > MAX_OUTLINE:
                return f"expected an outline of at most {MAX_OUTLINE:.0f} px, got {outline:.0f}"
    return None


def rle_fault(rle: dict, size: tuple[int, int]) -> str | None:
    """Return what is wrong with {"size": [height, width], "counts": text or list}, or None."""
    sides = rle["size"]
    if not isinstance(sides, list) or len(sides) != 2:
        return f"expected RLE size [height, width], got {quoted(sides)}"
    if not all(type(side) is int and 0 < side <= MAX_PIXELS for side in sides):
        return f"expected RLE size of two positive integers, got {quoted(sides)}"
    if 0 not in size and sides != [size[1], size[0]]:
        return f"expected RLE size [height, width] = {[size[1], size[0]]}, got {sides}"
    pixels = sides[0] * sides[1]
    if pixels > MAX_PIXELS:
        return f"expected at most {MAX_PIXELS} pixels, got {sides}"

    counts = rle["counts"]
    if isinstance(counts, str):
        counts = decode_counts(counts)
        if counts is None:
            return f"expected compressed RLE counts, got {quoted(rle['counts'], 40)}"
    elif not isinstance(counts, list):
        return f"expected RLE counts as text or a list, got {quoted(counts, 40)}"
    elif not all(type(count) is int and 0 <= count <= pixels for count in counts):
        return f"expected RLE counts that are integers, at least 0 and at most {pixels}"
    if len(counts) and min(counts) < 0:
        return f"expected RLE counts of at least 0, got {min(counts)}"
    if sum(counts) != pixels:
        return f"RLE counts sum to {sum(counts)}, expected {pixels}"
    return None


def decode_counts(text: str) -> list[int] | None:
    """Decode COCO's compressed RLE counts; None if the text is malformed or cut short.

    A number consists of groups of 5 bits, lowest first. A character stores a group as 48 + group,
    plus 32 if another group follows; 16 in the last group is the sign. The first three numbers are
    counts; each later one is the difference to the count two places before.
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
