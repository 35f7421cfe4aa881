"""Set prediction: Hungarian matching of predictions to objects, and the set loss (class, L1, GIoU).

DETR (Carion et al. 2020, section 3.1), with its own softmax classification (`SoftmaxSetLoss`) or
the focal one of Deformable DETR (Zhu et al. 2021, section 5; `SetLoss`). Other code calls the two
parts HungarianMatcher and SetCriterion.

    paper                                                                              here
    C(i, j) = w_cls c_cls(i, j) + w_l1 ||b_i - g_j||_1 - w_giou GIoU(b_i, g_j)         match_cost
    sigma = the assignment with the smallest sum over j of C(sigma(j), j)              assign
    L = [ sum_i v_cls focal(logits_i, label of i, or background)                       SetLoss
          + sum_j v_l1 ||b_sigma(j) - g_j||_1 + v_giou (1 - GIoU(b_sigma(j), g_j)) ]
        / number of objects in the batch

For one set of predictions `match` is enough. A detector has a set for every decoder layer;
`SetLoss.match_groups` matches all of them with a single copy to the host, because the host can read
a cost only when the GPU has finished all the work before it:

    set_loss = SetLoss(cost=Weights(2, 5, 2), loss=Weights(2, 5, 2))
    layers = {"": last, "aux0": first}                 # each {"pred_logits", "pred_boxes"}
    [matches] = set_loss.match_groups([Group(layers, targets)])
    losses = set_loss.compute_losses(layers, targets, matches, count_boxes(targets))

A layers, B images, Nq queries, K classes, n objects in one image, n_max in the image with the most
objects, T in the batch. Boxes are (cx, cy, w, h) in [0, 1]. Label K is background.

Differences from the paper
 1. The class cost of `SetLoss` is a difference of focal losses (Deformable DETR code).
 2. Costs between different images are not computed; the authors compute and discard them.
 3. A cost that is not finite counts as a very high one; SciPy refuses it. The loss of such a
    prediction is not finite either, and the training loop reports that.
 4. Half-precision predictions are matched and compared in float32.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from boxes import at_least_float32, box_cxcywh_to_xyxy, generalized_box_iou, paired_giou

ALPHA = 0.25        # focal loss: weight of the positive class
GAMMA = 2.0         # focal loss: exponent that reduces the loss of easy examples
BAD_COST = 1e9      # stands for a cost that is not finite

Matches = list[tuple[Tensor, Tensor]]   # per image: query indices and object indices, on the host


class Weights(NamedTuple):
    """Factors of the three terms, in costs and in losses."""
    cls: float
    l1: float
    giou: float


class Group(NamedTuple):
    """Predictions of equal shape that are matched to the same objects, e.g. all decoder layers."""
    layers: dict[str, dict]    # by the name of their losses: {"pred_logits", "pred_boxes"}
    targets: list[dict]        # per image: labels (n,) and boxes (n, 4)
    copies: int = 1            # queries that every object is matched to


def match(predictions: dict, targets: list[dict], weights: Weights, eps: float = 0.0,
          class_cost=None) -> Matches:
    """Match one set of predictions to the objects of each image, one to one.

    predictions: `pred_logits` (B, Nq, K), `pred_boxes` (B, Nq, 4); targets: per image `labels` (n,)
    and `boxes` (n, 4); eps: added to the denominators of GIoU; class_cost: `focal_cost`, the
    default, or `softmax_cost`. Returns, per image, min(Nq, n) query indices, rising, and the
    indices of their objects.
    """
    logits = at_least_float32(predictions["pred_logits"])
    boxes = at_least_float32(predictions["pred_boxes"])
    cost = match_cost(logits, boxes, targets, weights, eps, class_cost)   # (B, Nq, n_max)
    return assign(cost.cpu(), targets)


@torch.no_grad()
def match_cost(logits: Tensor, boxes: Tensor, targets: list[dict], weights: Weights,
               eps: float = 0.0, class_cost=None) -> Tensor:
    """Cost of assigning each prediction to each object of its image.

    logits (..., B, Nq, K), boxes (..., B, Nq, 4) -> (..., B, Nq, n_max). Where an image has fewer
    than n_max objects, its last columns mean nothing.
    """
    labels = pad_sequence([t["labels"] for t in targets], batch_first=True)      # (B, n_max)
    objects = pad_sequence([t["boxes"] for t in targets], batch_first=True)      # (B, n_max, 4)
    objects = objects.to(boxes.dtype)
    column = labels[:, None].expand(*logits.shape[:-1], -1)                      # (..., Nq, n_max)
    class_cost = class_cost or focal_cost
    cls = class_cost(logits, column)                                             # (..., Nq, n_max)
    l1 = (boxes[..., :, None, :] - objects[:, None, :, :]).abs().sum(-1)         # (..., Nq, n_max)
    giou = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(objects), eps)
    return weights.cls * cls + weights.l1 * l1 - weights.giou * giou


def focal_cost(logits: Tensor, column: Tensor) -> Tensor:
    """Focal loss of "this class" minus focal loss of "not this class": logits (..., Nq, K), class
    of each object (..., Nq, n_max) -> (..., Nq, n_max)."""
    p = logits.gather(-1, column).sigmoid()
    positive = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log()
    negative = (1 - ALPHA) * p ** GAMMA * -(1 - p + 1e-8).log()
    return positive - negative


def softmax_cost(logits: Tensor, column: Tensor) -> Tensor:
    """Minus the probability of "this class", DETR's class cost.

    Not its logarithm, so that it is on the scale of the box costs (DETR, section 3.1).
    logits (..., Nq, K + 1), class of each object (..., Nq, n_max) -> (..., Nq, n_max).
    """
    return -logits.softmax(-1).gather(-1, column)


def assign(cost: Tensor, targets: list[dict], copies: int = 1) -> Matches:
    """Find the cheapest assignment of every image.

    cost (B, Nq, n_max) on the host. Every object is matched to `copies` queries, as if it stood
    `copies` times in the image; the returned indices are those of the objects, not of the copies.
    """
    matches = []
    for image_cost, target in zip(cost, targets):
        n = len(target["labels"])
        columns = image_cost[:, :n].nan_to_num(BAD_COST, BAD_COST, BAD_COST)     # (Nq, n)
        columns = columns.repeat(1, copies)                                      # (Nq, copies n)
        query, column = linear_sum_assignment(columns.numpy())
        index = column % max(1, n)   # of the object; without objects both are empty
        matches.append((torch.as_tensor(query), torch.as_tensor(index)))
    return matches


class SetLoss:
    """Matching and losses of sets of predictions.

    cost, loss: `Weights` of the terms; eps: added to the denominators of GIoU.
    class_loss(logits, labels, boxes, target_boxes) gives the loss of each query and class, shaped
    as logits; target boxes of background queries are zero. class_cost: as in `match`.
    """

    def __init__(self, cost: Weights, loss: Weights, eps: float = 0.0, class_loss=None,
                 class_cost=None):
        self.cost = cost
        self.loss = loss
        self.eps = eps
        self.class_loss = class_loss or focal_loss
        self.class_cost = class_cost or focal_cost

    def match(self, predictions: dict, targets: list[dict]) -> Matches:
        """Match one set of predictions, as the function `match` does."""
        return match(predictions, targets, self.cost, self.eps, self.class_cost)

    def match_groups(self, groups: list[Group]) -> list[list[Matches]]:
        """Match every layer of every group, with one copy to the host.

        Returns for each group a list of A `Matches`, in the order of its layers.
        """
        costs = []
        for group in groups:
            logits, boxes = stack_layers(list(group.layers.values()))
            costs.append(match_cost(
                logits, boxes, group.targets, self.cost, self.eps, self.class_cost))
        matches = []
        for group, cost in zip(groups, copy_to_host(costs)):                     # (A, B, Nq, n_max)
            matches.append([assign(layer, group.targets, group.copies) for layer in cost])
        return matches

    def compute_losses(self, layers: dict[str, dict], targets: list[dict],
                       matches: list[Matches], num_boxes) -> dict[str, Tensor]:
        """Compute the weighted losses of layers of equal shape whose matches are known.

        Each is a sum over queries divided by `num_boxes`, the number of objects; a subclass may
        divide the class loss by something else. Returns {"NAME.cls": scalar, "NAME.l1": ...,
        "NAME.giou": ..., ...}; the name "" has no dot. The layers are stacked, so that each
        operation runs once.
        """
        logits, boxes = stack_layers(list(layers.values()))              # (A, B, Nq, K or 4)
        true_labels = torch.cat([t["labels"] for t in targets])                  # (T,)
        true_boxes = torch.cat([t["boxes"] for t in targets]).to(boxes.dtype)    # (T, 4)
        pairs = copy_to_device(index_matches(matches, targets), logits.device)   # (4, pairs)
        layer, image, query, row = pairs
        matched = (layer, image, query)

        # Class: matched queries learn the label of their object, the others background.
        background = logits.shape[-1]
        labels = torch.full_like(logits[..., 0], background, dtype=torch.int64)  # (A, B, Nq)
        labels[matched] = true_labels[row]
        target_boxes = torch.zeros_like(boxes)                                   # (A, B, Nq, 4)
        target_boxes[matched] = true_boxes[row]
        cls = self.class_losses(logits, labels, boxes, target_boxes, num_boxes)  # (A,)

        # Boxes: matched queries only, summed layer by layer.
        predicted = boxes[matched]                                               # (pairs, 4)
        wanted = true_boxes[row]                                                 # (pairs, 4)
        l1 = (predicted - wanted).abs().sum(-1)                                  # (pairs,)
        giou = paired_giou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(wanted), self.eps)
        zero = boxes.new_zeros(len(boxes))
        l1 = zero.index_add(0, layer, l1)                                        # (A,)
        giou = zero.index_add(0, layer, 1 - giou)                                # (A,)

        losses = {}
        for i, name in enumerate(layers):
            prefix = f"{name}." if name else ""
            losses[prefix + "cls"] = self.loss.cls * cls[i]
            losses[prefix + "l1"] = self.loss.l1 * l1[i] / num_boxes
            losses[prefix + "giou"] = self.loss.giou * giou[i] / num_boxes
        return losses

    def class_losses(self, logits, labels, boxes, target_boxes, num_boxes) -> Tensor:
        """Class loss of every layer, (A,): a sum over queries and classes, over `num_boxes`."""
        loss = self.class_loss(logits, labels, boxes, target_boxes)              # (A, B, Nq, K)
        return loss.flatten(1).sum(1) / num_boxes


class SoftmaxSetLoss(SetLoss):
    """DETR's set loss: a softmax over K classes and, in column K, "no object"."""

    def __init__(self, cost: Weights, loss: Weights, no_object: float):
        super().__init__(cost, loss, class_cost=softmax_cost)
        self.no_object = no_object   # weight of "no object" in the class loss

    def class_losses(self, logits, labels, boxes, target_boxes, num_boxes) -> Tensor:
        """Class loss of every layer, (A,): a weighted mean over the queries of all images.

        logits (A, B, Nq, K + 1), labels (A, B, Nq), above K for background.
        """
        K = logits.shape[-1] - 1
        labels = labels.clamp(max=K)
        loss = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")  # (A, B, Nq)
        weights = torch.ones_like(loss)                                          # (A, B, Nq)
        weights[labels == K] = self.no_object
        return (weights * loss).sum((1, 2)) / weights.sum((1, 2))


