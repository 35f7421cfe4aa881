"""--compile, --recompute, --freeze, --channels_last, --impl: how a model's layers are computed."""
import contextlib
import re
from functools import partial
from types import MethodType

import torch
from torch.utils.checkpoint import checkpoint

from backbones.resnet import ResNet
from deformable_attn import KernelError, MSDeformAttn, verify_kernel
from engine.batch_norm import restore_statistics
from engine.errors import UserError

# Versions of one function that torch.compile may make: a function serves all layers of a class, and
# needs a version for each set of widths (Swin has four), for training and for evaluation, for one
# image and for several. PyTorch stops at 8.
COMPILED_VERSIONS = 256
# encoder.0, decoder.3, backbone.layer1.0, backbone.layers.2.blocks.5, backbone.blocks.7
LAYER_NAMES = r"(^|\.|_)((en|de)coder\.\d+|backbone\.(layer\d+\.\d+|(layers\.\d+\.)?blocks\.\d+))$"


def find_layers(model) -> list:
    """Encoder layers, decoder layers and backbone blocks."""
    return [module for name, module in model.named_modules() if re.search(LAYER_NAMES, name)]


def compile_or_recompute(model, run) -> None:
    """--compile and --recompute, on encoder layers, decoder layers and backbone blocks.

    Compiled code serves images of every size. Layers with convolutions (ResNet, FocalNet) are not
    compiled: PyTorch's code for convolutions is made for one size, and would be made again for
    each. Recomputing stores only the inputs of a layer, and repeats it in the backward pass with
    the same random numbers; its batch statistics count once."""
    layers = find_layers(model)
    if (run.compile or run.recompute) and not layers:
        raise UserError("expected modules named encoder.0, decoder.0 or backbone.layer1.0 for "
                        f"--compile and --recompute, got none in {run.model}: leave the flags out")
    if run.compile:   # both were renamed to recompile_limit in PyTorch 2.7, and kept as aliases
        torch._dynamo.config.cache_size_limit = COMPILED_VERSIONS
        torch._dynamo.config.accumulated_cache_size_limit = COMPILED_VERSIONS
    for layer in layers:
        if run.compile and not has_convolutions(layer):
            layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=True)
        if run.recompute:
            contexts = partial(recompute_contexts, layer)
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)


def has_convolutions(layer) -> bool:
    return any(isinstance(module, torch.nn.Conv2d) for module in layer.modules())


def freeze_backbone(model) -> list[str]:
    """--freeze backbone: its weights and batch statistics keep their values. -> report lines"""
    backbones = {name: m for name, m in model.named_modules() if name.split(".")[-1] == "backbone"}
    if not backbones:
        raise UserError("expected a module named backbone for --freeze backbone, got none: leave "
                        "the flag out (a mask network freezes its whole detector)")
    for module in backbones.values():
        module.requires_grad_(False)
        module.eval()
        module.train = MethodType(stay_in_evaluation_mode, module)
    return [f"{name} is frozen" for name in backbones]


def stay_in_evaluation_mode(module, mode: bool = True):
    """Takes the place of a frozen module's `train`."""
    return module


def order_channels_last(model, device) -> None:
    """--channels_last: convolutions of ResNets read and write maps in NHWC order."""
    if device.type != "cuda":
        raise UserError(f"expected a GPU with --channels_last, got {device.type}: leave the flag "
                        "out")
    for module in model.modules():
        if isinstance(module, ResNet):
            module.to(memory_format=torch.channels_last)


def prepare_attention(impl: str, device) -> None:
    """--impl: choose the implementation of deformable attention, and compare the kernel of this
    device with the reference implementation. UserError where it is wrong or cannot be built."""
    MSDeformAttn.impl = impl or None
    if impl == "torch":
        return
    try:
        built = verify_kernel(device)
    except KernelError as error:
        raise UserError(str(error)) from error
    if impl == "kernel" and not built:
        raise UserError("expected a deformable attention kernel with --impl kernel, got none that "
                        "can be built here (the warning says why): leave the flag out")


def recompute_contexts(layer) -> tuple:
    """Contexts of the forward pass and of its repetition."""
    return contextlib.nullcontext(), restore_statistics(layer)
