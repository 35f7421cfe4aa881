"""Masks of regions: sampling, points for the loss, IoU and pasting, in plain PyTorch.

No local imports: copy this file alone. `regions.roi_align` cuts regions out of a map; `paste` puts
them back.

    source                                                       here
    points for the loss (PointRend, Kirillov et al. 2020, 3.1)   uncertain_points
    dice loss (V-Net, Milletari et al. 2016, section 3)          dice_loss
    pasting (Mask R-CNN, He et al. 2017, section 3.1)            paste

n regions of all images together, P points. Maps (n, h, w) cover a box or an image. Points (n, P, 2)
are x and y in [0, 1] of it: (0, 0) is the top left corner, ((j + 0.5) / w, (i + 0.5) / h) the
center of cell (i, j). Boxes named xyxy are corners in [0, 1] of the image.

Differences from the papers
 1. The dice loss squares nothing, and adds 1 to numerator and denominator.
 2. Logits are pasted, not probabilities, and coordinates are not rounded: pasting is the inverse of
    RoIAlign with the half-pixel correction.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

IOU_GRID = 64      # points per side of a box at which a mask is compared with its object
CHUNK = 25         # masks that are pasted at a time; bounds the memory


def grid_points(n: int, height: int, width: int, device) -> Tensor:
    """Centers of height x width cells in each of n boxes, row by row: (n, height width, 2)."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    centers = torch.cartesian_prod(y, x).flip(-1)                        # (height width, 2)
    return centers.expand(n, -1, -1)


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (n, h, w) at points (n, P, 2) -> (n, P). Beyond the centers of the
    outermost cells, values fall to 0."""
    if maps.requires_grad and torch.are_deterministic_algorithms_enabled():
        return gather_maps(maps, points)   # a GPU has no deterministic gradient of grid_sample
    grid = 2 * points[:, None] - 1                                       # (n, 1, P, 2) in [-1, 1]
    values = F.grid_sample(maps[:, None], grid, align_corners=False)     # (n, 1, 1, P)
    return values[:, 0, 0]


def gather_maps(maps: Tensor, points: Tensor) -> Tensor:
    """`sample_maps`, cell by cell: the four cells around each point, with their weights."""
    h, w = maps.shape[1:]
    position = points * points.new_tensor([w, h]) - 0.5                  # (n, P, 2) in cells
    first = position.floor()                                             # (n, P, 2)
    values = 0
    for offset in ((0, 0), (1, 0), (0, 1), (1, 1)):
        cell = first + first.new_tensor(offset)                          # (n, P, 2)
        weight = (1 - (position - cell).abs()).prod(-1)                  # (n, P)
        x, y = cell.unbind(-1)                                           # (n, P) each
        inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)                 # (n, P)
        index = y.clamp(0, h - 1) * w + x.clamp(0, w - 1)                # (n, P)
        values = values + weight * inside * maps.flatten(1).gather(1, index.long())
    return values


@torch.no_grad()
def uncertain_points(logits: Tensor, num_points: int, oversample: float,
                     importance: float) -> Tensor:
    """Random points in the boxes of logits (n, h, w), more of them where a mask is uncertain.

    N = `num_points`, k = `oversample`, beta = `importance`: of k N random candidates, the beta N
    with the logit nearest to 0; the other points are random. Returns (n, N, 2).
    """
    n = len(logits)
    device = logits.device
    num_candidates = round(oversample * num_points)
    num_uncertain = round(importance * num_points)
    candidates = torch.rand(n, num_candidates, 2, device=device)         # (n, k N, 2)
    certainty = sample_maps(logits, candidates).abs()                    # (n, k N)
    index = certainty.topk(num_uncertain, largest=False).indices         # (n, beta N)
    index = index[..., None].expand(-1, -1, 2)                           # (n, beta N, 2)
    uncertain = candidates.gather(1, index)                              # (n, beta N, 2)
    anywhere = torch.rand(n, num_points - num_uncertain, 2, device=device)
    return torch.cat((uncertain, anywhere), 1)


def select_masks(targets: list[dict], objects: list[Tensor]) -> list[Tensor]:
    """The true masks (n, h, w) of some objects, image by image; h and w differ between images.

    targets: per image `masks` (objects, h, w); objects: per image indices (n,). In an image without
    objects, masks are empty, whatever the index.
    """
    selected = []
    for target, index in zip(targets, objects):
        masks = target["masks"]
        if len(masks) == 0:
            masks = masks.new_zeros(1, *masks.shape[1:])
            index = torch.zeros_like(index)
        selected.append(masks[index])
    return selected


@torch.no_grad()
def sample_true_masks(masks: list[Tensor], xyxy: Tensor, points: Tensor) -> Tensor:
    """Values of true masks at points (n, P, 2) of the boxes xyxy (n, 4) -> (n, P) in [0, 1].

    masks: per image (n, h, w), from `select_masks`; they cover the image.
    """
    corner = xyxy[:, None, :2]                                           # (n, 1, 2)
    size = xyxy[:, None, 2:] - corner                                    # (n, 1, 2)
    places = corner + points * size                                      # (n, P, 2) in the image
    places = places.split([len(image_masks) for image_masks in masks])
    values = []
    for image_masks, image_places in zip(masks, places):
        values.append(sample_maps(image_masks.float(), image_places))
    return torch.cat(values)


@torch.no_grad()
def mask_iou(logits: Tensor, masks: list[Tensor], xyxy: Tensor) -> Tensor:
    """IoU (n,) of binary masks, from logits (n, r, r) in boxes xyxy (n, 4), and true masks, given
    as in `sample_true_masks`. The part of an object outside its box counts in the union.

    All areas are fractions of the image, measured at `IOU_GRID`^2 points of the box.
    """
    points = grid_points(len(logits), IOU_GRID, IOU_GRID, logits.device)           # (n, P, 2)
    predicted = (sample_maps(logits, points) > 0).float()                          # (n, P)
    truth = sample_true_masks(masks, xyxy, points)                                 # (n, P)
    box_area = (xyxy[:, 2:] - xyxy[:, :2]).prod(-1)                                # (n,)
    mask_area = predicted.mean(1) * box_area                                       # (n,)
    object_areas = [image_masks.float().mean((1, 2)) for image_masks in masks]
    intersection = (predicted * truth).mean(1) * box_area                          # (n,)
    union = mask_area + torch.cat(object_areas) - intersection                     # (n,)
    return intersection / union.clamp(min=1e-9)


def dice_loss(probability: Tensor, truth: Tensor) -> Tensor:
    """1 - dice coefficient of predicted and true values (n, P) in [0, 1] -> (n,)."""
    overlap = 2 * (probability * truth).sum(1)
    total = probability.sum(1) + truth.sum(1)
    return 1 - (overlap + 1) / (total + 1)


def paste(logits: Tensor, xyxy: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Paste logits (n, h, w) into their boxes on images of this size; xyxy (n, 4) in pixels.

    Returns masks (n, height, width) bool, True where the bilinear value at the center of a pixel is
    above 0, and the mean probability of these pixels (n,), 0 for an empty mask.
    """
    # Bilinear interpolation is one matrix for the rows and one for the columns.
    rows = interpolation_weights(xyxy[:, [1, 3]], logits.shape[1], height)         # (n, height, h)
    columns = interpolation_weights(xyxy[:, [0, 2]], logits.shape[2], width)       # (n, width, w)
    masks = []
    means = []
    for first in range(0, max(1, len(logits)), CHUNK):
        chunk = slice(first, first + CHUNK)
        values = rows[chunk] @ logits[chunk] @ columns[chunk].transpose(1, 2)
        mask = values > 0                                                # (n, height, width)
        total = (values.sigmoid() * mask).sum((1, 2))                    # (n,)
        count = mask.sum((1, 2)).clamp(min=1)                            # (n,)
        masks.append(mask)
        means.append(total / count)
    return torch.cat(masks), torch.cat(means)


def interpolation_weights(limits: Tensor, cells: int, pixels: int) -> Tensor:
    """Weight of each cell in the bilinear value at the center of each pixel, along one axis.

    limits (n, 2): where the boxes begin and end, in pixels; `cells` lie between them. Returns
    (n, pixels, cells). Beyond the centers of the outermost cells, values fall to 0; outside the box
    they are 0.
    """
    device = limits.device
    begin = limits[:, :1]                                                # (n, 1)
    length = (limits[:, 1:] - begin).clamp(min=1e-6)                     # (n, 1)
    centers = torch.arange(pixels, device=device) + 0.5                  # (pixels,)
    position = (centers - begin) / length                                # (n, pixels)
    inside = (position >= 0) & (position <= 1)                           # (n, pixels)
    cell = torch.arange(cells, device=device)                            # (cells,)
    distance = (position * cells - 0.5)[..., None] - cell                # (n, pixels, cells)
    weights = (1 - distance.abs()).clamp(min=0)                          # (n, pixels, cells)
    return weights * inside[..., None]
