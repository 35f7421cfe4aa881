"""Box deltas, NMS, soft-NMS and RoIAlign, which detectors share, in plain PyTorch.

To copy this file, take boxes.py with it.

    source                                                       here
    box deltas (Girshick et al. 2014, R-CNN, Appendix C)         encode_deltas, decode_deltas
    greedy non-maximum suppression                               nms
    linear soft-NMS (Bodla et al. 2017, arXiv 1704.04503)        soft_nms
    RoIAlign (He et al. 2017, Mask R-CNN, section 3)             roi_align

Boxes are corners (x1, y1, x2, y2) here.

Differences from the papers
 1. NMS and RoIAlign have no loop over boxes: they run on all boxes (NMS: of all images) at once.
 2. RoIAlign has the half-pixel correction of later implementations, and reads flattened levels.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from boxes import at_least_float32, box_cxcywh_to_xyxy, box_iou, box_xyxy_to_cxcywh

LOG_CLIP = abs(math.log(16 / 1000))   # largest change of log width or log height by a delta


def encode_deltas(boxes: Tensor, anchors: Tensor, std: Tensor | float = 1.0) -> Tensor:
    """Deltas (dx, dy, dw, dh) that turn corner boxes `anchors` into corner boxes `boxes`.

    boxes and anchors (..., 4) -> (..., 4): shifts of the center in anchor sizes and log ratios of
    the sizes, divided by their standard deviations `std`.
    """
    box = box_xyxy_to_cxcywh(boxes)
    anchor = box_xyxy_to_cxcywh(anchors)
    shift = (box[..., :2] - anchor[..., :2]) / anchor[..., 2:]                     # (..., 2)
    log_ratio = (box[..., 2:] / anchor[..., 2:]).log()                             # (..., 2)
    return torch.cat((shift, log_ratio), -1) / std


def decode_deltas(deltas: Tensor, anchors: Tensor, std: Tensor | float = 1.0) -> Tensor:
    """Apply deltas to corner anchors, both (..., 4) -> corner boxes (..., 4).

    The inverse of `encode_deltas`, except that a size changes by a factor of 62.5 at most.
    """
    deltas = deltas * std
    anchor = box_xyxy_to_cxcywh(anchors)
    center = anchor[..., :2] + deltas[..., :2] * anchor[..., 2:]                   # (..., 2)
    log_ratio = deltas[..., 2:].clamp(-LOG_CLIP, LOG_CLIP)                         # (..., 2)
    size = anchor[..., 2:] * log_ratio.exp()                                       # (..., 2)
    return box_cxcywh_to_xyxy(torch.cat((center, size), -1))


def clip_boxes(xyxy: Tensor, size: Tensor) -> Tensor:
    """Clip corner boxes (..., 4) to images of `size` (..., 2): height and width, broadcast."""
    width_height = size.flip(-1).to(xyxy)                                          # (..., 2)
    limit = torch.cat((width_height, width_height), -1)                            # (..., 4)
    return torch.minimum(xyxy.clamp(min=0), limit)


@torch.no_grad()
def nms(boxes: Tensor, threshold: float, labels: Tensor | None = None,
        usable: Tensor | None = None) -> Tensor:
    """Greedy non-maximum suppression: which corner boxes (..., n, 4) remain, as (..., n) bool.

    The boxes must come sorted by score, best first. A box is suppressed if its IoU with a better
    box that remains exceeds `threshold`; with `labels` (..., n), only boxes of the same label
    suppress each other. Boxes that are not `usable` (..., n) neither remain nor suppress.

    One round applies the rule "a box remains if no better box that remains suppresses it" to all
    boxes at once. Rounds are repeated until nothing changes. After k rounds the first k + 1 boxes
    are final, so after n rounds at most the result is the greedy one; in practice few are enough.
    """
    n = boxes.shape[-2]
    if usable is None:
        usable = torch.ones(boxes.shape[:-1], dtype=torch.bool, device=boxes.device)
    iou = box_iou(boxes, boxes)[0]                                                 # (..., n, n)
    suppresses = (iou > threshold).triu(1)             # (..., n, n): row suppresses column
    if labels is not None:
        suppresses &= labels[..., :, None] == labels[..., None, :]
    suppresses = suppresses.float()
    remains = usable                                                               # (..., n)
    for _ in range(n):
        # how many of the remaining boxes suppress each box
        count = remains[..., None, :].float() @ suppresses                         # (..., 1, n)
        updated = usable & (count[..., 0, :] == 0)                                 # (..., n)
        if torch.equal(updated, remains):
            break
        remains = updated
    return remains


@torch.no_grad()
def soft_nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, min_score: float,
             top_k: int) -> tuple[Tensor, Tensor]:
    """Linear soft-NMS: lower the scores of boxes that overlap a better box of the same label.

    boxes (n, 4) corners, scores (n,), labels (n,) -> indices (k,) of the selected boxes, best
    first, and their lowered scores (k,). The best remaining box is selected. Every other box of its
    label with an IoU of `threshold` or more has its score multiplied by 1 - IoU. This is repeated
    until `top_k` boxes are selected or no score reaches `min_score`. Selected scores never
    increase, so that the first `top_k` are the best of the complete run.
    """
    if not len(boxes):
        return labels[:0], scores
    iou = box_iou(boxes, boxes)[0]                                                 # (n, n)
    same_label = labels[:, None] == labels                                         # (n, n)
    lowers = (iou >= threshold) & same_label                                       # (n, n)
    # On the CPU: hundreds of tiny steps, each of which waits for the one before.
    factors = torch.where(lowers, 1 - iou, 1).cpu()                                # (n, n)
    remaining = scores.cpu().clone()                                               # (n,)
    selected = []
    lowered = []
    while len(selected) < top_k:
        best = int(remaining.argmax())
        if remaining[best] < min_score:
            break
        selected.append(best)
        lowered.append(float(remaining[best]))
        remaining = remaining * factors[best]
        remaining[best] = -1.0
    indices = torch.tensor(selected, dtype=torch.int64, device=boxes.device)       # (k,)
    return indices, torch.tensor(lowered, dtype=scores.dtype, device=boxes.device)


def roi_align(tokens: Tensor, shapes: list, strides: list, rois: Tensor, image: Tensor,
              level: Tensor, bins: int = 7, samples: int = 0) -> Tensor:
    """RoIAlign with the half-pixel correction, from flattened feature levels.

    tokens (B, S, C) holds levels of `shapes` [(H_l, W_l)] and `strides` (pixels per cell), one
    after the other, row by row. rois (R, 4) are corner boxes in pixels; image (R,) and level (R,)
    say which map each of them is cut from -> (R, bins, bins, C).

    A RoI is divided into `bins` x `bins` bins. The value of a bin is the mean of `samples` x
    `samples` bilinear values. With samples 0, there are as many per axis as the bin has cells,
    rounded up, for each RoI and axis. Samples more than a cell outside of the map count as zero.
    Gradients flow into tokens.

    A bilinear value is a weighted sum of four cells. One call of `embedding_bag` gathers the cells
    of all samples of all bins and sums them bin by bin: nothing is padded to the largest RoI.
    """
    B, S, C = tokens.shape
    device = tokens.device
    with torch.no_grad():
        rois = at_least_float32(rois)
        # The map and the box of every RoI, in cells.
        sizes = torch.tensor(shapes).to(device, non_blocking=True)                 # (L, 2) H, W
        H, W = sizes[level].unbind(1)                                              # (R,) each
        level_cells = sizes.prod(1)                                                # (L,)
        level_start = level_cells.cumsum(0) - level_cells                          # (L,)
        map_start = level_start[level] + image * S                                 # (R,)
        strides = torch.tensor(strides, dtype=rois.dtype).to(device, non_blocking=True)
        stride = strides[level]                                                    # (R,)
        boxes = rois / stride[:, None] - 0.5                                       # (R, 4)
        bin_size = (boxes[:, 2:] - boxes[:, :2]) / bins                            # (R, 2) x, y
        if samples:
            per_axis = torch.full_like(bin_size, samples).long()                   # (R, 2)
        else:
            per_axis = bin_size.ceil().long().clamp(min=0)                         # (R, 2)
        per_bin = per_axis.prod(1)                                                 # (R,)

        # The T samples of all bins of all RoIs, in one row. For each of them: its bin (numbered
        # over all RoIs), its place within the bin, its RoI, and the bin's column and row there.
        bin_counts = per_bin.repeat_interleave(bins ** 2)                          # (R bins^2,)
        bin_start = bin_counts.cumsum(0) - bin_counts                              # (R bins^2,)
        bin_index = torch.arange(len(bin_counts), device=device)                   # (R bins^2,)
        bin_index = bin_index.repeat_interleave(bin_counts)                        # (T,)
        place = torch.arange(len(bin_index), device=device) - bin_start[bin_index]           # (T,)
        roi = bin_index // bins ** 2                                               # (T,)
        column = bin_index % bins                                                  # (T,)
        row = bin_index % bins ** 2 // bins                                        # (T,)

        # Positions of the samples, and the four cells around each with their weights.
        def positions(axis: int, column: Tensor, place: Tensor) -> Tensor:
            fraction = (place.to(rois) + 0.5) / per_axis[roi, axis]
            return boxes[roi, axis] + (column + fraction) * bin_size[roi, axis]

        x = positions(0, column, place % per_axis[roi, 0])                         # (T,)
        y = positions(1, row, place // per_axis[roi, 0])                           # (T,)
        x_cells, x_weights = bilinear_cells(x, W[roi])                             # (T, 2) each
        y_cells, y_weights = bilinear_cells(y, H[roi])                             # (T, 2) each
        rows = map_start[roi, None] + y_cells * W[roi, None]                       # (T, 2)
        index = rows[:, :, None] + x_cells[:, None, :]                             # (T, 2, 2)
        weight = y_weights[:, :, None] * x_weights[:, None, :]                     # (T, 2, 2)
        weight = weight / per_bin[roi, None, None]

    if not len(bin_index):
        # no samples; the sum connects the zeros to the graph
        return tokens.new_zeros(len(rois), bins, bins, C) + 0 * tokens.sum()
    pooled = F.embedding_bag(index.flatten(), tokens.reshape(B * S, C), 4 * bin_start, mode="sum",
                             per_sample_weights=weight.flatten().to(tokens))   # (R bins bins, C)
    return pooled.view(len(rois), bins, bins, C)


def bilinear_cells(position: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The two cells around positions (T,) on axes of `length` (T,) cells, and their weights.

    -> cells (T, 2) int64 and weights (T, 2). Positions up to one cell outside move to the border;
    farther ones have weight zero.
    """
    last = (length - 1).to(position)                                               # (T,)
    inside = (position >= -1) & (position <= last + 1)                             # (T,)
    position = torch.minimum(position.clamp(min=0), last)
    low = position.floor()
    high = torch.minimum(low + 1, last)
    fraction = position - low
    cells = torch.stack((low, high), 1).long()
    weights = torch.stack((1 - fraction, fraction), 1) * inside[:, None]
    return cells, weights
