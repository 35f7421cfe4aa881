"""What one-to-many detectors share: anchors on a feature pyramid, assignment by IoU, sampling, NMS.

DETR's matching gives each object one prediction. The detectors of this package give it many: every
anchor (a fixed box at a cell of a feature map) that overlaps the object enough learns to predict
it.

    Faster R-CNN (Ren et al. 2015)                       here
    section 3.1.1 anchors                                grid_anchors, valid_anchors
    section 3.1.2 positive, negative and ignored boxes   assign_by_iou
    section 3.1.3 sampling of a mini-batch               sample

B images, C channels, N classes, A anchors of all levels, k anchors of one cell, n objects of one
image. Boxes are corners (x1, y1, x2, y2) in pixels of the network's input. An assignment (A,) holds
the index of an object, BACKGROUND or IGNORED.

Differences from the papers (all from the code of Co-DETR, which is built on mmdetection 2)
 1. Anchors are centered on the top left corners of cells, not on their centers.
 2. Anchors whose cell lies in the padding take no part. Those that cross the border of the image do
    (Faster R-CNN leaves them out in training).
"""
import math
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

from boxes import at_least_float32, box_iou
from heads.regions import nms, soft_nms
from matcher import copy_to_device

IGNORED = -2
BACKGROUND = -1
DELTA_STD = (0.1, 0.1, 0.2, 0.2)   # standard deviations of box deltas; in the RPN they are 1
LOWEST_SCORE = 1e-3                # soft-NMS drops boxes whose score falls below it


def nine_sizes() -> tuple:
    """Widths and heights of nine anchors, in strides (RetinaNet, section 4): three aspect ratios,
    each in three sizes."""
    sizes = []
    for ratio in (0.5, 1, 2):   # height over width
        for octave in (0, 1 / 3, 2 / 3):
            side = 4 * 2 ** octave
            sizes.append((side / ratio ** 0.5, side * ratio ** 0.5))
    return tuple(sizes)


NINE_SIZES = nine_sizes()


class Objects(NamedTuple):
    """Ground truth of one image."""
    labels: Tensor         # (n,)
    boxes: Tensor          # (n, 4) corners, pixels
    valid_size: Tensor     # (2,) height and width, pixels: anchors of cells in it can be assigned


