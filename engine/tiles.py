"""Detect on overlapping tiles of an image: for large images with small objects.

A detector sees a tile larger than it would see the same pixels in the complete image. An object
that is cut by the border of one tile lies completely in its neighbor, as long as it is smaller than
their overlap; larger objects are found in the complete image, which is one of the regions too.
"""
import numpy as np
import torch

from engine.errors import UserError
from engine.inference import above, as_rgb, class_thresholds, detect_image
from engine.notices import notice_once
from heads.regions import nms

BORDER = 2             # px: a detection that comes this close to an inner border is cut
SAME_OBJECT = 0.5      # IoU from which two detections of a class are one object
MAX_MERGED = 5000      # the best detections of all regions that are merged


def tile_regions(width, height, tile, overlap):
    """The complete image and tiles of at most `tile` px a side -> [(x0, y0, x1, y1)], px.

    Neighbors share at least the fraction `overlap` of a tile."""
    regions = [(0, 0, width, height)]
    if max(width, height) > tile:
        for y in starts(height, tile, overlap):
            for x in starts(width, tile, overlap):
                regions.append((x, y, min(x + tile, width), min(y + tile, height)))
    return regions


def starts(length, tile, overlap):
    """Where tiles begin on a side of `length` px, evenly spaced."""
    if length <= tile:
        return [0]
    step = max(1, int(tile * (1 - overlap)))
    count = 1 + -(-(length - tile) // step)
    return np.linspace(0, length - tile, count).round().astype(int).tolist()


def detect_tiled(detector, image, tile, overlap=0.2, amp=False):
    """Detections of one image from overlapping tiles, best first, in its pixels. A notice says once
    if objects are larger than a tile.

    detector, image: as in `detect_image`. Detections of the same class with an IoU of SAME_OBJECT
    or more become one, the best. -> {scores (k,), labels (k,), boxes (k, 4) xyxy}. UserError for
    models that make masks."""
    image = as_rgb(image)
    parts = []
    regions = tile_regions(*image.size, tile, overlap)
    for region in regions:
        found = detect_image(detector, image.crop(region), amp)
        refuse_masks("masks" in found)
        corner = torch.tensor(region[:2] * 2, device=found["boxes"].device)    # (4,)
        boxes = found["boxes"] + corner
        complete = ~is_cut(boxes, region, image.size)
        part = {"scores": found["scores"], "labels": found["labels"], "boxes": boxes}
        parts.append({key: value[complete] for key, value in part.items()})
    merged = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    best = merged["scores"].argsort(descending=True, stable=True)[:MAX_MERGED]
    merged = {key: value[best] for key, value in merged.items()}
    remains = nms(merged["boxes"], SAME_OBJECT, merged["labels"])              # (k,)
    detection = {key: value[remains] for key, value in merged.items()}
    if len(regions) > 1:
        notice_large_objects(detector, detection, tile)
    return detection


def refuse_masks(has_masks):
    """UserError for models that make masks, which are not merged."""
    if has_masks:
        raise UserError("--tile: expected a model of boxes, got one of masks; leave it out")


def notice_large_objects(detector, detection, tile):
    """Say once that a detected object does not fit into a tile."""
    shown = above(detection, class_thresholds(detector.meta))
    sides = shown["boxes"][:, 2:] - shown["boxes"][:, :2]                      # (k, 2)
    if (sides > tile).any():
        notice_once("tiles", f"an object of {sides.max():.0f} px is larger than --tile {tile}: "
                             "tiles show only parts of it, which may count as objects; give a "
                             "larger --tile")


def is_cut(boxes, region, size):
    """Whether boxes (k, 4) xyxy reach a border of their region inside the image -> (k,) bool."""
    x0, y0, x1, y1 = region
    width, height = size
    cut = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    if x0 > 0:
        cut |= boxes[:, 0] < x0 + BORDER
    if y0 > 0:
        cut |= boxes[:, 1] < y0 + BORDER
    if x1 < width:
        cut |= boxes[:, 2] > x1 - BORDER
    if y1 < height:
        cut |= boxes[:, 3] > y1 - BORDER
    return cut
