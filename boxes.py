"""Box formats, IoU, generalized IoU and the inverse sigmoid, in plain PyTorch.

No local imports: copy this file alone.

    source                                                       here
    IoU                                                          paired_iou, box_iou
    generalized IoU (Rezatofighi et al. 2019, Algorithm 1)       paired_giou, generalized_box_iou

Boxes are `(cx, cy, w, h)` inside the models. They are `xyxy` corners, (x1, y1, x2, y2), wherever a
name or a docstring says so. Functions keep the device and the dtype of their input, with one
exception: areas and IoU of float16 and bfloat16 boxes are computed and returned in float32, because
the area of a box in pixels does not fit into float16.
"""
import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Convert float16 and bfloat16 to float32; leave every other dtype alone."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert center and size (..., 4) to corners (..., 4), in the same unit."""
    cx, cy, w, h = boxes.unbind(-1)
    half_w = w / 2
    half_h = h / 2
    x1 = cx - half_w
    y1 = cy - half_h
    x2 = cx + half_w
    y2 = cy + half_h
    return torch.stack((x1, y1, x2, y2), -1)                                       # (..., 4)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert corners (..., 4) to center and size (..., 4), in the same unit."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    cx = (x1 + x2) / 2
    cy = (y1 + y2) / 2
    w = x2 - x1
    h = y2 - y1
    return torch.stack((cx, cy, w, h), -1)                                         # (..., 4)


def box_area(xyxy: Tensor) -> Tensor:
    """Area (...) of corner boxes (..., 4), at least float32."""
    x1, y1, x2, y2 = at_least_float32(xyxy).unbind(-1)
    return (x2 - x1) * (y2 - y1)


def paired_iou(a: Tensor, b: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """IoU and union (...) of corner boxes (..., 4) that broadcast, at least float32. `eps` is added
    to the union in the denominator (0 in Deformable DETR, 1e-6 in DINO)."""
    a = at_least_float32(a)
    b = at_least_float32(b)
    top_left = torch.maximum(a[..., :2], b[..., :2])                               # (..., 2)
    bottom_right = torch.minimum(a[..., 2:], b[..., 2:])                           # (..., 2)
    overlap = (bottom_right - top_left).clamp(min=0)                               # (..., 2)
    w, h = overlap.unbind(-1)
    intersection = w * h                                                           # (...)
    union = box_area(a) + box_area(b) - intersection                               # (...)
    return intersection / (union + eps), union


def paired_giou(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """Generalized IoU (...) of corner boxes (..., 4) that broadcast, at least float32: IoU minus
    the empty fraction of the smallest box that encloses both. `eps` as in `paired_iou`, for both
    denominators."""
    a = at_least_float32(a)
    b = at_least_float32(b)
    iou, union = paired_iou(a, b, eps)
    top_left = torch.minimum(a[..., :2], b[..., :2])                               # (..., 2)
    bottom_right = torch.maximum(a[..., 2:], b[..., 2:])                           # (..., 2)
    enclosing = (bottom_right - top_left).clamp(min=0)                             # (..., 2)
    w, h = enclosing.unbind(-1)
    area = w * h                                                                   # (...)
    empty = area - union
    return iou - empty / (area + eps)


def box_iou(a: Tensor, b: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """IoU and union (..., N, M) of all pairs of corner boxes a (..., N, 4) and b (..., M, 4)."""
    rows = a[..., :, None, :]                                                      # (..., N, 1, 4)
    columns = b[..., None, :, :]                                                   # (..., 1, M, 4)
    return paired_iou(rows, columns, eps)


def generalized_box_iou(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """Generalized IoU (..., N, M) of all pairs of corner boxes a (..., N, 4), b (..., M, 4)."""
    rows = a[..., :, None, :]                                                      # (..., N, 1, 4)
    columns = b[..., None, :, :]                                                   # (..., 1, M, 4)
    return paired_giou(rows, columns, eps)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of x after clamping x to [0, 1]; x and 1 - x stay at least `eps`, which is 1e-5 in
    Deformable DETR and 1e-3 in DINO. Released weights need their own."""
    x = x.clamp(0, 1)
    numerator = x.clamp(min=eps)
    denominator = (1 - x).clamp(min=eps)
    return torch.log(numerator / denominator)
