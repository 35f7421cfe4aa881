"""Batch statistics: the buffers of normalization layers that every forward pass changes."""
import contextlib

from torch import nn


def batch_statistics(model) -> list:
    """Buffers that a forward pass changes. Those of a frozen part, which stays in evaluation mode,
    are not among them."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms if norm.training for buffer in norm.buffers()]


@contextlib.contextmanager
def kept_statistics(model):
    """Give batch statistics back the values they had before the block. `.data`: a pending backward
    pass that saved them notices no change."""
    before = [(buffer, buffer.clone()) for buffer in batch_statistics(model)]
    try:
        yield
    finally:
        for buffer, old in before:
            buffer.data.copy_(old)
