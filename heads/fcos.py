"""FCOS: Fully Convolutional One-Stage Object Detection (Tian et al., ICCV 2019, arXiv 1904.01355).

The idea: no anchors. Every point of a feature map inside an object predicts its distances to the
four sides of the box, and how central it is.

    paper                                              here
    section 3.1, Eq. 1 distances to the sides          FCOS.decode
    section 3.2 a level for each range of sizes        FCOS.assign, size_ranges
    section 3.1 the smallest of several objects        FCOS.assign
    section 3.3, Eq. 3 centerness                      centerness_targets
    section 3.1, Eq. 2 losses                          fcos_losses

Letters as in retinanet.py. A point appears as a square box around it, POINT_SIDE strides wide: what
Co-DETR makes a query of (Table 1). Distances are in strides.

Differences from the paper
 1. Those of retinanet.py, except 3; centerness is predicted with the boxes, GIoU weighs by it, and
    only points near an object's center are positive (the authors' later improvements).
 2. The ranges of sizes follow the strides, so that other pyramids than strides 8 to 128 have them.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxes import box_area, paired_giou
from heads.anchors import (BACKGROUND, Objects, Pyramid, by_anchor, grid_anchors,
                           init_convolutions)
from heads.retinanet import GIOU_WEIGHT, RetinaNet
from matcher import focal_loss

POINT_SIDE = 8.0         # strides
RADIUS = 1.5             # strides: how far from an object's center a point may be positive


class FCOS(RetinaNet):
    """Class logits, distances to the sides, and a centerness for each point of `levels` maps."""

    sides = ((POINT_SIDE, POINT_SIDE),)

    def __init__(self, dim: int, num_classes: int, levels: int):
        super().__init__(dim, num_classes, levels)
        self.centerness = nn.Conv2d(dim, 1, 3, padding=1)
        init_convolutions(self.centerness)

    def predict(self, class_features: Tensor, box_features: Tensor, scale: Tensor) -> dict:
        """As in RetinaNet; `deltas` are distances, not negative. `centerness` logits (B, H W)."""
        outputs = super().predict(class_features, box_features, scale)
        outputs["deltas"] = F.relu(outputs["deltas"])
        outputs["centerness"] = by_anchor(self.centerness(box_features), 1)[..., 0]
        return outputs

    def anchors(self, pyramid: Pyramid) -> list[Tensor]:
        """Boxes around the centers of all cells, per level (H W, 4)."""
        levels = zip(grid_anchors(pyramid, self.sides), pyramid.strides)
        return [corners + stride / 2 for corners, stride in levels]

    @staticmethod
    def decode(distances: Tensor, anchors: Tensor) -> Tensor:
        """Distances (..., 4) to left, top, right, bottom of points (..., 4) -> corners (..., 4)."""
        point = (anchors[..., :2] + anchors[..., 2:]) / 2                          # (..., 2)
        stride = (anchors[..., 2:] - anchors[..., :2]) / POINT_SIDE                # (..., 2)
        top_left = point - distances[..., :2] * stride
        bottom_right = point + distances[..., 2:] * stride
        return torch.cat((top_left, bottom_right), -1)

    @staticmethod
    @torch.no_grad()
    def assign(anchors: Tensor, counts: list[int], boxes: Tensor) -> Tensor:
        """Sections 3.1 and 3.2: points (A, 4) of levels of `counts`, objects (n, 4) -> (A,).

        Positive: near the object's center, inside it, its largest distance in the level's range. Of
        several objects the smallest."""
        if not len(boxes):
            return torch.full(anchors.shape[:1], BACKGROUND, device=anchors.device)
        point = ((anchors[:, :2] + anchors[:, 2:]) / 2)[:, None]                   # (A, 1, 2)
        stride = (anchors[:, 2:] - anchors[:, :2])[:, None] / POINT_SIDE           # (A, 1, 2)
        distances = torch.cat((point - boxes[:, :2], boxes[:, 2:] - point), -1)    # (A, n, 4)
        center = (boxes[:, :2] + boxes[:, 2:]) / 2                                 # (n, 2)
        near = ((point - center).abs() < RADIUS * stride).all(-1)                  # (A, n)
        inside = distances.amin(-1) > 0                                            # (A, n)
        lower, upper = size_ranges(stride[:, 0, 0], counts)                        # (A,) each
        largest = distances.amax(-1)                                               # (A, n)
        fits = (largest > lower[:, None]) & (largest <= upper[:, None])
        area = box_area(boxes).expand_as(largest)                                  # (A, n)
        area = torch.where(near & inside & fits, area, torch.inf)
        smallest, index = area.min(1)                                              # (A,) each
        return torch.where(smallest < torch.inf, index, BACKGROUND)

    def targets(self, pyramid: Pyramid, objects: list[Objects]) -> dict:
        """As in RetinaNet, but points of the padding are background (code)."""
        everywhere = torch.tensor(pyramid.shapes[0]) * pyramid.strides[0]          # (2,)
        return super().targets(pyramid, [image._replace(size=everywhere) for image in objects])

    def confidence(self, outputs: dict) -> Tensor:
        return outputs["centerness"].sigmoid()[..., None]                          # (B, A, 1)


def size_ranges(strides: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Limits (A,) of the largest distance, pixels, from strides (A,) of levels of `counts` points.

    4 to 8 strides; on the finest level from 0, on the coarsest without a limit."""
    lower, upper = 4 * strides, 8 * strides
    lower[:counts[0]] = 0
    upper[len(upper) - counts[-1]:] = torch.inf
    return lower, upper


