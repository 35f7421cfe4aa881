"""FedLoss, of CenterNet2: Probabilistic Two-stage Detection (Zhou et al. 2021, arXiv
2103.07461, section 4).

The idea: in a federated data set (LVIS) only some classes are annotated in an image. So each loss
counts only the classes of its positives and some others, drawn at random: the more training images
a class is in, the more often.

    paper                                          here
    section 4, n_c^0.5 as probabilities            FederatedLoss.set_image_counts
    section 4, the subset of a batch               FederatedLoss.chosen_classes

Difference from the paper: the number of classes does not count background (as in DETR's variants).
"""
import torch
from torch import Tensor

POWER = 0.5     # of a class's number of images


class FederatedLoss:
    """A class loss (logits, labels, boxes, target_boxes) -> (A, ..., N) of `num_classes` classes.

    The other classes have no loss. Each of the A layers draws classes of its own. Before
    `set_image_counts`, all classes are equally likely."""

    def __init__(self, class_loss, num_classes: int):
        self.class_loss = class_loss
        self.num_classes = num_classes
        self.weights = None      # (N,)

    def set_image_counts(self, counts: Tensor) -> None:
        """counts (N,): training images that contain each class."""
        self.weights = counts.double() ** POWER

    def __call__(self, logits: Tensor, labels: Tensor, boxes: Tensor,
                 target_boxes: Tensor) -> Tensor:
        loss = self.class_loss(logits, labels, boxes, target_boxes)                # (A, ..., N)
        chosen = self.chosen_classes(labels, logits.shape[-1])                     # (A, N)
        shape = (len(chosen),) + (1,) * (loss.dim() - 2) + chosen.shape[1:]
        return loss * chosen.view(shape).to(loss)

    @torch.no_grad()
    def chosen_classes(self, labels: Tensor, N: int) -> Tensor:
        """Classes that count: those of labels (A, ...), N for background, and random others -> bool
        (A, N).

        The largest of log(weight) plus Gumbel noise are a draw without replacement by weight; no
        value is read from the device."""
        labels = labels.flatten(1)                                                 # (A, rows)
        present = torch.zeros(len(labels), N + 1, dtype=torch.bool, device=labels.device)
        present = present.scatter(1, labels.clamp(max=N), True)[:, :N]             # (A, N)
        if self.num_classes >= N:
            return torch.ones_like(present)
        weights = torch.ones(N) if self.weights is None else self.weights
        weights = weights.to(labels.device, torch.float32)
        noise = -torch.empty(present.shape, device=labels.device).exponential_().log()
        keys = (weights.log() + noise).masked_fill(present, torch.inf)             # (A, N)
        best = keys.topk(self.num_classes, 1)
        usable = best.values > -torch.inf     # a class without images is never drawn
        drawn = torch.zeros_like(present).scatter(1, best.indices, usable)
        return drawn | present
