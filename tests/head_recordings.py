"""Reads the recordings of Co-DETR's heads."""
import re

import numpy as np
import torch

from boxes import box_xyxy_to_cxcywh
from heads.anchors import Objects, Pyramid


def t(array):
    """Recorded array -> tensor of float32, int64 or bool."""
    array = np.asarray(array)
    kinds = {"f": np.float32, "i": np.int64, "u": np.int64, "b": bool}
    return torch.as_tensor(array.astype(kinds[array.dtype.kind]))


def pyramid_of(shapes, strides, image_sizes=((1000, 1000),)):
    """A pyramid of these level shapes, whose maps have no channels."""
    maps = [torch.empty(len(image_sizes), 0, *shape) for shape in np.asarray(shapes).tolist()]
    return Pyramid(maps, list(strides), torch.as_tensor(np.asarray(image_sizes)))


def levels(rec, prefix):
    """prefix0, prefix1, ...: the levels of one head's output."""
    keys = sorted(key for key in rec if re.fullmatch(re.escape(prefix) + r"\d", key))
    return [t(rec[key]) for key in keys]


def objects_of(rec, case, sizes, labels=True):
    """The recorded objects of every image."""
    images = []
    for i, size in enumerate(t(sizes)):
        boxes = t(rec[f"{case}/gt{i}"])
        known = t(rec[f"{case}/labels{i}"]) if labels else torch.zeros(len(boxes)).long()
        images.append(Objects(known, boxes, size))
    return images


def recorded_batch(rec, case):
    """Images, padding and targets of one case of a recorded model."""
    sizes = t(rec["image_sizes"])
    H, W = rec["padded_size"].tolist()
    padding = torch.ones(2, H, W, dtype=torch.bool)
    for mask, (h, w) in zip(padding, sizes.tolist()):
        mask[:h, :w] = False
    if case == "no_padding_mask":
        padding[:] = False
    targets = []
    for i, size in enumerate(sizes):
        keep = slice(0, 0) if case == "second_image_empty" and i == 1 else slice(None)
        h, w = (H, W) if case == "no_padding_mask" else size.tolist()
        boxes = box_xyxy_to_cxcywh(t(rec[f"in/gt{i}"])[keep]) / torch.tensor([w, h, w, h])
        targets.append({"labels": t(rec[f"in/labels{i}"])[keep], "boxes": boxes, "size": size})
    return torch.zeros(2, 3, H, W), padding, targets
