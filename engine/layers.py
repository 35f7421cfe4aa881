"""Apply --compile and --recompute to the layers of a model."""
import contextlib
import re
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from engine.batch_norm import restore_statistics
from engine.errors import UserError

# encoder.0, decoder.3, backbone.layer1.0, backbone.layers.2.blocks.5, backbone.blocks.7
LAYER_NAMES = r"(^|\.|_)((en|de)coder\.\d+|backbone\.(layer\d+\.\d+|(layers\.\d+\.)?blocks\.\d+))$"


def compile_or_recompute(model, run) -> None:
    """--compile and --recompute, on encoder layers, decoder layers and backbone blocks.

    Recomputing stores only the inputs of a layer, and repeats it in the backward pass with the same
    random numbers, without a second update of batch statistics."""
    layers = [module for name, module in model.named_modules() if re.search(LAYER_NAMES, name)]
    if (run.compile or run.recompute) and not layers:
        raise UserError("expected modules named encoder.0, decoder.0 or backbone.layer1.0 for "
                        f"--compile and --recompute, got none in {run.model}: leave the flags out")
    for layer in layers:
        if run.compile:
            layer.forward = torch.compile(layer.forward, fullgraph=True)
        if run.recompute:
            contexts = partial(recompute_contexts, layer)
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)


def recompute_contexts(layer) -> tuple:
    """Contexts of the forward pass and of its repetition."""
    return contextlib.nullcontext(), restore_statistics(layer)