def centerness_targets(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Eq. 3 at the centers of anchors (..., 4) inside their objects (..., 4) -> (...)."""
    center = (anchors[..., :2] + anchors[..., 2:]) / 2                             # (..., 2)
    before = center - boxes[..., :2]                                               # left, top
    after = boxes[..., 2:] - center                                                # right, bottom
    ratio = torch.minimum(before, after) / torch.maximum(before, after)
    return ratio.prod(-1).sqrt()


def sum_of_centerness(labels: Tensor, boxes: Tensor, anchors: Tensor, num_classes: int) -> Tensor:
    """Over the positive anchors; labels (B, A), boxes and anchors (B, A, 4) -> scalar."""
    near = centerness_targets(anchors, boxes)                                      # (B, A)
    return torch.where(labels < num_classes, near, 0).sum()   # background has no object


def fcos_counts(labels: Tensor, boxes: Tensor, anchors: Tensor, num_classes: int) -> Tensor:
    """What a batch's losses are divided by: (2,) positive points, and the sum of their centerness.

    On several GPUs the authors use the means of both over the GPUs."""
    near = sum_of_centerness(labels, boxes, anchors, num_classes)
    return torch.stack(((labels < num_classes).sum().to(near), near))


def fcos_losses(
    logits: Tensor,
    deltas: Tensor,
    centerness: Tensor,
    labels: Tensor,
    boxes: Tensor,
    weights: Tensor,
    anchors: Tensor,
    counts: Tensor,
) -> dict:
    """Focal loss of all points; GIoU, weighted by centerness, and centerness of the positive ones.

    Shapes as in `FCOS.forward` and `FCOS.targets`; counts (2,) as in `fcos_counts`
    -> {"cls", "giou", "centerness"}."""
    positives = counts[0].clamp(min=1)
    total_centerness = counts[1].clamp(min=1e-6)
    cls = focal_loss(logits, labels) * weights[..., None]                          # (B, A, N)
    positive = (labels < logits.shape[-1]).nonzero(as_tuple=True)
    anchors, boxes = anchors[positive], boxes[positive]                            # (P, 4) each
    near = centerness_targets(anchors, boxes)                                      # (P,)
    giou = 1 - paired_giou(FCOS.decode(deltas[positive], anchors), boxes)          # (P,)
    center = F.binary_cross_entropy_with_logits(centerness[positive], near, reduction="sum")
    return {"cls": cls.sum() / positives,
            "giou": GIOU_WEIGHT * (giou * near).sum() / total_centerness,
            "centerness": center / positives}
