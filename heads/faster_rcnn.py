"""Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks (Ren et al.,
NeurIPS 2015, arXiv 1506.01497), on a feature pyramid (FPN, Lin et al., CVPR 2017, arXiv
1612.03144).

The idea: two stages. The region proposal network (RPN) tells objects from background at every
anchor. A second head reads the features of the best proposals and names the class.

    paper                                          here
    section 3.1 region proposal network            RPN
    section 3.1.2, Eq. 1-2 its targets and losses  rpn_targets, rpn_losses
    section 3.3 proposals                          best_proposals
    Fast R-CNN, section 2.3 sampled regions        sample_regions
    section 3.2 training of both stages at once    predict_both_stages
    FPN, section 4.2, Eq. 1 level of a region      pool_regions
    Mask R-CNN, section 3 RoIAlign                 regions.roi_align
    FPN, section 4.2 second stage                  RoIHead, roi_losses
    Fast R-CNN, section 3 detections               classify_proposals, detect_regions

B images, C channels, N classes, A anchors of all levels, k = 9 anchors of a cell, P proposals of an
image, R regions of the batch that the second stage reads. Boxes are corners in pixels.

Differences from the papers (all from the configurations of Co-DETR)
 1. L1 instead of smooth L1 in the RPN; GIoU of the decoded boxes, times 10, in the second stage.
 2. The losses of the RPN have one divisor, the number of sampled anchors, and equal weights.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxes import at_least_float32, box_area, paired_giou
from heads.anchors import (NINE_SIZES, Objects, Pyramid, assign_anchors, assign_by_iou,
                           assigned_objects, conv_norm_relu, delta_std, detections_after_nms,
                           grid_anchors, init_convolutions, sample)
from heads.regions import clip_boxes, decode_deltas, encode_deltas, nms, roi_align
from matcher import copy_to_device, copy_to_host, focal_loss

BINS = 7                    # a region's features are BINS x BINS
# A region reads the level where sqrt(area) is 14 to 28 cells; if there is none, a smaller region
# reads the finest level, a larger one the coarsest.
MIN_CELLS = 14
PRIOR = 0.01                # initial probability of a class, in a head without background
PROPOSAL_NMS = 0.7          # IoU, among the proposals of one level
TEST_NMS = 0.5              # IoU, among the detections of one class
GIOU_WEIGHT = 10.0          # of the second stage


# ---- first stage

class RPN(nn.Module):
    """For each of the nine anchors of a cell: is it an object, and deltas to its box."""

    def __init__(self, dim: int):
        super().__init__()
        per_cell = len(NINE_SIZES)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.cls = nn.Conv2d(dim, per_cell, 1)
        self.reg = nn.Conv2d(dim, 4 * per_cell, 1)
        init_convolutions(self)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps [(B, C, H_l, W_l)] -> logits (B, A) and deltas (B, A, 4), at least float32."""
        hidden = [F.relu(self.conv(x)).flatten(2) for x in maps]                   # [(B, C, H W)]
        hidden = torch.cat(hidden, 2).transpose(1, 2)                              # (B, A / 9, C)
        # a 1x1 convolution is a linear layer of every cell
        logits = F.linear(hidden, self.cls.weight.flatten(1), self.cls.bias)       # (B, A / 9, 9)
        deltas = F.linear(hidden, self.reg.weight.flatten(1), self.reg.bias)       # (B, A / 9, 36)
        deltas = at_least_float32(deltas).unflatten(-1, (-1, 4)).flatten(1, 2)
        return at_least_float32(logits).flatten(1), deltas


def assign_rpn_anchors(anchors: Tensor, counts: list[int], boxes: Tensor) -> Tensor:
    """Section 3.1.2: positive from an IoU of 0.7 on, and an object's best anchor if it reaches 0.3;
    negative below 0.3. Arguments as in `assign_anchors`; the levels' counts are not needed."""
    return assign_by_iou(anchors, boxes, positive=0.7, negative=0.3, rescue=0.3)


