"""Exponential moving average (EMA) of a model's weights: the model that is evaluated and saved."""
import math

import torch
from torch.optim.swa_utils import AveragedModel


def make_ema(model, decay: float, warmup: int = 0):
    """AveragedModel of parameters and batch statistics; its `.module` is evaluated.

    The decay grows to its value, see `ema_decay`. With decay 0, `.module` is the model itself."""
    if not decay:
        return NoEMA(model)

    @torch.no_grad()
    def update(averages, values, _):
        if averages[0].is_floating_point():
            weight = 1 - ema_decay(decay, warmup, int(ema.n_averaged))
            torch._foreach_lerp_(averages, values, weight)
        else:
            torch._foreach_copy_(averages, values)     # counters, such as num_batches_tracked

    ema = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return ema.eval().requires_grad_(False)


class NoEMA:
    """Takes the place of AveragedModel with decay 0."""

    def __init__(self, model):
        self.module = model

    def update_parameters(self, model):
        pass


def ema_decay(ema: float, ema_warmup: int, step: int) -> float:
    """Decay of the EMA at a step, counted from 0: it rises to `ema`, because early averages would
    mostly remember the random start.

    Without a warmup it is (1 + step) / (10 + step) at first. With one (ViT-L of Co-DETR, code) the
    weight of the new values is (1 - m) exp(-(1 + step) / ema_warmup) + m, where m = 1 - ema."""
    if not ema_warmup:
        return min(ema, (1 + step) / (10 + step))
    weight = 1 - ema
    weight += (1 - weight) * math.exp(-(1 + step) / ema_warmup)
    return 1 - weight
