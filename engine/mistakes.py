"""Compare the detections of an image with its objects: missed, confused, false alarms."""
from typing import NamedTuple

import torch
from torch import Tensor

from boxes import box_iou

IOU = 0.5                                               # from which a detection hits an object
KINDS = ("false alarm", "wrong class", "missed")


class Mistake(NamedTuple):
    """One mistake; among mistakes of a kind, a larger `rank` is worse."""
    kind: str                # one of KINDS
    rank: float              # score of the detection; of missed objects the area in px
    label: int               # of the detection; of missed objects that of the object
    true_label: int          # of the object; -1 for false alarms
    box: Tensor              # (4,) xyxy of the detection, or of the missed object, px


def find_mistakes(detection: dict[str, Tensor], truth: dict[str, Tensor]) -> list[Mistake]:
    """Mistakes of one image: false alarms, wrong classes, missed objects.

    detection: scores (k,), labels (k,), boxes (k, 4) xyxy px, best first; truth: labels (n,), boxes
    (n, 4). As in COCO every detection, best first, is assigned to the free object of its class
    with the highest IoU of at least IOU. The others are assigned to free objects of other classes
    in the same way ("wrong class"), or are false alarms; objects that remain free are missed."""
    boxes = detection["boxes"].float().cpu()                                   # (k, 4)
    objects = truth["boxes"].float()                                           # (n, 4)
    iou = box_iou(boxes, objects)[0]                                           # (k, n)
    same = detection["labels"].cpu()[:, None] == truth["labels"][None]         # (k, n)
    # detections of the right class first; the others share the objects that are left
    hits = assign(iou * same)
    hit_objects = set(hits.values())
    rest = iou * ~same
    rest[list(hits)] = 0
    rest[:, list(hit_objects)] = 0
    wrong = assign(rest)

    mistakes = []
    for i, label in enumerate(detection["labels"].tolist()):
        score = float(detection["scores"][i])
        if i in wrong:
            true_label = int(truth["labels"][wrong[i]])
            mistakes.append(Mistake("wrong class", score, label, true_label, boxes[i]))
        elif i not in hits:
            mistakes.append(Mistake("false alarm", score, label, -1, boxes[i]))
    for j, label in enumerate(truth["labels"].tolist()):
        if j not in hit_objects and j not in wrong.values():
            area = float((objects[j, 2:] - objects[j, :2]).prod())
            mistakes.append(Mistake("missed", area, label, label, objects[j]))
    return mistakes


def assign(iou: Tensor) -> dict[int, int]:
    """Greedy assignment by IoU (k, n), rows in order -> {row: column}."""
    pairs = {}
    free = torch.ones(iou.shape[1], dtype=torch.bool)
    for row, values in enumerate(iou):
        values = values * free
        if free.any() and values.max() >= IOU:
            column = int(values.argmax())
            pairs[row] = column
            free[column] = False
    return pairs