@torch.no_grad()
def rpn_targets(pyramid: Pyramid, anchors: list[Tensor], objects: list[Objects],
                number: int) -> dict:
    """Sample `number` anchors of each image, at most half of them positive, and make their targets.

    anchors: per level (A_l, 4) -> `sampled` (B, A) bool, `positive` (B, A) bool: the positive ones
    of the sampled, `target_deltas` (B, A, 4): to their objects, zeros for all other anchors."""
    assigned = assign_anchors(assign_rpn_anchors, pyramid, anchors, objects)       # (B, A)
    anchors = torch.cat(anchors)                                                   # (A, 4)
    on_host = assigned.cpu()
    sampled = torch.zeros(on_host.shape, dtype=torch.bool)
    positive = torch.zeros(on_host.shape, dtype=torch.bool)
    target_deltas = anchors.new_zeros(*assigned.shape, 4)
    for b, image in enumerate(objects):
        positives, negatives = sample(on_host[b], number, 0.5)
        sampled[b, positives] = True
        sampled[b, negatives] = True
        positive[b, positives] = True
        rows = copy_to_device(positives, anchors.device)
        boxes = image.boxes[assigned[b, rows]]
        target_deltas[b, rows] = encode_deltas(boxes, anchors[rows])
    return {"sampled": copy_to_device(sampled, anchors.device),
            "positive": copy_to_device(positive, anchors.device),
            "target_deltas": target_deltas}


def rpn_losses(logits: Tensor, deltas: Tensor, sampled: Tensor, positive: Tensor,
               target_deltas: Tensor) -> dict:
    """Eq. 1: cross-entropy of the sampled anchors, L1 of the positive ones -> {"cls", "l1"}.

    Both are divided by the number of samples of this batch, where an image counts with at least one
    positive and one negative (code). Shapes as in `RPN.forward` and `rpn_targets`."""
    positives = positive.sum(1).clamp(min=1)                                       # (B,)
    negatives = (sampled & ~positive).sum(1).clamp(min=1)                          # (B,)
    count = (positives + negatives).sum()
    truth = positive.to(logits)
    cls = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")      # (B, A)
    l1 = (deltas - target_deltas).abs().sum(-1)                                    # (B, A)
    cls = (cls * sampled).sum() / count
    l1 = (l1 * positive).sum() / count
    return {"cls": cls, "l1": l1}


@torch.no_grad()
def best_proposals(
    logits: Tensor,
    deltas: Tensor,
    anchors: list[Tensor],
    image_sizes: Tensor,
    pre_nms: int,
    num_proposals: int,
    threshold: float = PROPOSAL_NMS,
) -> list[Tensor]:
    """The RPN's best boxes: of each level the `pre_nms` best, then NMS within the level, then the
    `num_proposals` best of all levels.

    logits (B, A), deltas (B, A, 4), anchors: per level (A_l, 4), image_sizes (B, 2), threshold: IoU
    -> per image (P, 4), clipped to the image, best first."""
    counts = [len(level) for level in anchors]
    levels = zip(logits.split(counts, 1), deltas.split(counts, 1), anchors)
    scores, boxes = [], []
    for score, delta, anchor in levels:
        score, best = score.topk(min(pre_nms, len(anchor)))                        # (B, p)
        delta = delta.gather(1, best[..., None].expand(-1, -1, 4))                 # (B, p, 4)
        box = clip_boxes(decode_deltas(delta, anchor[best]), image_sizes[:, None])
        not_empty = (box[..., 2:] > box[..., :2]).all(-1)                          # (B, p)
        remains = nms(box, threshold, usable=not_empty)                            # (B, p)
        scores.append(score.masked_fill(~remains, -torch.inf))
        boxes.append(box)
    scores = torch.cat(scores, 1)
    boxes = torch.cat(boxes, 1)
    scores, best = scores.topk(min(num_proposals, scores.shape[1]))                # (B, P)
    proposals = []
    for b, rows in enumerate(best):
        remains = scores[b] > -torch.inf
        proposals.append(boxes[b, rows[remains]])
    return proposals


# ---- second stage

