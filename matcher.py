"""Set prediction: match every prediction set to the objects of its image one to one, then charge it.

DETR (Carion et al. 2020, section 3.1) with the focal classification of Deformable DETR (Zhu et al. 2021, section 5).

    C(i, j)  = w_cls c_cls(i, j) + w_l1 ||b_i - g_j||_1 - w_giou GIoU(b_i, g_j)             match_cost
    sigma    = argmin over assignments of sum_j C(sigma(j), j)                              hungarian
    L        = [ v_cls sum_i focal(logits_i, label of i or background)                      SetLoss.price
               + sum_j v_l1 ||b_sigma(j) - g_j||_1 + v_giou (1 - GIoU(b_sigma(j), g_j)) ] / objects in the batch

What other code calls HungarianMatcher is match_cost and hungarian here, SetCriterion is SetLoss:

    set_loss = SetLoss(cost=Weights(2, 5, 2), loss=Weights(2, 5, 2))          # w and v
    layers = {"": last, "aux0": first}                                        # each {"pred_logits", "pred_boxes"}
    matches, = set_loss.match((list(layers.values()), targets))
    loss = sum(set_loss.price(layers, targets, matches, count_boxes(targets)).values())

There is no column for background. On many ranks the normaliser is the mean of `count_boxes` over them.
All layers and images are matched with one copy to the host and charged with one set of tensor operations: layers with
equal shapes are stacked. Symbols: A stacked layers, B images, Nq queries, K classes, n objects in one image,
n_max objects in the fullest image of the batch.

Departs: costs between different images are not computed (the authors compute and discard them); everything runs in
float32 or float64 whatever the autocast; a cost that is not finite does not stop the matching (SciPy's raises).
"""
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from boxes import box_cxcywh_to_xyxy, generalized_box_iou, paired_giou

ALPHA, GAMMA = 0.25, 2.0   # focal loss, of the cost and of the loss


class Weights(NamedTuple):
    """Factors of the three terms, in costs and in losses."""
    cls: float
    l1: float
    giou: float


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def stack(predictions: list[dict]) -> tuple[Tensor, Tensor]:
    """Predictions of equal shape -> logits (A, B, Nq, K) and boxes (A, B, Nq, 4), at least float32."""
    return (at_least_float32(torch.stack([p["pred_logits"] for p in predictions])),
            at_least_float32(torch.stack([p["pred_boxes"] for p in predictions])))


@torch.no_grad()
def match_cost(logits: Tensor, boxes: Tensor, targets: list[dict], weights: Weights, eps: float = 0.0) -> Tensor:
    """Cost of giving each prediction each object of its image.

    logits (A, B, Nq, K), boxes (A, B, Nq, 4), targets B dictionaries with `labels` (n,) and `boxes` (n, 4)
    -> (A, B, Nq, n_max); columns beyond an image's n are meaningless. `eps` as in `paired_giou`.
    c_cls is the focal loss of "this class" minus that of "not this class" (Deformable DETR code; DETR used -p).
    """
    labels = pad_sequence([t["labels"] for t in targets], batch_first=True)                  # (B, n_max)
    objects = pad_sequence([t["boxes"] for t in targets], batch_first=True).to(boxes.dtype)  # (B, n_max, 4)
    index = labels[None, :, None, :].expand(*logits.shape[:-1], -1)                          # (A, B, Nq, n_max)
    p = logits.gather(-1, index).sigmoid()
    positive = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log()
    negative = (1 - ALPHA) * p ** GAMMA * -(1 - p + 1e-8).log()
    l1 = (boxes[..., :, None, :] - objects[:, None, :, :]).abs().sum(-1)                     # (A, B, Nq, n_max)
    giou = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(objects), eps)
    return weights.cls * (positive - negative) + weights.l1 * l1 - weights.giou * giou


def hungarian(costs: list[Tensor], counts: list[list[int]]) -> list[list[list[tuple[Tensor, Tensor]]]]:
    """The cheapest one-to-one assignment of every image in every stacked prediction.

    costs: tensors (A, B, Nq, n_max), copied to the host together; counts: for each tensor n of each of the B images
    -> for each tensor, A lists of B pairs (query indices, object indices), int64 on the host, by query; min(Nq, n) pairs
    each. A NaN or infinite cost counts as a very high one: the loss of such predictions is not finite either, and the training
    loop reports that with the names of the images.
    """
    host = torch.cat([c.reshape(-1) for c in costs]).cpu().nan_to_num(nan=1e9, posinf=1e9, neginf=1e9)
    matches = []
    for cost, flat, objects in zip(costs, host.split([c.numel() for c in costs]), counts):
        flat = flat.view(cost.shape).numpy()
        matches.append([[tuple(torch.as_tensor(i, dtype=torch.int64) for i in linear_sum_assignment(image[:, :n]))
                         for image, n in zip(layer, objects)] for layer in flat])
    return matches


