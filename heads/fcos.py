"""FCOS: Fully Convolutional One-Stage Object Detection (Tian et al., ICCV 2019, arXiv 1904.01355).

The idea: no anchors. Every point of a feature map inside an object predicts its distances to the
four sides of the box, and how central it is.

    paper                                              here
    section 3.1, Eq. 1 distances to the sides          FCOS.decode
    section 3.1 the smallest of several objects        FCOS.assign
    section 3.1, Eq. 2 losses                          fcos_losses
    section 3.2 a level for each range of sizes        FCOS.assign, size_ranges
    section 3.3, Eq. 3 centerness                      CenternessHead, centerness_targets

Letters as in retinanet.py. Where RetinaNet has an anchor, FCOS has a point. It is stored as a
square box around the point, POINT_SIZE strides wide, of which Co-DETR makes a query (its Table 1).
Predicted distances are in strides.

Differences from the paper
 1. Those of retinanet.py, except 3.
 2. Centerness is predicted by the box branch and weights the GIoU loss, and only points near an
    object's center are positive (the authors' later improvements).
 3. The ranges of sizes are multiples of the strides, so that they exist for any pyramid, not only
    for strides 8 to 128.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxes import box_area, paired_giou
from heads.anchors import (BACKGROUND, Objects, Pyramid, by_anchor, grid_anchors,
                           init_convolutions)
from heads.retinanet import GIOU_WEIGHT, RetinaNet
from matcher import focal_loss

POINT_SIZE = 8.0         # strides: width and height of the box that stands for a point
RADIUS = 1.5             # strides: how far from an object's center a point may be positive


class CenternessHead(RetinaNet):
    """RetinaNet with one anchor a cell and its centerness, which multiplies the probabilities.

    FCOS and ATSS inherit from it."""

    def __init__(self, dim: int, num_classes: int, levels: int):
        super().__init__(dim, num_classes, levels)
        self.centerness = nn.Conv2d(dim, 1, 3, padding=1)
        init_convolutions(self.centerness)

    def predict(self, class_features: Tensor, box_features: Tensor, scale: Tensor) -> dict:
        """As in RetinaNet, and the logits `centerness` (B, H W)."""
        outputs = super().predict(class_features, box_features, scale)
        outputs["centerness"] = by_anchor(self.centerness(box_features), 1)[..., 0]
        return outputs

    def score_factor(self, outputs: dict) -> Tensor:
        """The predicted centerness (B, A, 1)."""
        return outputs["centerness"].sigmoid()[..., None]                          # (B, A, 1)


class FCOS(CenternessHead):
    """Class logits, distances to the sides, and a centerness of each point of `levels` maps."""

    anchor_sizes = ((POINT_SIZE, POINT_SIZE),)

    def predict(self, class_features: Tensor, box_features: Tensor, scale: Tensor) -> dict:
        """As in CenternessHead; `deltas` (B, H W, 4) are the distances, none below 0."""
        outputs = super().predict(class_features, box_features, scale)
        outputs["deltas"] = F.relu(outputs["deltas"])
        return outputs

    def anchors(self, pyramid: Pyramid) -> list[Tensor]:
        """Points at the centers of all cells, as boxes: per level (H W, 4)."""
        levels = zip(grid_anchors(pyramid, self.anchor_sizes), pyramid.strides)
        return [corners + stride / 2 for corners, stride in levels]

    @staticmethod
    def decode(distances: Tensor, anchors: Tensor) -> Tensor:
        """Apply distances (..., 4) to left, top, right, bottom to points, stored as boxes (..., 4)
        -> corner boxes (..., 4)."""
        point = (anchors[..., :2] + anchors[..., 2:]) / 2                          # (..., 2)
        distances = distances * strides_of(anchors)                                # (..., 4)
        return torch.cat((point - distances[..., :2], point + distances[..., 2:]), -1)

    @staticmethod
    @torch.no_grad()
    def assign(anchors: Tensor, counts: list[int], boxes: Tensor) -> Tensor:
        """Sections 3.1 and 3.2; arguments and result as in `RetinaNet.assign`.

        A point is positive for an object if it lies inside it and near its center, and if the
        largest of its four distances is in the level's range. Of several objects, it is assigned to
        the smallest."""
        if not len(boxes):
            return torch.full(anchors.shape[:1], BACKGROUND, device=anchors.device)
        point = ((anchors[:, :2] + anchors[:, 2:]) / 2)[:, None]                   # (A, 1, 2)
        strides = strides_of(anchors)                                              # (A, 1)
        distances = distances_to_sides(anchors[:, None], boxes)                    # (A, n, 4)
        center = (boxes[:, :2] + boxes[:, 2:]) / 2                                 # (n, 2)
        near = (point - center).abs().amax(-1) < RADIUS * strides                  # (A, n)
        inside = distances.amin(-1) > 0                                            # (A, n)
        lower, upper = size_ranges(strides[:, 0], counts)                          # (A,) each
        largest = distances.amax(-1)                                               # (A, n)
        fits = (largest > lower[:, None]) & (largest <= upper[:, None])            # (A, n)
        area = box_area(boxes).expand_as(largest)                                  # (A, n)
        area = torch.where(near & inside & fits, area, torch.inf)
        smallest, index = area.min(1)                                              # (A,) each
        return torch.where(smallest < torch.inf, index, BACKGROUND)

    def targets(self, pyramid: Pyramid, objects: list[Objects]) -> dict:
        """As in RetinaNet, but points of the padding are background, not left out (code)."""
        padded_size = torch.tensor(pyramid.shapes[0]) * pyramid.strides[0]         # (2,)
        objects = [image._replace(valid_size=padded_size) for image in objects]
        return super().targets(pyramid, objects)


def strides_of(anchors: Tensor) -> Tensor:
    """Strides (..., 1) of the levels of anchors (..., 4) that are POINT_SIZE strides wide."""
    return (anchors[..., 2:3] - anchors[..., :1]) / POINT_SIZE


def distances_to_sides(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Pixels from the centers of anchors (..., 4) to left, top, right, bottom of boxes (..., 4)
    -> (..., 4), below 0 where the center lies outside."""
    center = (anchors[..., :2] + anchors[..., 2:]) / 2                             # (..., 2)
    return torch.cat((center - boxes[..., :2], boxes[..., 2:] - center), -1)


