"""RetinaNet: Focal Loss for Dense Object Detection (Lin et al., ICCV 2017, arXiv 1708.02002).

The idea: one stage. Every anchor predicts a class and a box. The focal loss keeps the many easy
negatives from drowning the few positives.

    paper                                          here
    section 3.2, Eq. 5 focal loss                  matcher.focal_loss
    section 4 anchors                              RetinaNet.anchor_sizes, anchors
    section 4 assignment                           RetinaNet.assign
    section 4 class and box subnets                RetinaNet.forward
    section 4 box deltas (as in R-CNN)             RetinaNet.decode
    section 4.1 inference                          RetinaNet.detect
    section 4.1 training losses                    retinanet_losses
    section 4.1 initialization                     RetinaNet.__init__

FCOS and ATSS inherit from `RetinaNet` and replace what differs, above all `assign`.

B images, C channels, N classes, k anchors of a cell, A anchors of all levels, n objects of an
image, P positive anchors of the batch. Boxes are corners in pixels. Assignments: see anchors.py.

Differences from the paper
 1. One convolution before the predictions (paper: four), with group normalization, and GIoU of the
    decoded boxes instead of smooth L1 (Co-DETR, Table 12 and appendix).
 2. A learned factor for the box deltas of each level, and deltas divided by DELTA_STD (as in ATSS).
 3. An object below an IoU of 0.5 with every anchor keeps its best anchors (mmdetection; the paper
    leaves it without).
"""
import math

import torch
from torch import Tensor, nn

from boxes import paired_giou
from heads.anchors import (IGNORED, NINE_SIZES, Objects, Pyramid, assign_anchors, assign_by_iou,
                           assigned_objects, by_anchor, conv_norm_relu, delta_std,
                           detections_after_nms, grid_anchors, init_convolutions)
from heads.regions import clip_boxes, decode_deltas
from matcher import focal_loss

PRIOR = 0.01                # initial probability of every class
ANY_OVERLAP = 1e-3          # IoU: an object's best anchors are positive if they overlap it at all
TEST_PRE_NMS = 1000         # predictions of a level that reach NMS
TEST_NMS = 0.6              # IoU, among the detections of one class
GIOU_WEIGHT = 2.0


