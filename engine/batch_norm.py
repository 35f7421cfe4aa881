"""Batch statistics: the buffers of normalization layers that every forward pass changes."""
import contextlib

from torch import nn


def batch_statistics(model) -> list:
    """Buffers that a forward pass changes: those of BatchNorm layers in training mode. Frozen
    layers are in evaluation mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms if norm.training for buffer in norm.buffers()]


@contextlib.contextmanager
def restore_statistics(model):
    """Restore batch statistics after the block. They are written through `.data`, because autograd
    refuses a backward pass over tensors that were changed otherwise."""
    before = [(buffer, buffer.clone()) for buffer in batch_statistics(model)]
    try:
        yield
    finally:
        for buffer, old in before:
            buffer.data.copy_(old)
