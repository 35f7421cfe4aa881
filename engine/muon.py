"""Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982) for the weight matrices of hidden
layers, AdamW for all other parameters.

The idea: the gradient of a matrix is dominated by a few directions. Muon replaces it by the nearest
matrix with equal singular values, so that a step changes all directions alike. A small detector
needs a third of the steps with it (RESULTS.md, "Time to AP 0.80").

    M <- mu M + (1 - mu) G                           momentum; G: gradient of W, (m, n)
    U = (1 - mu) G + mu M                            Nesterov
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(m, n)) orthogonalize(U)

0.2 sqrt(max(m, n)) makes the update as large as one of AdamW (Liu et al., section 2.2). A
convolution counts as a matrix (outputs, inputs x kernel height x kernel width).

No local imports: copy this file alone. NOT_HIDDEN has names of this project's models: replace them
by those of your model's embeddings and last layers, which AdamW should train.

    groups = [{"params": list(model.parameters()), "lr": 1e-3}]
    optimizer = Muon(split_groups(groups, model, factor=8.0), weight_decay=1e-2)
"""
import math

import torch
from torch import Tensor, nn

MOMENTUM = 0.9
# One polynomial a x + b x^3 + c x^5 for each iteration. Each brings the singular values that the
# one before leaves as near to 1 as possible, beginning with values of 0.01 to 1 (Amsel et al. 2025,
# arXiv 2505.16932). Three of them do what five equal ones of Newton-Schulz did, in 60 % of the
# time.
POLYNOMIALS = ((8.0934, -23.6204, 17.4462),
               (3.6366, -2.7219, 0.5365),
               (2.6613, -1.9772, 0.4526))
MIN_SIDE = 32                               # smaller matrices keep AdamW: they have few directions
# Tables of vectors, class heads, and the layers that say where deformable attention samples and how
# much each sample weighs.
NOT_HIDDEN = ("query_embed", "tgt_embed", "label_enc", "level_embed", "anchor_embed",
              "relative_position_bias_table", "class_embed", ".cls.", "sampling_offsets",
              "attention_weights", "reference_points")


class Muon(torch.optim.AdamW):
    """AdamW that updates parameters of groups with `muon` > 0 by Muon, at `muon` times their lr.

    Every group needs the entry `muon`, as `split_groups` makes it."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["muon"]:
                self.update_matrices(group)
        super().step()      # leaves parameters without gradient alone

    def update_matrices(self, group: dict) -> None:
        """Update the matrices of a group and drop their gradients."""
        by_shape = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(matrix_shape(parameter), []).append(parameter)
        lr = group["muon"] * group["lr"]
        for shape, parameters in by_shape.items():
            updates = torch.stack([self.momentum(p).reshape(shape) for p in parameters])
            updates = orthogonalize(updates) * 0.2 * math.sqrt(max(shape))   # (count, m, n)
            for parameter, update in zip(parameters, updates):
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.sub_(update.view_as(parameter), alpha=lr)
                parameter.grad = None

    def momentum(self, parameter: nn.Parameter) -> Tensor:
        """Update the momentum of a parameter. -> its Nesterov momentum, shaped as the parameter"""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())          # AdamW reads it from saved states
            state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1
        state["exp_avg"].lerp_(parameter.grad, 1 - MOMENTUM)
        return parameter.grad.lerp(state["exp_avg"], MOMENTUM)


def orthogonalize(x: Tensor) -> Tensor:
    """Bring the singular values of matrices (count, m, n) near 1, keep their singular vectors.

    Values from about 0.01 of the Frobenius norm on end between 0.7 and 1.3, smaller ones lower. The
    products run in bfloat16 where the hardware has it."""
    tall = x.shape[1] > x.shape[2]
    y = x.mT if tall else x
    # no singular value above 1, where the polynomials grow, even after rounding to bfloat16
    y = y / (1.02 * torch.linalg.matrix_norm(y, keepdim=True) + 1e-7)
    y = y.to(product_dtype(x))
    for a, b, c in POLYNOMIALS:
        gram = y @ y.mT                                              # (count, m, m)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)      # b G + c G G
        y = torch.baddbmm(y, gram, y, beta=a)                        # a Y + (b G + c G G) Y
    return (y.mT if tall else y).to(x.dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """bfloat16 where the hardware multiplies it: that is exact enough for these iterations."""
    if x.is_cuda or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return x.dtype


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    return parameter.shape[0], math.prod(parameter.shape[1:])


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter of this name in the model is updated by Muon."""
    if parameter.dim() < 2 or min(matrix_shape(parameter)) < MIN_SIDE:
        return False
    return not any(part in name for part in NOT_HIDDEN)


def split_groups(groups: list[dict], model: nn.Module, factor: float) -> list[dict]:
    """Split each group of parameters into hidden matrices, `muon` = factor, and others, 0."""
    hidden = {p for name, p in model.named_parameters() if is_hidden_matrix(name, p)}
    split = []
    for group in groups:
        matrices = [p for p in group["params"] if p in hidden]
        others = [p for p in group["params"] if p not in hidden]
        split += [{**group, "params": others, "muon": 0.0},
                  {**group, "params": matrices, "muon": factor}]
    return [group for group in split if group["params"]]