class RetinaNet(nn.Module):
    """Class logits and box deltas of every anchor, from `levels` maps of `dim` channels."""

    anchor_sizes = NINE_SIZES   # widths and heights of the anchors of a cell, in strides

    def __init__(self, dim: int, num_classes: int, levels: int):
        super().__init__()
        per_cell = len(self.anchor_sizes)
        self.num_classes = num_classes
        self.cls_tower = conv_norm_relu(dim)
        self.reg_tower = conv_norm_relu(dim)
        self.cls = nn.Conv2d(dim, per_cell * num_classes, 3, padding=1)
        self.reg = nn.Conv2d(dim, per_cell * 4, 3, padding=1)
        # a factor of the deltas of each level (Difference 2)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(levels))
        init_convolutions(self)
        nn.init.constant_(self.cls.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, maps: list[Tensor]) -> dict:
        """Maps [(B, C, H_l, W_l)] -> `logits` (B, A, N), `deltas` (B, A, 4), at least float32."""
        levels = []
        for x, scale in zip(maps, self.scales):
            levels.append(self.predict(self.cls_tower(x), self.reg_tower(x), scale))
        return {name: torch.cat([level[name] for level in levels], 1) for name in levels[0]}

    def predict(self, class_features: Tensor, box_features: Tensor, scale: Tensor) -> dict:
        """Predictions of one level from the two towers' maps (B, C, H, W) and the level's scale."""
        logits = by_anchor(self.cls(class_features), self.num_classes)             # (B, H W k, N)
        deltas = by_anchor(self.reg(box_features), 4) * scale                      # (B, H W k, 4)
        return {"logits": logits, "deltas": deltas}

    def anchors(self, pyramid: Pyramid) -> list[Tensor]:
        """Anchors of every level (A_l, 4)."""
        return grid_anchors(pyramid, self.anchor_sizes)

    @staticmethod
    def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
        """Deltas and anchors (..., 4) -> corner boxes (..., 4)."""
        return decode_deltas(deltas, anchors, delta_std(deltas))

    @staticmethod
    def assign(anchors: Tensor, counts: list[int], boxes: Tensor) -> Tensor:
        """Section 4: positive from an IoU of 0.5, background below 0.4, ignored between.

        anchors (A, 4), counts: how many of them each level has (not needed here), boxes of the
        objects (n, 4) -> assignment (A,)."""
        return assign_by_iou(anchors, boxes, positive=0.5, negative=0.4, rescue=ANY_OVERLAP)

    def targets(self, pyramid: Pyramid, objects: list[Objects]) -> dict:
        """Targets of every anchor.

        -> `labels` (B, A), N for background, and `boxes` (B, A, 4) of the assigned objects,
        `weights` (B, A) bool: False where the anchor lies in the padding or is ignored, and
        `anchors` (B, A, 4): the anchors themselves, but zeros where the weight is False."""
        anchors = self.anchors(pyramid)
        assigned = assign_anchors(self.assign, pyramid, anchors, objects)          # (B, A)
        labels, boxes = [], []
        for rows, image in zip(assigned, objects):
            image_labels, image_boxes = assigned_objects(rows, image, self.num_classes)
            labels.append(image_labels)
            boxes.append(image_boxes)
        weights = assigned != IGNORED
        return {"labels": torch.stack(labels), "boxes": torch.stack(boxes), "weights": weights,
                "anchors": torch.cat(anchors) * weights[..., None]}

    def score_factor(self, outputs: dict) -> Tensor | float:
        """Factor (B, A, 1), or a number, that makes class probabilities (B, A, N) the scores."""
        return 1.0

    @torch.no_grad()
    def detect(self, pyramid: Pyramid, top_k: int, soft_nms: float = 0.0) -> list[dict]:
        """Detections of this head alone: the best pairs (anchor, class) of each level, then NMS.

        The best pairs are those of the highest probability; NMS uses the scores (code). soft_nms:
        IoU threshold of soft-NMS; 0: NMS at TEST_NMS
        -> per image scores (k,), labels (k,), boxes (k, 4) in pixels and query (k,), best first,
        see `detections_after_nms`."""
        outputs = self(pyramid.maps)
        anchors = self.anchors(pyramid)
        boxes = self.decode(outputs["deltas"], torch.cat(anchors))                 # (B, A, 4)
        boxes = clip_boxes(boxes, pyramid.image_sizes[:, None])
        probabilities = outputs["logits"].sigmoid()                                # (B, A, N)
        scores = probabilities * self.score_factor(outputs)                        # (B, A, N)
        N = self.num_classes
        counts = [len(level) * N for level in anchors]   # pairs of each level
        detections = []
        for b in range(len(scores)):
            pairs = best_of_levels(probabilities[b].flatten(), counts)
            detections.append(detections_after_nms(
                boxes[b, pairs // N], scores[b].flatten()[pairs], pairs % N,
                soft_nms or TEST_NMS, top_k, soft=soft_nms > 0))
        return detections


def best_of_levels(scores: Tensor, counts: list[int]) -> Tensor:
    """Indices of the TEST_PRE_NMS highest of each level's scores; level l has counts[l] of them."""
    best = []
    start = 0
    for level in scores.split(counts):
        best.append(level.topk(min(TEST_PRE_NMS, len(level))).indices + start)
        start += len(level)
    return torch.cat(best)


def count_positives(labels: Tensor, num_classes: int) -> Tensor:
    """Number of positive anchors, from labels (B, A). An image counts at least one (code)."""
    return (labels < num_classes).sum(1).clamp(min=1).sum()


def retinanet_losses(logits: Tensor, deltas: Tensor, labels: Tensor, boxes: Tensor, weights: Tensor,
                     anchors: Tensor) -> dict:
    """Focal loss of all anchors and GIoU of the positive ones, divided by the number of positives.

    Shapes as in `RetinaNet.forward` and `RetinaNet.targets` -> {"cls", "giou"}."""
    count = count_positives(labels, logits.shape[-1])
    cls = focal_loss(logits, labels) * weights[..., None]                          # (B, A, N)
    positive = (labels < logits.shape[-1]).nonzero(as_tuple=True)
    giou = giou_losses(deltas[positive], anchors[positive], boxes[positive])       # (P,)
    return {"cls": cls.sum() / count, "giou": GIOU_WEIGHT * giou.sum() / count}


def giou_losses(deltas: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
    """1 - GIoU of decoded boxes and their objects: deltas, anchors, boxes (P, 4) -> (P,)."""
    return 1 - paired_giou(RetinaNet.decode(deltas, anchors), boxes)