def size_ranges(strides: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Section 3.2: the range of a point's largest distance, in pixels: lower and upper limits (A,).

    4 to 8 strides of the point's level; on the finest level from 0, on the coarsest without an
    upper limit. strides (A,), counts: how many points each level has, finest first."""
    lower = 4 * strides
    upper = 8 * strides
    lower[:counts[0]] = 0
    upper[len(upper) - counts[-1]:] = torch.inf
    return lower, upper


def centerness_targets(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Eq. 3 at the centers of anchors (..., 4), in boxes of their objects (..., 4) -> (...)."""
    before, after = distances_to_sides(anchors, boxes).chunk(2, -1)                # (..., 2) each
    ratio = torch.minimum(before, after) / torch.maximum(before, after)
    return ratio.prod(-1).sqrt()


def sum_of_centerness(labels: Tensor, boxes: Tensor, anchors: Tensor, num_classes: int) -> Tensor:
    """Sum over the positive anchors; labels (B, A), boxes and anchors (B, A, 4) -> scalar."""
    centerness = centerness_targets(anchors, boxes)                                # (B, A)
    # without an object the centerness of an anchor has no meaning, and may be NaN
    return torch.where(labels < num_classes, centerness, 0).sum()


def fcos_counts(labels: Tensor, boxes: Tensor, anchors: Tensor, num_classes: int) -> Tensor:
    """What a batch's losses are divided by: (2,) positive points, and the sum of their centerness.

    labels (B, A), boxes and anchors (B, A, 4). On several GPUs the authors use the means of both
    over the GPUs."""
    total_centerness = sum_of_centerness(labels, boxes, anchors, num_classes)
    positives = (labels < num_classes).sum()
    return torch.stack((positives.to(total_centerness), total_centerness))


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
    """Eq. 2: focal loss of all points, GIoU loss (weighted by true centerness) and cross-entropy of
    the centerness of the positive ones.

    Shapes as in `FCOS.forward` and `FCOS.targets`; counts (2,) as in `fcos_counts`
    -> {"cls", "giou", "centerness"}."""
    positives = counts[0].clamp(min=1)
    total_centerness = counts[1].clamp(min=1e-6)
    cls = focal_loss(logits, labels) * weights[..., None]                          # (B, A, N)
    positive = (labels < logits.shape[-1]).nonzero(as_tuple=True)
    anchors = anchors[positive]                                                    # (P, 4)
    boxes = boxes[positive]                                                        # (P, 4)
    truth = centerness_targets(anchors, boxes)                                     # (P,)
    giou = 1 - paired_giou(FCOS.decode(deltas[positive], anchors), boxes)          # (P,)
    bce = F.binary_cross_entropy_with_logits(centerness[positive], truth, reduction="sum")
    return {"cls": cls.sum() / positives,
            "giou": GIOU_WEIGHT * (giou * truth).sum() / total_centerness,
            "centerness": bce / positives}