def focal_loss(logits: Tensor, labels: Tensor, boxes: Tensor = None, target_boxes: Tensor = None) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017, Eq. 5) per query and class: logits (..., Nq, K), labels (..., Nq) where K means
    background -> (..., Nq, K). Boxes are not used here; losses that weigh by overlap need them."""
    one_hot = F.one_hot(labels, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)   # (..., Nq, K)
    p = logits.sigmoid()
    p_true = p * one_hot + (1 - p) * (1 - one_hot)
    alpha = ALPHA * one_hot + (1 - ALPHA) * (1 - one_hot)
    return alpha * (1 - p_true) ** GAMMA * F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")


class SetLoss:
    """Matching and losses of prediction sets: {"pred_logits" (B, Nq, K), "pred_boxes" (B, Nq, 4) cxcywh in [0, 1]}.

    cost, loss: `Weights`; eps: added in GIoU denominators; class_loss(logits, labels, boxes, target boxes) -> loss per
    query and class, where target boxes of background queries are zero.
    """

    def __init__(self, cost: Weights, loss: Weights, eps: float = 0.0, class_loss: Callable = focal_loss):
        self.cost, self.loss, self.eps, self.class_loss = cost, loss, eps, class_loss

    def match(self, *groups: tuple[list[dict], list[dict]]) -> list:
        """Each group is (predictions of equal shape, targets) -> per group A lists of B index pairs. One host copy."""
        costs = [match_cost(*stack(predictions), targets, self.cost, self.eps) for predictions, targets in groups]
        return hungarian(costs, [[len(t["labels"]) for t in targets] for _, targets in groups])

    def price(self, predictions: dict[str, dict], targets: list[dict], matches: list, normaliser: float) -> dict:
        """Weighted losses of named predictions of equal shape, given their matches (one list of B pairs each).

        -> {"name.cls": scalar, "name.l1": ..., "name.giou": ...} (no dot for the name ""), each a sum over queries
        divided by `normaliser`, the number of objects.
        """
        logits, boxes = stack(list(predictions.values()))
        device = logits.device
        layer, image, query, row = flatten_matches(matches, targets).to(device)              # each (matched,)
        gt_labels = torch.cat([t["labels"] for t in targets])
        gt_boxes = torch.cat([t["boxes"] for t in targets]).to(boxes.dtype)
        where = (layer, image, query)
        labels = torch.full(logits.shape[:-1], logits.shape[-1], dtype=torch.int64, device=device)   # (A, B, Nq)
        labels[where] = gt_labels[row]
        target_boxes = torch.zeros_like(boxes)                                               # (A, B, Nq, 4)
        target_boxes[where] = gt_boxes[row]
        cls = self.class_loss(logits, labels, boxes, target_boxes).flatten(1).sum(1)         # (A,)
        matched = boxes[where]                                                               # (matched, 4)
        zero = boxes.new_zeros(len(logits))
        l1 = zero.index_add(0, layer, (matched - gt_boxes[row]).abs().sum(-1))               # (A,)
        giou = paired_giou(box_cxcywh_to_xyxy(matched), box_cxcywh_to_xyxy(gt_boxes[row]), self.eps)
        giou = zero.index_add(0, layer, 1 - giou)                                            # (A,)
        losses = {}
        for i, name in enumerate(predictions):
            for term in Weights._fields:
                value = {"cls": cls, "l1": l1, "giou": giou}[term][i]
                losses[f"{name}.{term}".lstrip(".")] = getattr(self.loss, term) * value / normaliser
        return losses


def flatten_matches(matches: list, targets: list[dict]) -> Tensor:
    """A lists of B pairs -> one int64 tensor (4, matched): layer, image, query, row of the concatenated targets.

    One tensor, so that it reaches the device in one copy.
    """
    start, columns = [0], [torch.zeros(4, 0, dtype=torch.int64)]
    for t in targets:
        start.append(start[-1] + len(t["labels"]))
    for a, images in enumerate(matches):
        for b, (query, index) in enumerate(images):
            columns.append(torch.stack((torch.full_like(query, a), torch.full_like(query, b), query, index + start[b])))
    return torch.cat(columns, 1)


def count_boxes(targets: list[dict]) -> float:
    """Number of objects in the batch, at least 1: the normaliser of every loss."""
    return float(max(1, sum(len(t["labels"]) for t in targets)))
