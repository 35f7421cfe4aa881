"""ATSS: Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training
Sample Selection (Zhang et al., CVPR 2020, arXiv 1912.02424).

The idea: detectors differ mostly in which anchors they call positive. So let the statistics of each
object decide: the threshold is mean plus standard deviation of the IoUs of its nearest anchors.

    paper                                              here
    section 3.2 RetinaNet with FCOS's improvements     CenternessHead (fcos.py), atss_losses
    section 4.1, Algorithm 1 adaptive selection        ATSS.assign
    section 4 one square anchor of 8 strides           ATSS.anchor_sizes

Letters and boxes as in retinanet.py.

Differences from the paper: those of retinanet.py, except 3. Anchors are centered on the top left
corners of cells, and centerness is that of the anchor's center (code).
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from boxes import box_iou
from heads.anchors import BACKGROUND
from heads.fcos import (CenternessHead, centerness_targets, distances_to_sides,
                        sum_of_centerness)
from heads.retinanet import GIOU_WEIGHT, count_positives, giou_losses
from matcher import focal_loss

CANDIDATES = 9      # anchors of each level that may become positive for an object
INSIDE = 0.01       # pixels by which a positive anchor's center lies inside its object


class ATSS(CenternessHead):
    """RetinaNet with one anchor a cell, adaptive assignment, and a centerness for each anchor."""

    anchor_sizes = ((8.0, 8.0),)

    @staticmethod
    @torch.no_grad()
    def assign(anchors: Tensor, counts: list[int], boxes: Tensor) -> Tensor:
        """Algorithm 1; arguments and result as in `RetinaNet.assign`.

        An object's candidates are the 9 anchors of each level nearest to its center. Positive are
        those whose IoU reaches the candidates' mean plus standard deviation and whose center lies
        in the object. An anchor that is positive for several objects is assigned to the one with
        which it has the highest IoU."""
        if not len(boxes):
            return torch.full(anchors.shape[:1], BACKGROUND, device=anchors.device)
        iou = box_iou(anchors, boxes)[0]                                           # (A, n)
        anchor_centers = (anchors[:, :2] + anchors[:, 2:]) / 2                     # (A, 2)
        object_centers = (boxes[:, :2] + boxes[:, 2:]) / 2                         # (n, 2)
        distance = (anchor_centers[:, None] - object_centers).square().sum(-1).sqrt()   # (A, n)

        # lines 3-6: candidates of each object, c of them
        candidates = []
        start = 0
        for level in distance.split(counts):
            nearest = level.topk(min(CANDIDATES, len(level)), 0, largest=False).indices
            candidates.append(nearest + start)
            start += len(level)
        candidates = torch.cat(candidates)                                         # (c, n)

        # lines 7-15: those above the threshold whose center is inside
        overlap = iou.gather(0, candidates)                                        # (c, n)
        threshold = overlap.mean(0) + overlap.std(0)                               # (n,)
        to_sides = distances_to_sides(anchors[candidates], boxes)                  # (c, n, 4)
        positive = (overlap >= threshold) & (to_sides.amin(-1) > INSIDE)           # (c, n)

        # an anchor that several objects claim: the highest IoU wins
        claims = torch.full_like(iou, -1.0)                                        # (A, n)
        claims = claims.scatter(0, candidates, torch.where(positive, overlap, -1.0))
        best, index = claims.max(1)                                                # (A,) each
        return torch.where(best >= 0, index, BACKGROUND)


def atss_counts(labels: Tensor, boxes: Tensor, anchors: Tensor, num_classes: int) -> Tensor:
    """What a batch's losses are divided by: (2,) positive anchors, and the sum of their centerness.

    labels (B, A), boxes and anchors (B, A, 4). On several GPUs the authors use the means of both
    over the GPUs, at least 1."""
    total_centerness = sum_of_centerness(labels, boxes, anchors, num_classes)
    positives = count_positives(labels, num_classes)
    return torch.stack((positives.to(total_centerness), total_centerness))


def atss_losses(
    logits: Tensor,
    deltas: Tensor,
    centerness: Tensor,
    labels: Tensor,
    boxes: Tensor,
    weights: Tensor,
    anchors: Tensor,
    counts: Tensor,
    classes: Tensor | None = None,
) -> dict:
    """Focal loss of all anchors, GIoU loss (weighted by true centerness) and cross-entropy of the
    centerness of the positive ones.

    Shapes as in `ATSS.forward` and `RetinaNet.targets`; counts (2,) as in `atss_counts`; classes
    (N,): which have a loss, default: all -> {"cls", "giou", "centerness"}."""
    positives, total_centerness = counts.clamp(min=1)
    cls = focal_loss(logits, labels) * weights[..., None]                          # (B, A, N)
    if classes is not None:
        cls = cls * classes
    positive = (labels < logits.shape[-1]).nonzero(as_tuple=True)
    anchors = anchors[positive]                                                    # (P, 4)
    boxes = boxes[positive]                                                        # (P, 4)
    truth = centerness_targets(anchors, boxes)                                     # (P,)
    giou = giou_losses(deltas[positive], anchors, boxes) * truth                   # (P,)
    bce = F.binary_cross_entropy_with_logits(centerness[positive], truth, reduction="sum")
    return {"cls": cls.sum() / positives,
            "giou": GIOU_WEIGHT * giou.sum() / total_centerness,
            "centerness": bce / positives}