class Pyramid(NamedTuple):
    """Feature maps of a batch, finest level first."""
    maps: list             # [(B, C, H_l, W_l)]
    strides: list          # pixels per cell of each level
    image_sizes: Tensor    # (B, 2) height and width of the images without padding, pixels

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(H_l, W_l) of each level."""
        return [tuple(level.shape[-2:]) for level in self.maps]

    def tokens(self, levels: int | None = None) -> Tensor:
        """The first `levels` maps (default: all) as one sequence, level by level, row by row."""
        return torch.cat([x.flatten(2).transpose(1, 2) for x in self.maps[:levels]], 1)  # (B, S, C)


# ---- anchors

def grid_anchors(pyramid: Pyramid, anchor_sizes: tuple) -> list[Tensor]:
    """Anchors of every level, centered on the top left corners of the cells.

    anchor_sizes: width and height, in strides, of each of the k anchors of a cell
    -> per level (H W k, 4): row by row, the anchors of a cell in the order of `anchor_sizes`."""
    device = pyramid.image_sizes.device
    sizes = copy_to_device(torch.tensor(anchor_sizes), device)                     # (k, 2)
    anchors = []
    for (H, W), stride in zip(pyramid.shapes, pyramid.strides):
        rows = torch.arange(H, device=device)
        columns = torch.arange(W, device=device)
        cells = torch.cartesian_prod(rows, columns).flip(-1)                       # (H W, 2) x, y
        centers = stride * cells[:, None].to(sizes)                                # (H W, 1, 2)
        half = stride * sizes / 2                                                  # (k, 2)
        corners = torch.cat((centers - half, centers + half), -1)                  # (H W, k, 4)
        anchors.append(corners.flatten(0, 1))
    return anchors


def valid_anchors(pyramid: Pyramid, size: list, per_cell: int) -> list[Tensor]:
    """Which anchors have cells that begin inside an image of `size` (height, width), in pixels.

    per_cell: k anchors of a cell -> per level (A_l,), indices into the anchors of all levels."""
    device = pyramid.image_sizes.device
    height, width = size
    in_cell = torch.arange(per_cell, device=device)
    valid = []
    start = 0
    for (H, W), stride in zip(pyramid.shapes, pyramid.strides):
        rows = torch.arange(min(H, math.ceil(height / stride)), device=device)
        columns = torch.arange(min(W, math.ceil(width / stride)), device=device)
        cells = rows[:, None] * W + columns                                        # (rows, columns)
        anchors = cells[..., None] * per_cell + in_cell                            # (..., k)
        valid.append(start + anchors.flatten())
        start += H * W * per_cell
    return valid


# ---- assignment

@torch.no_grad()
def assign_anchors(assign: Callable, pyramid: Pyramid, anchors: list[Tensor],
                   objects: list[Objects]) -> Tensor:
    """Assign the valid anchors of every image; the others are IGNORED.

    assign: the rule of one image, a function of its valid anchors (V, 4), how many of these each
    level has (list), and the boxes of its objects (n, 4) that returns an assignment (V,).
    anchors: per level (A_l, 4) -> assignments (B, A)."""
    H, W = pyramid.shapes[0]
    per_cell = len(anchors[0]) // (H * W)
    anchors = torch.cat(anchors)                                                   # (A, 4)
    shape = (len(objects), len(anchors))
    assigned = torch.full(shape, IGNORED, device=anchors.device)
    sizes = torch.stack([image.valid_size for image in objects]).tolist()
    for b, image in enumerate(objects):
        levels = valid_anchors(pyramid, sizes[b], per_cell)
        counts = [len(level) for level in levels]
        rows = torch.cat(levels)
        assigned[b, rows] = assign(anchors[rows], counts, image.boxes)
    return assigned


@torch.no_grad()
def assign_by_iou(boxes: Tensor, objects: Tensor, positive: float, negative: float,
                  rescue: float | None = None) -> Tensor:
    """Faster R-CNN's rule: boxes (A, 4), objects (n, 4) -> assignment (A,).

    A box's highest IoU with an object decides. From `positive` on, the box is assigned to that
    object; below `negative` it is BACKGROUND; between them it is IGNORED. With `rescue`, an object
    whose own highest IoU is at least `rescue` also gets the boxes that reach this highest IoU,
    whatever they were before; if two objects rescue one box, the later object gets it."""
    if not len(objects) or not len(boxes):
        return torch.full(boxes.shape[:1], BACKGROUND, device=boxes.device)
    iou = box_iou(boxes, objects)[0]                                               # (A, n)
    best, index = iou.max(1)                                                       # (A,) each
    assigned = torch.where(best >= negative, IGNORED, BACKGROUND)
    assigned = torch.where(best >= positive, index, assigned)
    if rescue is None:
        return assigned
    top = iou.amax(0)                                                              # (n,)
    rescued = (iou == top) & (top >= rescue)                                       # (A, n)
    number = torch.arange(1, len(objects) + 1, device=boxes.device)                # (n,) 1 + index
    last = (rescued * number).amax(1)                                              # (A,) 0: none
    return torch.where(last > 0, last - 1, assigned)


def assigned_objects(assigned: Tensor, image: Objects, num_classes: int) -> tuple[Tensor, Tensor]:
    """Labels (A,) and boxes (A, 4) of the objects of an assignment (A,); label N and a box of zeros
    where no object is assigned."""
    labels = torch.cat((image.labels, image.labels.new_full((1,), num_classes)))
    boxes = torch.cat((image.boxes, image.boxes.new_zeros(1, 4)))
    rows = assigned.clamp(min=-1)   # BACKGROUND and IGNORED read the last row
    return labels[rows], boxes[rows]


# ---- sampling
# On the host: assignments are copied once, where each nonzero() on a GPU would wait for it.

def draw(n: int, k: int) -> Tensor:
    """k random numbers below n in ascending order, without repetition; all n if n <= k."""
    return torch.randperm(n)[:k].sort().values


def pick(mask: Tensor, k: int) -> Tensor:
    """Indices of at most k true entries of a host mask (A,), random, in ascending order."""
    rows = mask.nonzero()[:, 0]
    return rows[draw(len(rows), k)]


def sample(assigned: Tensor, number: int, share: float) -> tuple[Tensor, Tensor]:
    """Choose at most number x share positives at random, and negatives that fill up to `number`.

    assigned (A,) -> indices of the positives and of the negatives; all on the host."""
    positives = pick(assigned >= 0, int(number * share))
    negatives = pick(assigned == BACKGROUND, number - len(positives))
    return positives, negatives


# ---- layers and predictions

def by_anchor(x: Tensor, values: int) -> Tensor:
    """Sort a map by anchors: (B, k values, H, W) -> (B, H W k, values), at least float32."""
    return at_least_float32(x).permute(0, 2, 3, 1).reshape(len(x), -1, values)


def conv_norm_relu(dim: int) -> nn.Sequential:
    """A 3x3 convolution, group normalization, ReLU."""
    convolution = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(32, dim), nn.ReLU())


def init_convolutions(head: nn.Module) -> None:
    """Weights from a normal distribution with standard deviation 0.01, biases 0."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def delta_std(deltas: Tensor) -> Tensor:
    """DELTA_STD (4,) as a tensor like `deltas`."""
    return copy_to_device(torch.tensor(DELTA_STD, dtype=deltas.dtype), deltas.device)


def detections_after_nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float,
                         top_k: int, soft: bool = False) -> dict:
    """The best `top_k` of one image's m predictions after NMS within each class, best first.

    boxes (m, 4), scores (m,), labels (m,); threshold: IoU; soft: soft-NMS, which lowers the scores
    of overlapping boxes -> scores (k,), labels (k,), boxes (k, 4), query (k,): indices of the
    predictions.

    Whether a prediction remains depends on better ones only. So NMS runs on the `count` best, and
    again on twice as many until more of them cannot change the result."""
    order = scores.argsort(descending=True)
    if soft:
        order = order[scores[order] >= LOWEST_SCORE]
    count = 2048
    while True:
        best = order[:count]
        if soft:
            rows, final = soft_nms(boxes[best], scores[best], labels[best], threshold, LOWEST_SCORE,
                                   top_k)
            rows = best[rows]
        else:
            rows = best[nms(boxes[best], threshold, labels[best])][:top_k]
            final = scores[rows]
        complete = count >= len(order)
        if not complete and len(rows) == top_k:
            # none that soft-NMS has not seen may score higher than the last detection
            complete = bool(final[-1] >= scores[order[count]])
        if complete:
            return {"scores": final, "labels": labels[rows], "boxes": boxes[rows], "query": rows}
        count *= 2
