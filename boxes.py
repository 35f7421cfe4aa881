"""Box formats, overlaps, the inverse sigmoid, NMS and RoIAlign: pure torch, no local imports, copy it alone.

Boxes are `(cx, cy, w, h)` inside the models and `xyxy` corners wherever the name says so. Functions keep the dtype and
device they are given; callers hand them float32 or float64.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size (..., 4) -> corners (..., 4), in the same unit."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), -1)   # (..., 4)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Corners (..., 4) -> centre and size (..., 4), in the same unit."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), -1)   # (..., 4)


def box_area(xyxy: Tensor) -> Tensor:
    """Area (...) of corner boxes (..., 4)."""
    return (xyxy[..., 2] - xyxy[..., 0]) * (xyxy[..., 3] - xyxy[..., 1])


def paired_iou(a: Tensor, b: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """IoU and union (...) of corner boxes (..., 4) that broadcast against each other; `eps` is added to the union in the
    denominator (0 in Deformable DETR, 1e-6 in DINO)."""
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)   # (..., 2)
    intersection = overlap[..., 0] * overlap[..., 1]
    union = box_area(a) + box_area(b) - intersection
    return intersection / (union + eps), union


def paired_giou(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """Generalised IoU (...) of corner boxes (..., 4) that broadcast: IoU minus the empty share of the smallest
    enclosing box (Rezatofighi et al. 2019, Algorithm 1)."""
    iou, union = paired_iou(a, b, eps)
    enclosing = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0)  # (..., 2)
    area = enclosing[..., 0] * enclosing[..., 1]
    return iou - (area - union) / (area + eps)


def box_iou(a: Tensor, b: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """IoU and union (..., N, M) of all pairs of corner boxes a (..., N, 4) and b (..., M, 4)."""
    return paired_iou(a[..., :, None, :], b[..., None, :, :], eps)


def generalized_box_iou(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """Generalised IoU (..., N, M) of all pairs of corner boxes a (..., N, 4) and b (..., M, 4)."""
    return paired_giou(a[..., :, None, :], b[..., None, :, :], eps)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of x after clamping it to [0, 1]; numerator and denominator stay >= eps (1e-5 in Deformable DETR, 1e-3 in
    DINO: the two are not interchangeable with released weights)."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


LOG_CLIP = abs(math.log(16 / 1000))   # largest change of log width or height that a delta can ask for


def encode_deltas(boxes: Tensor, anchors: Tensor, spread: Tensor | float = 1.0) -> Tensor:
    """Corner boxes (..., 4) -> (dx, dy, dw, dh) (..., 4) relative to corner boxes `anchors` (..., 4): shifts in anchor
    sizes and log size ratios (R-CNN, Girshick et al. 2014, Appendix C), divided by `spread`."""
    b, a = box_xyxy_to_cxcywh(boxes), box_xyxy_to_cxcywh(anchors)
    return torch.cat(((b[..., :2] - a[..., :2]) / a[..., 2:], (b[..., 2:] / a[..., 2:]).log()), -1) / spread


def decode_deltas(deltas: Tensor, anchors: Tensor, spread: Tensor | float = 1.0) -> Tensor:
    """The inverse of `encode_deltas`: deltas and corner anchors that broadcast (..., 4) -> corner boxes (..., 4)."""
    deltas, a = deltas * spread, box_xyxy_to_cxcywh(anchors)
    size = a[..., 2:] * deltas[..., 2:].clamp(-LOG_CLIP, LOG_CLIP).exp()           # (..., 2)
    return box_cxcywh_to_xyxy(torch.cat((a[..., :2] + deltas[..., :2] * a[..., 2:], size), -1))


def clip_boxes(xyxy: Tensor, size: Tensor) -> Tensor:
    """Corner boxes (..., 4) cut to images of `size` (..., 2): height and width, which broadcasts."""
    limit = size[..., [1, 0, 1, 0]].to(xyxy)                                       # (..., 4)
    return torch.minimum(xyxy.clamp(min=0), limit)


@torch.no_grad()
def nms(boxes: Tensor, threshold: float, labels: Tensor | None = None, usable: Tensor | None = None) -> Tensor:
    """Greedy non-maximum suppression of corner boxes (..., n, 4), best first -> which are kept, (..., n) bool.

    A box falls if its IoU with a kept, better box (of the same label) exceeds `threshold`. Not a loop over boxes: "kept =
    overlaps no kept better box" is iterated until nothing changes. The first k + 1 boxes are right after k rounds, so the
    only fixed point is the greedy answer; in practice a handful of rounds reach it, for all images at once.
    """
    n = boxes.shape[-2]
    usable = torch.ones(boxes.shape[:-1], dtype=torch.bool, device=boxes.device) if usable is None else usable
    suppresses = (box_iou(boxes, boxes)[0] > threshold).triu(1)                         # (..., n, n): row beats column
    if labels is not None:
        suppresses &= labels[..., :, None] == labels[..., None, :]
    suppresses = suppresses.to(boxes.dtype)
    keep = usable
    for _ in range(n):
        suppressed = (keep[..., None, :].to(boxes.dtype) @ suppresses)[..., 0, :] > 0       # (..., n)
        if torch.equal(keep, usable & ~suppressed):
            break
        keep = usable & ~suppressed
    return keep


@torch.no_grad()
def soft_nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, lowest: float, most: int):
    """Linear soft-NMS (Bodla et al. 2017): the best box left is taken, those of its label that overlap it by `threshold`
    or more lose the overlapped share of their score, those below `lowest` are dropped; until `most` are taken.

    boxes (n, 4) corners, scores (n,), labels (n,) -> indices (k,), best first, and their lowered scores (k,).
    Taken scores never rise, so stopping at `most` gives the best of the whole run.
    """
    if not len(boxes):
        return labels[:0], scores
    iou = box_iou(boxes, boxes)[0]                                                 # (n, n)
    decays = (iou >= threshold) & (labels[:, None] == labels)
    decay = torch.where(decays, 1 - iou, 1).cpu()   # on the host: hundreds of tiny steps, each waiting for the one before
    scores = scores.cpu().clone()
    taken, lowered = [], []
    while len(taken) < most:
        best = int(scores.argmax())
        if scores[best] < lowest:
            break
        taken.append(best)
        lowered.append(float(scores[best]))
        scores = scores * decay[best]
        scores[best] = -1.0
    return (torch.tensor(taken, dtype=torch.int64, device=boxes.device),
            torch.tensor(lowered, dtype=boxes.dtype, device=boxes.device))


def roi_align(tokens: Tensor, shapes: list, strides: list, rois: Tensor, image: Tensor, level: Tensor, bins: int = 7,
              samples: int = 0) -> Tensor:
    """RoIAlign (He et al. 2017, section 3) with the half-pixel correction, from flattened feature levels.

    tokens (B, S, C): levels of `shapes` [(H_l, W_l)] and `strides` (pixels per cell) one after the other, row by row;
    rois (R, 4) corner boxes in pixels, image (R,) and level (R,) say where each looks -> (R, bins, bins, C).
    Every bin is the mean of `samples` x `samples` bilinear values; with 0, as many per side as the bin has cells, rounded
    up, for each RoI and axis on its own. Samples more than a cell outside count as zero. Gradients flow into tokens.

    All corners of all samples are rows of one table, summed bag by bag with their weights: one gather, no padding.
    """
    B, S, C = tokens.shape
    with torch.no_grad():
        table = torch.tensor(shapes, device=tokens.device)                         # (L, 2)
        start = (table.prod(1).cumsum(0) - table.prod(1))[level] + image * S       # (R,) first token of map
        H, W = table[level].unbind(1)                                              # (R,) each
        boxes = rois / torch.tensor(strides, device=tokens.device, dtype=rois.dtype)[level, None] - 0.5    # (R, 4) cells
        size = (boxes[:, 2:] - boxes[:, :2]) / bins                                # (R, 2) cells of a bin, x y
        per_axis = size.ceil().long().clamp(min=0) if not samples else torch.full_like(size, samples).long()
        n = per_axis.prod(1)                                                       # (R,) samples of a bin
        bag = torch.arange(len(rois) * bins ** 2, device=tokens.device).repeat_interleave(n.repeat_interleave(bins ** 2))
        roi, cell = bag // bins ** 2, bag % bins ** 2                              # (samples,) of all bins, in order
        first = (n * bins ** 2).cumsum(0) - n * bins ** 2                          # (R,)
        number = (torch.arange(len(bag), device=tokens.device) - first[roi]) % n[roi]
        corners = []
        for axis, extent, index, within in ((0, W, cell % bins, number % per_axis[roi, 0]),
                                            (1, H, cell // bins, number // per_axis[roi, 0])):
            place = boxes[roi, axis] + (index + (within + 0.5) / per_axis[roi, axis]) * size[roi, axis]
            last = (extent[roi] - 1).to(place)
            inside = ((place >= -1) & (place <= last + 1)).to(place)
            place = torch.minimum(place.clamp(min=0), last)
            low = place.floor()
            far = place - low
            corners.append((((low, inside * (1 - far)), (torch.minimum(low + 1, last), inside * far))))
        index = torch.stack([start[roi] + y.long() * W[roi] + x.long() for y, _ in corners[1] for x, _ in corners[0]], 1)
        weight = torch.stack([v * u for _, v in corners[1] for _, u in corners[0]], 1) / n[roi][:, None]   # (samples, 4)
        offsets = torch.cat((n.new_zeros(1), (4 * n).repeat_interleave(bins ** 2).cumsum(0)[:-1]))
    if not len(index):
        return tokens.new_zeros(len(rois), bins, bins, C) + 0 * tokens.sum()
    pooled = F.embedding_bag(index.flatten(), tokens.reshape(B * S, C), offsets, mode="sum",
                             per_sample_weights=weight.flatten().to(tokens))       # (R bins bins, C)
    return pooled.view(len(rois), bins, bins, C)
