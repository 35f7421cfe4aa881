"""ATSS: Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training
Sample Selection (Zhang et al., CVPR 2020, arXiv 1912.02424).

The idea: detectors differ mostly in which anchors they call positive. So let the statistics of each
object decide: the threshold is mean plus standard deviation of the IoUs of its nearest anchors.

    paper                                          here
    Algorithm 1 adaptive sample selection          ATSS.assign
    section 4.1 one square anchor of 8 strides     ATSS.sides
    section 3.1 centerness                         fcos.centerness_targets
    section 3.1 losses                             atss_losses

Letters and boxes as in retinanet.py, from which ATSS starts.

Differences from the paper: those of retinanet.py, except 3. Anchors are centered on the corners of
cells, and centerness is that of the anchor's center (code).
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxes import box_iou
from heads.anchors import BACKGROUND, by_anchor, init_convolutions
from heads.fcos import centerness_targets, sum_of_centerness
from heads.retinanet import GIOU_WEIGHT, RetinaNet, count_positives, giou_losses
from matcher import focal_loss

CANDIDATES = 9      # anchors of a level that an object considers
INSIDE = 0.01       # pixels by which a positive anchor's center lies inside its object


class ATSS(RetinaNet):
    """RetinaNet with one anchor a cell, adaptive assignment, and a centerness for each anchor."""

    sides = ((8.0, 8.0),)

    def __init__(self, dim: int, num_classes: int, levels: int):
        super().__init__(dim, num_classes, levels)
        self.centerness = nn.Conv2d(dim, 1, 3, padding=1)
        init_convolutions(self.centerness)

    def predict(self, class_features: Tensor, box_features: Tensor, scale: Tensor) -> dict:
        """As in RetinaNet, and `centerness` logits (B, H W)."""
        outputs = super().predict(class_features, box_features, scale)
        outputs["centerness"] = by_anchor(self.centerness(box_features), 1)[..., 0]
        return outputs

    @staticmethod
    @torch.no_grad()
    def assign(anchors: Tensor, counts: list[int], boxes: Tensor) -> Tensor:
        """Algorithm 1: anchors (A, 4) of levels of `counts` anchors, objects (n, 4) -> assignment.

        An object's candidates are the 9 anchors of each level nearest to its center. Positive are
        those whose IoU reaches the candidates' mean plus standard deviation and whose center lies
        in the object. An anchor that several objects claim goes to the one with the highest IoU."""
        if not len(boxes):
            return torch.full(anchors.shape[:1], BACKGROUND, device=anchors.device)
        iou = box_iou(anchors, boxes)[0]                                           # (A, n)
        anchor_centers = (anchors[:, :2] + anchors[:, 2:]) / 2                     # (A, 2)
        object_centers = (boxes[:, :2] + boxes[:, 2:]) / 2                         # (n, 2)
        distance = (anchor_centers[:, None] - object_centers).square().sum(-1).sqrt()   # (A, n)

        # lines 3-6: candidates of each object, c of them
        candidates, start = [], 0
        for level in distance.split(counts):
            nearest = level.topk(min(CANDIDATES, len(level)), 0, largest=False).indices
            candidates.append(nearest + start)
            start += len(level)
        candidates = torch.cat(candidates)                                         # (c, n)

        # lines 7-15: those above the threshold whose center is inside
        overlap = iou.gather(0, candidates)                                        # (c, n)
        threshold = overlap.mean(0) + overlap.std(0)                               # (n,)
        center = anchor_centers[candidates]                                        # (c, n, 2)
        sides = torch.cat((center - boxes[:, :2], boxes[:, 2:] - center), -1)      # (c, n, 4)
        positive = (overlap >= threshold) & (sides.amin(-1) > INSIDE)

        # section 3.2: the highest IoU wins
        claims = torch.full_like(iou, -1.0)
        claims = claims.scatter(0, candidates, torch.where(positive, overlap, -1.0))
        best, index = claims.max(1)                                                # (A,) each
        return torch.where(best >= 0, index, BACKGROUND)

    def confidence(self, outputs: dict) -> Tensor:
        return outputs["centerness"].sigmoid()[..., None]                          # (B, A, 1)


def atss_counts(labels: Tensor, boxes: Tensor, anchors: Tensor, num_classes: int) -> Tensor:
    """What a batch's losses are divided by: (2,) positive anchors, and the sum of their centerness.

    On several GPUs the authors use the means of both over the GPUs, at least 1."""
    near = sum_of_centerness(labels, boxes, anchors, num_classes)
    return torch.stack((count_positives(labels, num_classes).to(near), near))


def atss_losses(logits: Tensor, deltas: Tensor, centerness: Tensor, labels: Tensor, boxes: Tensor,
                weights: Tensor, anchors: Tensor, counts: Tensor) -> dict:
    """Focal loss of all anchors; GIoU, weighted by centerness, and centerness of the positive ones.

    Shapes as in `ATSS.forward` and `RetinaNet.targets`; counts (2,) as in `atss_counts`
    -> {"cls", "giou", "centerness"}."""
    positives, total_centerness = counts.clamp(min=1)
    cls = focal_loss(logits, labels) * weights[..., None]                          # (B, A, N)
    positive = (labels < logits.shape[-1]).nonzero(as_tuple=True)
    anchors, boxes = anchors[positive], boxes[positive]                            # (P, 4) each
    near = centerness_targets(anchors, boxes)                                      # (P,)
    giou = giou_losses(deltas[positive], anchors, boxes) * near                    # (P,)
    center = F.binary_cross_entropy_with_logits(centerness[positive], near, reduction="sum")
    return {"cls": cls.sum() / positives,
            "giou": GIOU_WEIGHT * giou.sum() / total_centerness,
            "centerness": center / positives}