def sample_regions(proposals: list[Tensor], objects: list[Objects], number: int,
                   num_classes: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sample `number` regions of each image to learn from, at most a quarter of them positive.

    They are chosen among the boxes of the objects themselves and the proposals (P, 4); positive is
    an IoU of 0.5 or more -> per image r boxes (r, 4), positives first, their labels (r,), and the
    boxes of their objects (r, 4)."""
    all_assigned = []
    for boxes, image in zip(proposals, objects):
        own = torch.arange(len(image.boxes), device=boxes.device)
        assigned = assign_by_iou(boxes, image.boxes, positive=0.5, negative=0.5)
        all_assigned.append(torch.cat((own, assigned)))

    samples = []
    on_host = copy_to_host(all_assigned)
    for i, (boxes, image) in enumerate(zip(proposals, objects)):
        rows = torch.cat(sample(on_host[i], number, 0.25))
        rows = copy_to_device(rows, boxes.device)
        boxes = torch.cat((image.boxes, boxes))[rows]
        labels, targets = assigned_objects(all_assigned[i][rows], image, num_classes)
        samples.append((boxes, labels, targets))
    return samples


def pool_regions(pyramid: Pyramid, rois: Tensor, counts: list[int]) -> Tensor:
    """RoIAlign of regions (R, 4), image by image, of which each has `counts` -> (R, 7, 7, C).

    FPN, Eq. 1: a region with twice the side length reads the next coarser level. Only the RPN reads
    the coarsest level of the pyramid."""
    levels = len(pyramid.maps) - 1
    cells = box_area(rois).sqrt() / pyramid.strides[0]                             # (R,)
    doublings = (cells / MIN_CELLS + 1e-6).log2().floor()
    level = doublings.clamp(0, levels - 1).long()                                  # (R,)
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    image = copy_to_device(image, rois.device)                                     # (R,)
    tokens = at_least_float32(pyramid.tokens(levels))                              # (B, S, C)
    shapes = pyramid.shapes[:levels]
    strides = pyramid.strides[:levels]
    return roi_align(tokens, shapes, strides, rois, image, level, BINS)


class RoIHead(nn.Module):
    """Class and box deltas of a region from its features.

    Without `convs`: two hidden layers, and one box per class. With `convs` convolutions: one hidden
    layer, and one box for all classes, whose deltas have half the standard deviation. With
    `sigmoid`, classes have probabilities of their own, and there is no background."""

    def __init__(self, dim: int, hidden: int, num_classes: int, convs: int = 0,
                 sigmoid: bool = False):
        super().__init__()
        self.num_classes = num_classes
        self.convs = nn.Sequential(*(conv_norm_relu(dim) for _ in range(convs)))
        self.fc1 = nn.Linear(BINS ** 2 * dim, hidden)
        self.fc2 = nn.Identity() if convs else nn.Linear(hidden, hidden)
        self.cls = nn.Linear(hidden, num_classes if sigmoid else num_classes + 1)
        self.reg = nn.Linear(hidden, 4 if convs else 4 * num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls.weight, std=0.01)
        nn.init.normal_(self.reg.weight, std=0.001)
        if sigmoid:
            nn.init.constant_(self.cls.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(R, 7, 7, C) -> logits (R, N + 1), background last (with `sigmoid` (R, N)), and deltas
        (R, N, 4), at least float32."""
        x = self.convs(pooled.permute(0, 3, 1, 2)).flatten(1)                      # (R, C 49)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        logits = at_least_float32(self.cls(x))
        deltas = at_least_float32(self.reg(x)).unflatten(1, (-1, 4))               # (R, 1 or N, 4)
        if len(self.convs):
            deltas = (deltas / 2).expand(-1, self.num_classes, -1)
        return logits, deltas


def class_probabilities(logits: Tensor, num_classes: int) -> Tensor:
    """Logits (P, N + 1), background last, or (P, N) without it -> probabilities (P, N)."""
    if logits.shape[1] == num_classes:
        return logits.sigmoid()
    return logits.softmax(-1)[:, :-1]


def roi_losses(
    logits: Tensor,
    deltas: Tensor,
    rois: Tensor,
    labels: Tensor,
    boxes: Tensor,
    classes: Tensor | None = None,
) -> dict:
    """Cross-entropy of all regions; 1 - GIoU of the positive ones, of the box of their true class.

    Both are divided by the number of regions of this batch (code). Without a background class it is
    the focal loss of `classes` (N,), default: all, divided by the number of positives. rois (R, 4):
    the regions, labels (R,), N for background, boxes (R, 4): of their objects; the others as in
    `RoIHead.forward` -> {"cls", "giou"}."""
    count = max(1, len(labels))
    rows = (labels < deltas.shape[1]).nonzero()[:, 0]
    if logits.shape[1] > deltas.shape[1]:
        cls = F.cross_entropy(logits, labels, reduction="sum") / count
    else:
        focal = focal_loss(logits, labels)                                         # (R, N)
        focal = focal if classes is None else focal * classes
        cls = focal.sum() / max(1, len(rows))
    std = delta_std(deltas)
    predicted = decode_deltas(deltas[rows, labels[rows]], rois[rows], std)
    giou = (1 - paired_giou(predicted, boxes[rows])).sum()
    return {"cls": cls, "giou": GIOU_WEIGHT * giou / count}


def predict_both_stages(
    rpn: RPN,
    roi: RoIHead,
    pyramid: Pyramid,
    objects: list[Objects],
    rpn_samples: int,
    pre_nms: int,
    num_proposals: int,
    roi_samples: int,
) -> tuple[dict, dict, Tensor, list[int]]:
    """Predictions of both stages with their targets, in training.

    -> arguments of `rpn_losses`, arguments of `roi_losses`, features of the sampled regions (R, 7,
    7, C), and how many regions each image has."""
    logits, deltas = rpn(pyramid.maps)                                             # (B, A, ...)
    anchors = grid_anchors(pyramid, NINE_SIZES)
    first = {"logits": logits, "deltas": deltas}
    first |= rpn_targets(pyramid, anchors, objects, rpn_samples)

    proposals = best_proposals(logits, deltas, anchors, pyramid.image_sizes, pre_nms,
                               num_proposals)
    samples = sample_regions(proposals, objects, roi_samples, roi.num_classes)
    counts = [len(boxes) for boxes, _, _ in samples]
    rois, labels, boxes = (torch.cat(parts) for parts in zip(*samples))            # (R, ...)
    pooled = pool_regions(pyramid, rois, counts)                                   # (R, 7, 7, C)
    logits, deltas = roi(pooled)
    second = {"logits": logits, "deltas": deltas, "rois": rois, "labels": labels, "boxes": boxes}
    return first, second, pooled, counts


# ---- detections

def classify_proposals(
    rpn: RPN,
    roi: RoIHead,
    pyramid: Pyramid,
    pre_nms: int,
    num_proposals: int,
    threshold: float,
) -> tuple:
    """Predictions of both stages at test time: the second reads all proposals.

    -> per image logits (P, N + 1), deltas (P, N, 4), boxes of the proposals (P, 4)."""
    logits, deltas = rpn(pyramid.maps)
    anchors = grid_anchors(pyramid, NINE_SIZES)
    proposals = best_proposals(logits, deltas, anchors, pyramid.image_sizes, pre_nms,
                               num_proposals, threshold)
    counts = [len(boxes) for boxes in proposals]
    logits, deltas = roi(pool_regions(pyramid, torch.cat(proposals), counts))
    return logits.split(counts), deltas.split(counts), proposals


def detect_regions(
    logits: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    size: Tensor,
    top_k: int,
    soft_nms: float = 0.0,
) -> dict:
    """Detections of one image: every class's box of every proposal, then NMS within each class.

    logits (P, N + 1 or N), deltas (P, N, 4), proposals (P, 4), size (2,): height and width;
    soft_nms: IoU threshold of soft-NMS, 0: NMS at TEST_NMS -> as `detections_after_nms`."""
    scores = class_probabilities(logits, deltas.shape[1])                          # (P, N)
    std = delta_std(deltas)
    boxes = decode_deltas(deltas, proposals[:, None], std)                         # (P, N, 4)
    boxes = clip_boxes(boxes, size).flatten(0, 1)                                  # (P N, 4)
    labels = torch.arange(scores.shape[1], device=scores.device)
    labels = labels.expand_as(scores).flatten()                                    # (P N,)
    threshold = soft_nms or TEST_NMS
    return detections_after_nms(boxes, scores.flatten(), labels, threshold, top_k, soft_nms > 0)