def focal_loss(logits: Tensor, labels: Tensor, boxes=None, target_boxes=None) -> Tensor:
    """Sigmoid focal loss of each query and class (Lin et al. 2017, Eq. 5).

    logits (..., Nq, K), labels (..., Nq) with K for background -> (..., Nq, K). The boxes are not
    used; a `class_loss` that depends on the overlap needs them.
    """
    classes = torch.arange(logits.shape[-1], device=logits.device)               # (K,)
    one_hot = (labels[..., None] == classes).to(logits.dtype)                    # (..., Nq, K)
    p = logits.sigmoid()
    p_true = p * one_hot + (1 - p) * (1 - one_hot)
    alpha = ALPHA * one_hot + (1 - ALPHA) * (1 - one_hot)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    return alpha * (1 - p_true) ** GAMMA * cross_entropy


def named_layers(outputs: dict, prefix: str = "") -> dict[str, dict]:
    """Name the layers of `outputs` as their losses are logged: {"": last, "aux0": first, ...}; with
    the prefix "dn", {"dn": last, "dn.aux0": first, ...}."""
    layers = {prefix: outputs}
    for i, layer in enumerate(outputs["aux_outputs"]):
        layers[f"{prefix}.aux{i}".removeprefix(".")] = layer
    return layers


def stack_layers(layers: list[dict]) -> tuple[Tensor, Tensor]:
    """Stack predictions of equal shape: logits (A, B, Nq, K) and boxes (A, B, Nq, 4)."""
    logits = torch.stack([layer["pred_logits"] for layer in layers])
    boxes = torch.stack([layer["pred_boxes"] for layer in layers])
    return at_least_float32(logits), at_least_float32(boxes)


def index_matches(matches: list[Matches], targets: list[dict]) -> Tensor:
    """Write the matches of A layers as one table, one column a pair: (4, pairs) int64.

    The rows are layer, image, query, and the object's row among the objects of all images.
    """
    columns = []
    for a, layer_matches in enumerate(matches):
        first = 0
        for b, (query, index) in enumerate(layer_matches):
            place = torch.tensor([[a], [b]]).expand(2, len(query))
            columns.append(torch.cat((place, torch.stack((query, first + index)))))
            first += len(targets[b]["labels"])
    return torch.cat(columns, 1)


def count_boxes(targets: list[dict], copies: int = 1) -> float:
    """Count the objects of the batch, each `copies` times; at least 1. Losses are divided by it."""
    return float(max(1, copies * sum(len(t["labels"]) for t in targets)))


def copy_to_host(tensors: list[Tensor]) -> list[Tensor]:
    """Copy tensors of one dtype to the host together: the host waits for the device once."""
    sizes = [x.numel() for x in tensors]
    flat = torch.cat([x.flatten() for x in tensors]).cpu()
    return [part.view(x.shape) for part, x in zip(flat.split(sizes), tensors)]


def copy_to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device without waiting for what the device still has to do."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
