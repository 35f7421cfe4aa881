"""Box formats, overlaps and the inverse sigmoid: pure torch, no local imports, copy it alone.

Boxes are `(cx, cy, w, h)` inside the models and `xyxy` corners wherever the name says so. Functions keep the dtype and
device they are given; callers hand them float32 or float64.
"""
import torch
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
