"""GFL: Generalized Focal Loss (Li et al., NeurIPS 2020, arXiv 2006.04388).

The idea: one number says both how likely a class is and how well its box fits. And the distance to
a side of the box is a distribution, of which the mean is the prediction.

    paper                                          here
    section 3.1, Eq. 2 quality focal loss          quality_focal_loss
    section 3.1, Eq. 5 mean of a distribution      mean_distances, GFL.decode
    section 3.1, Eq. 6 distribution focal loss     distribution_focal_loss
    section 3.3 losses                             gfl_losses

Letters as in retinanet.py. Distances are in strides, as in FCOS; anchors and assignment are those
of ATSS.

Differences from the paper: those of atss.py. In the losses of boxes and distances, a positive has
its highest class probability as weight (code).
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxes import box_cxcywh_to_xyxy, paired_giou, paired_iou
from heads.anchors import by_anchor
from heads.atss import ATSS
from heads.fcos import FCOS, distances_to_sides, strides_of
from heads.retinanet import GIOU_WEIGHT, RetinaNet, count_positives

REG_MAX = 16           # strides, the largest distance; its distribution has REG_MAX + 1 bins
DFL_WEIGHT = 0.25


class GFL(RetinaNet):
    """Class logits and four distributions of distances for each anchor of `levels` maps."""

    anchor_sizes = ATSS.anchor_sizes
    assign = staticmethod(ATSS.assign)

    def __init__(self, dim: int, num_classes: int, levels: int):
        super().__init__(dim, num_classes, levels)
        self.reg = nn.Conv2d(dim, 4 * (REG_MAX + 1), 3, padding=1)
        nn.init.normal_(self.reg.weight, std=0.01)
        nn.init.zeros_(self.reg.bias)

    def predict(self, class_features: Tensor, box_features: Tensor, scale: Tensor) -> dict:
        """As in RetinaNet; `deltas` (B, H W, 4 (REG_MAX + 1)) are logits of the distances."""
        logits = by_anchor(self.cls(class_features), self.num_classes)             # (B, H W, N)
        deltas = by_anchor(self.reg(box_features), 4 * (REG_MAX + 1)) * scale
        return {"logits": logits, "deltas": deltas}

    @staticmethod
    def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
        """Logits of distances (..., 4 (REG_MAX + 1)), anchors (..., 4) -> boxes (..., 4)."""
        return FCOS.decode(mean_distances(deltas), anchors)


def mean_distances(deltas: Tensor) -> Tensor:
    """Eq. 5: logits (..., 4 (REG_MAX + 1)) -> distances to left, top, right, bottom (..., 4)."""
    bins = torch.arange(REG_MAX + 1, device=deltas.device, dtype=deltas.dtype)     # (REG_MAX + 1,)
    return deltas.unflatten(-1, (4, -1)).softmax(-1) @ bins


def quality_focal_loss(logits: Tensor, labels: Tensor, boxes: Tensor,
                       target_boxes: Tensor) -> Tensor:
    """Quality focal loss (Eq. 2): a positive's target is the IoU of its box.

    logits (..., N), labels (...) N for background, boxes and target_boxes (..., 4) cx, cy, w, h
    -> loss per query and class (..., N)."""
    iou, _ = paired_iou(box_cxcywh_to_xyxy(boxes.detach()), box_cxcywh_to_xyxy(target_boxes))
    return quality_loss(logits, labels, iou.nan_to_num())   # NaN: two boxes without area


def quality_loss(logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
    """Eq. 2 for targets `quality` (...) in [0, 1]; other shapes as in `quality_focal_loss`."""
    classes = torch.arange(logits.shape[-1], device=logits.device)                 # (N,)
    one_hot = (labels[..., None] == classes).to(logits.dtype)                      # (..., N)
    quality = one_hot * quality[..., None]                                         # (..., N)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return (quality - logits.sigmoid()) ** 2 * cross_entropy


def distribution_focal_loss(deltas: Tensor, distances: Tensor) -> Tensor:
    """Eq. 6: the two bins next to a true distance share its probability.

    deltas (P, 4 (REG_MAX + 1)): logits; true distances (P, 4) in strides -> mean of the four sides
    (P,)."""
    log_p = deltas.unflatten(-1, (4, -1)).log_softmax(-1)                          # (P, 4, 17)
    distances = distances.clamp(0, REG_MAX - 0.1)
    left = distances.long()                                                        # (P, 4)
    share = distances - left
    lower = log_p.gather(-1, left[..., None])[..., 0]                              # (P, 4)
    upper = log_p.gather(-1, left[..., None] + 1)[..., 0]
    loss = -((1 - share) * lower + share * upper)                                  # (P, 4)
    return loss.mean(-1)


def gfl_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """What a batch's losses are divided by: (2,) positive anchors, and the sum of their weights.

    logits (B, A, N), labels (B, A). On several GPUs the authors use the means over the GPUs, at
    least 1."""
    N = logits.shape[-1]
    weights = logits.detach().sigmoid().amax(-1)                                   # (B, A)
    total = torch.where(labels < N, weights, 0).sum()
    positives = count_positives(labels, N)
    return torch.stack((positives.to(total), total))


def gfl_losses(
    logits: Tensor,
    deltas: Tensor,
    labels: Tensor,
    boxes: Tensor,
    weights: Tensor,
    anchors: Tensor,
    counts: Tensor,
) -> dict:
    """Section 3.3; shapes as in `GFL.predict` and `RetinaNet.targets`, counts (2,) as in
    `gfl_counts` -> {"cls", "giou", "dfl"}."""
    positives, total_weight = counts.clamp(min=1)
    positive = (labels < logits.shape[-1]).nonzero(as_tuple=True)
    anchors = anchors[positive]                                                    # (P, 4)
    boxes = boxes[positive]                                                        # (P, 4)
    deltas = deltas[positive]                                                      # (P, 68)
    predicted = GFL.decode(deltas, anchors)                                        # (P, 4)
    iou, _ = paired_iou(predicted.detach(), boxes)                                 # (P,)
    quality = logits.new_zeros(labels.shape)                                       # (B, A)
    quality[positive] = iou.nan_to_num()
    cls = quality_loss(logits, labels, quality) * weights[..., None]               # (B, A, N)

    confidence = logits.detach().sigmoid().amax(-1)[positive]                      # (P,)
    giou = (1 - paired_giou(predicted, boxes)) * confidence
    distances = distances_to_sides(anchors, boxes) / strides_of(anchors)           # (P, 4)
    dfl = distribution_focal_loss(deltas, distances) * confidence                  # (P,)
    return {"cls": cls.sum() / positives,
            "giou": GIOU_WEIGHT * giou.sum() / total_weight,
            "dfl": DFL_WEIGHT * dfl.sum() / total_weight}
